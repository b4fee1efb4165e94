"""The settings of the data system; those of a stage stand in the stage's own module.

`configs/data.py` builds a `PrepareConfig`; flags override single fields
(`--config.documents.threshold=0.8`).
"""

import dataclasses
import json

from baichuan_jax.data.prepare.clean import CleanConfig
from baichuan_jax.data.prepare.decontaminate import DecontaminateConfig
from baichuan_jax.data.prepare.documents import DocumentsConfig
from baichuan_jax.data.prepare.exact import ExactConfig
from baichuan_jax.data.prepare.ingest import IngestConfig
from baichuan_jax.data.prepare.language import LanguageConfig
from baichuan_jax.data.prepare.mixture import MixtureConfig
from baichuan_jax.data.prepare.perplexity import PerplexityConfig
from baichuan_jax.data.prepare.privacy import PrivacyConfig
from baichuan_jax.data.prepare.quality import QualityConfig
from baichuan_jax.data.prepare.safety import SafetyConfig
from baichuan_jax.data.prepare.semantic import SemanticConfig
from baichuan_jax.data.prepare.sentences import SentencesConfig
from baichuan_jax.data.prepare.spans import SpansConfig
from baichuan_jax.data.prepare.tokens import TokensConfig


@dataclasses.dataclass
class PrepareConfig:
    """Everything that prepared data is made from (§2.1)."""

    sources: str = ""  # NAME=PATH,…: see baichuan_jax/data/sources.py
    tokenizer: str = ""  # a SentencePiece file; empty: one is trained on what is kept
    vocab_size: int = 32_000  # of the one that is trained
    skip: str = ""  # stages to leave out, separated by commas
    # Two runs of this project: one whose states embed documents (else hashed n-grams do), one
    # whose perplexity scores them (else nothing does).
    embedding_model: str = ""
    perplexity_model: str = ""
    max_source_loss: float = 0.9  # of a source's text; a larger loss stops the run
    seed: int = 0
    ingest: IngestConfig = dataclasses.field(default_factory=IngestConfig)
    language: LanguageConfig = dataclasses.field(default_factory=LanguageConfig)
    exact: ExactConfig = dataclasses.field(default_factory=ExactConfig)
    clean: CleanConfig = dataclasses.field(default_factory=CleanConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    sentences: SentencesConfig = dataclasses.field(default_factory=SentencesConfig)
    spans: SpansConfig = dataclasses.field(default_factory=SpansConfig)
    documents: DocumentsConfig = dataclasses.field(default_factory=DocumentsConfig)
    decontaminate: DecontaminateConfig = dataclasses.field(default_factory=DecontaminateConfig)
    safety: SafetyConfig = dataclasses.field(default_factory=SafetyConfig)
    clusters: SemanticConfig = dataclasses.field(default_factory=SemanticConfig)
    quality: QualityConfig = dataclasses.field(default_factory=QualityConfig)
    perplexity: PerplexityConfig = dataclasses.field(default_factory=PerplexityConfig)
    mixture: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    tokens: TokensConfig = dataclasses.field(default_factory=TokensConfig)


# The stages, in the order of the paper; `pack`, which has no settings of its own, is the last.
STAGES = tuple(
    field.name
    for field in dataclasses.fields(PrepareConfig)
    if dataclasses.is_dataclass(field.type)
)
OPTIONAL = tuple(name for name in STAGES if name not in ("ingest", "tokens"))


def to_json(config: PrepareConfig) -> str:
    """The resolved config as it is written into the folder."""
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)
