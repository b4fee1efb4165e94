"""The data system of §2.1: stages one after the other, each kept when it is done.

    WORKDIR/documents/           the corpus, as it came in        (corpus.py)
    WORKDIR/attributes/STAGE/    what a stage found out, row by row
    WORKDIR/embeddings/, signatures/, evaluation/, models/    what some stages keep for themselves
    WORKDIR/stages/STAGE.json    its record: settings, time, what is left after it
    WORKDIR/rejects.jsonl        rows that could not be read
    WORKDIR/shards/              packed rows of tokens, and the weights of their mix
    WORKDIR/tokenizer.model, config.json, corpus.json, report.md, plots/

A stage whose record is there, with the same settings and the same stages before it, is not run
again; one that was interrupted goes on where it was. What a stage does is in its own module
(stages.py has the list); how it is spread over workers, in engine.py.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from etils import epath

from baichuan_jax.data.prepare.config import PrepareConfig, to_json
from baichuan_jax.data.prepare.corpus import Corpus, whole
from baichuan_jax.data.prepare.counts import count
from baichuan_jax.data.prepare.engine import Engine
from baichuan_jax.data.prepare.report import report
from baichuan_jax.data.prepare.stages import LoadModel, Stage, stages

MakeEngine = Callable[[epath.Path], Engine]  # gets a folder for the files of its shuffles


def prepare(
    config: PrepareConfig,
    workdir: epath.PathLike,
    make_engine: MakeEngine,
    load_model: LoadModel | None = None,
) -> epath.Path:
    """Runs all stages, or those that are left, and writes the report.

    Args:
      workdir: keeps all that is made; see the top of this file.
      load_model: (a run's folder) -> its `LanguageModel`, for `config.embedding_model` and
        `config.perplexity_model`.

    Returns:
      The report's path.

    Raises:
      ValueError: before any long work, for what the config has wrong; when too many rows cannot
        be read; when a source loses more than `config.max_source_loss` of its text.
    """
    workdir = epath.Path(workdir).expanduser()
    if "://" not in str(workdir):  # workers may have other working folders
        workdir = epath.Path(os.path.abspath(workdir))
    todo = stages(config, workdir, load_model)
    workdir.mkdir(parents=True, exist_ok=True)
    with _alone(workdir):
        (workdir / "config.json").write_text(to_json(config))
        corpus, records, fingerprint = Corpus(str(workdir)), [], ""
        for stage in todo:
            fingerprint = _hash([fingerprint, stage.name, stage.settings])
            record = _read_record(workdir, stage.name)
            if record.get("fingerprint") != fingerprint:
                record = _run(stage, corpus, workdir, fingerprint, make_engine)
            records.append(record)
            if stage.attributes:
                corpus = corpus.after(stage.name)
            _check_losses(records, config.max_source_loss)
        corpus.save()
        return report(workdir, corpus, records, config.seed)


@contextlib.contextmanager
def _alone(workdir: epath.Path) -> Iterator[None]:
    """Refuses a second run in the same folder, where there are locks."""
    if "://" in str(workdir):
        yield
        return
    with open(workdir / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{workdir}: another run is at work in this folder.") from None
        yield


def _run(
    stage: Stage, corpus: Corpus, workdir: epath.Path, fingerprint: str, make_engine: MakeEngine
) -> dict:
    path = workdir / "stages" / f"{stage.name}.json"
    path.unlink(missing_ok=True)  # of other settings, whose results go now
    scratch = workdir / "scratch" / f"{stage.name}-{fingerprint[:16]}"
    if not scratch.exists():  # so what is there is not of this very stage, interrupted
        for old in (workdir / stage.folder, *(workdir / "scratch").glob(f"{stage.name}-*")):
            if old.exists():
                old.rmtree()
        scratch.mkdir(parents=True)
    engine, began = make_engine(scratch), time.monotonic()
    told = stage.run(corpus, engine)
    seconds = time.monotonic() - began
    after = corpus.after(stage.name) if stage.attributes else corpus
    record = {
        "name": stage.name,
        "fingerprint": fingerprint,
        "seconds": seconds,
        "told": told,
        "counts": count(after, stage.name, engine),
    }
    sets = record["counts"]["sets"]
    documents, megabytes = sum(row[2] for row in sets), sum(row[3] for row in sets) / 1e6
    left = f"{stage.name}: {documents:,} documents of {megabytes:,.2f} MB are left"
    logging.info("%s (%.1f s).", left, seconds)
    with whole(path) as partial:
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False))
    for folder in (stage.folder, f"embeddings/{stage.name}", "stages", "models", "."):
        for partial in (workdir / folder).glob("*.partial"):  # of work that was killed
            partial.unlink()
    scratch.rmtree()
    return record


def _check_losses(records: list[dict], most: float) -> None:
    # Languages that nobody wants are no loss.
    first = next((record for record in records if record["name"] == "language"), records[0])
    before, after = (_bytes_by_source(record) for record in (first, records[-1]))
    for source, size in before.items():
        lost = 1 - after[source] / max(1, size)
        if lost > most:
            name = records[-1]["name"]
            raise ValueError(
                f"After the stage {name!r} the source {source!r} has lost {100 * lost:.1f}% of its"
                f" text, more than config.max_source_loss={most}. The column `reason` of"
                f" attributes/{name} says why. Change the stage's settings, or raise the limit:"
                " what is done is kept."
            )


def _bytes_by_source(record: dict) -> collections.Counter[str]:
    sizes = collections.Counter()
    for source, _, _, size in record["counts"]["sets"]:
        sizes[source] += size
    return sizes


def _read_record(workdir: epath.Path, name: str) -> dict[str, Any]:
    path = workdir / "stages" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=dataclasses.asdict)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
