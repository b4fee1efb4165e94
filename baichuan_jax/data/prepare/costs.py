"""What each stage takes, in a process of its own, as a worker runs it: CPU time and memory."""

import dataclasses
import functools
import json
import pathlib
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc
from etils import epath

from baichuan_jax import interleave, tokenizer
from baichuan_jax.data.prepare import (
    clean,
    decontaminate,
    documents,
    embed,
    exact,
    ingest,
    language,
    linear,
    local,
    privacy,
    quality,
    safety,
    sentences,
    spans,
    tokens,
)
from baichuan_jax.data.prepare.config import PrepareConfig
from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.engine import Engine, Local

STAGES = (  # in the pipeline's order
    *("ingest", "language", "exact", "clean", "privacy", "sentences", "spans", "documents"),
    *("decontaminate", "safety", "embed", "quality", "tokens", "pack"),
)
_WITHOUT_ATTRIBUTES = ("ingest", "embed", "pack")
_OF_DOCUMENTS = {
    "language": language.language,
    "clean": clean.clean,
    "privacy": privacy.mask,
    "sentences": sentences.sentences,
    "safety": safety.score,
    "quality": quality.score,
}
_OF_THE_CORPUS = {
    "exact": exact.run,
    "spans": spans.run,
    "documents": documents.run,
    "decontaminate": decontaminate.run,
}
_TOKENIZER, _CLASSIFIER = "tokenizer.model", "linear.npz"
_COUNTED = 1 << 10  # documents whose features are counted: a small part, as of a large corpus
_TRAINED = 1 << 23  # bytes of text that the tokenizer is trained on
_ITEMS, _ITEM = 20, 300  # one document of so many gives so many characters as an evaluation item


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stage takes.

    Attributes:
      stage: its name.
      megabytes: of UTF-8 that it reads: what the stages before it kept.
      seconds: of one core, with all that is read and written, shuffles included.
      gigabytes: that its process held at most.
      jax: whether it has imported JAX, which a worker should do without.
    """

    stage: str
    megabytes: float
    seconds: float
    gigabytes: float
    jax: bool

    @property
    def rate(self) -> float:
        """MB in a second of one core."""
        return self.megabytes / self.seconds


def whole(costs: list[Cost]) -> float:
    """MB/s of stages one after the other, as if each read all of the text."""
    return 1 / sum(1 / cost.rate for cost in costs)


def stages(
    text: str,
    folder: epath.PathLike,
    vocab_size: int = 16_000,
    sequence_length: int = 4_096,
    rounds: int = 2,
) -> Iterator[Cost]:
    """Runs the stages one after the other, each in a fresh process, with its default settings.

    What they need is made: evaluation items of some documents, a classifier whose weights are 0
    (its speed does not depend on them), a tokenizer of a part of the text. Left out is what
    needs JAX, in the driver's process: k-means and the training of classifiers.

    Args:
      text: sources of documents (sources.py).
      folder: for the corpus, empty; in the end `shards` in it has the packed rows.
      vocab_size: of the tokenizer.
      sequence_length: of the packed rows.
      rounds: of each stage, the least time counts; the first one makes tables, too.

    Raises:
      ValueError: the text is too little for such a vocabulary.
      RuntimeError: a stage has failed; its error stands above.
    """
    corpus = Corpus(str(folder))
    for stage in STAGES:
        if stage == "decontaminate":
            _provide(corpus, vocab_size)
        settings = {"text": text, "sequence_length": sequence_length}
        place = {"directory": corpus.directory, "before": corpus.stages}
        worker = interleave.Worker(_Stage, {"stage": stage, **place, **settings})
        try:
            seconds = min(worker.ask("seconds") for _ in range(rounds))
            fields = ("gigabytes", "jax")  # before any other work
            told = {field: worker.ask(field) for field in (*fields, "megabytes")}
        finally:
            worker.close()
        yield Cost(stage, seconds=seconds, **told)
        if stage not in _WITHOUT_ATTRIBUTES:
            corpus = corpus.after(stage)


class _Stage:
    """A stage, in a process of its own."""

    def __init__(
        self, stage: str, directory: str, before: list[str], text: str, sequence_length: int
    ):
        self._stage, self._corpus = stage, Corpus(directory, tuple(before))
        self._config = PrepareConfig(sources=text)
        self._config.decontaminate.against = f"{directory}/items.jsonl"
        self._config.tokens = tokens.TokensConfig(sequence_length, eval_fraction=0)

    def seconds(self) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            began = time.process_time()
            self._run(Local(scratch))
            return time.process_time() - began

    def gigabytes(self) -> float:
        status = pathlib.Path("/proc/self/status")
        if status.exists():  # `getrusage` would tell of the process that started this one
            return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024 / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS: in bytes

    def jax(self) -> bool:
        return "jax" in sys.modules

    def megabytes(self) -> float:
        shards = range(self._corpus.num_shards())
        texts = (self._corpus.read(shard, "text")["text"] for shard in shards)
        return sum(pc.sum(pc.binary_length(found)).as_py() or 0 for found in texts) / 1e6

    def _run(self, engine: Engine) -> None:
        corpus, stage, config = self._corpus, self._stage, self._config
        settings = getattr(config, stage, None)
        directory = epath.Path(corpus.directory)
        match stage:
            case "ingest":
                ingest.run(directory, config.sources, settings, engine)
            case _ if stage in _OF_THE_CORPUS:
                _OF_THE_CORPUS[stage](corpus, stage, engine, settings)
            case "embed":
                embed.run(corpus, stage, engine, config.clusters.dimensions, _COUNTED)
            case "tokens":
                tokens.run(corpus, stage, engine, directory / _TOKENIZER)
            case "pack":
                known = tokenizer.Tokenizer(directory / _TOKENIZER)
                rows = directory / "shards"
                tokens.pack(corpus, rows, engine, config.tokens, config.mixture, known)
            case _:
                function = functools.partial(_OF_DOCUMENTS[stage], config=settings)
                if stage == "safety":
                    function = functools.partial(function, terms=safety.read_terms(settings))
                if stage == "quality":
                    classifier = str(directory / _CLASSIFIER)
                    function = functools.partial(function, classifier=classifier)
                local.run(function, corpus, stage, engine)


def _provide(corpus: Corpus, vocab_size: int) -> None:
    """What the last stages need, in the corpus's folder."""
    directory = epath.Path(corpus.directory)
    tables = (corpus.read(shard, "text") for shard in range(corpus.num_shards()))
    texts = [text for table in tables for text in table["text"].to_pylist()]
    with (directory / "items.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text[:_ITEM]}) + "\n" for text in texts[::_ITEMS])
    weights = np.zeros((1, 1 << linear.BITS), np.float32)
    linear.Linear(weights, np.zeros(1, np.float32)).save(directory / _CLASSIFIER)
    named = ((text, "text") for text in texts)
    model = directory / _TOKENIZER
    tokenizer.train(named, model, vocab_size=vocab_size, max_bytes=_TRAINED)
