"""Bits per byte of each document's beginning under a small model of ours, as a score (§2.1).

Fluent text has few. So has text that repeats itself, and what the model was trained on: it is a
score to look at, no verdict: it is in the report and beside the documents, and nothing is dropped
or weighed by it. Choose a model with a small vocabulary: with 125,696 tokens the head of a small
one costs more than all its layers.

The model is handed in, loaded, and computes in the driver's process: see reading.py.
"""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa

from baichuan_jax.data.prepare.corpus import Corpus

_DOCUMENTS = 1 << 14  # whose tokens are in memory at one time


@dataclasses.dataclass
class PerplexityConfig:
    """How much of each document is read."""

    tokens: int = 512  # from its beginning, and no more than the model was trained on
    batch_tokens: int = 1 << 14  # in one batch, on each part of the mesh with rows of its own

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong."""
        for name, least in (("tokens", 2), ("batch_tokens", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"config.perplexity.{name}={value} must be {least} or more.")


def run(corpus: Corpus, stage: str, model: Any, config: PerplexityConfig) -> dict:
    """Writes `bits_per_byte` (float32) of all documents; shards that have it are left alone.

    It is null for documents of less than two tokens.

    Args:
      model: an `inference.load.LanguageModel`.

    Returns:
      `documents`, how many of them are `unscored`, and the `mean` and some `percentiles` of the
      bits per byte of the others.

    Raises:
      ValueError: a field of the config is too small.
    """
    config.check()
    # Here, for it needs JAX, and the workers, which import the settings, do without.
    from baichuan_jax.data.prepare.reading import bits_per_byte

    for shard in range(corpus.num_shards()):
        if corpus.attribute_path(stage, shard).exists():
            continue
        documents = corpus.read(shard, "text")
        texts = documents["text"]
        scores = [
            bits_per_byte(texts.slice(start, _DOCUMENTS), model, config.tokens, config.batch_tokens)
            for start in range(0, len(documents), _DOCUMENTS)
        ]
        scores = np.concatenate([np.zeros(0, np.float32), *scores])
        column = pa.array(scores, mask=np.isnan(scores))
        corpus.write(stage, shard, documents["row"], pa.table({"bits_per_byte": column}))
    return _summary(corpus.after(stage))


def _summary(corpus: Corpus) -> dict:
    found = [
        corpus.read(shard, "bits_per_byte")["bits_per_byte"].to_numpy()
        for shard in range(corpus.num_shards())
    ]
    scores = np.concatenate([np.zeros(0, np.float32), *found])
    scored = scores[np.isfinite(scores)].astype(np.float64)
    if not len(scored):
        return {"documents": len(scores), "unscored": len(scores)}
    percent = (1, 10, 50, 90, 99)
    values = np.percentile(scored, percent)
    return {
        "documents": len(scores),
        "unscored": len(scores) - len(scored),
        "mean": float(scored.mean()),
        "percentiles": {str(p): float(v) for p, v in zip(percent, values, strict=True)},
    }
