"""Sources -> document shards, with the rows that cannot be read on a list beside them (§2.1).

One task reads one file, one TFDS split, or a few small files. Which files go together depends on
the files alone, and shards get their numbers when all tasks are done, so the corpus is the same
with any number of workers. A task that has finished is not done again.

    DIRECTORY/documents/00000.parquet    the documents of the sources in their order (corpus.py)
    DIRECTORY/documents/parts/           what the tasks have made, until all are done:
      00007/done.json                    what the task tells, and of which files
      00007/ATTEMPT/00000.parquet        a cluster may do a task twice, even at the same time
      00007/ATTEMPT/rejects.jsonl
    DIRECTORY/rejects.jsonl              path, row, reason, message and preview of each bad row
"""

import collections
import dataclasses
import functools
import hashlib
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from absl import logging
from etils import epath

from baichuan_jax.data import readers, sources
from baichuan_jax.data.document import UNKNOWN_LANGUAGE, Document
from baichuan_jax.data.prepare.corpus import DOCUMENT_SCHEMA, whole, write_parquet
from baichuan_jax.data.prepare.engine import Block, Engine, Key, as_json, of_json
from baichuan_jax.data.prepare.language import canonical
from baichuan_jax.data.readers import BadRow, Origin

_BATCH_BYTES = 1 << 21  # of text held as Python's strings before they become Arrow's
_COMPRESSED = (".gz", ".zst", ".parquet")  # to about a quarter
_LABELS = 100  # that are no names: so many are told apart in a task


@dataclasses.dataclass
class IngestConfig:
    """How documents are read, and how many rows may be bad."""

    text_field: str = "text"
    language_field: str = "lang"
    tfds_data_dir: str = ""  # where the TFDS datasets are; empty: TFDS's own default
    # A longer row is a bad one. While it is cleaned, a text of short lines takes 150 times its
    # size of memory.
    max_row_bytes: int = 1 << 22
    shard_bytes: int = 1 << 26  # of text in one shard, before compression
    max_bad_share: float = 0.05  # of the rows; more of them stop the run
    min_bad_rows: int = 20  # so many may be bad whatever their share

    @property
    def options(self) -> readers.Options:
        return readers.Options(
            self.text_field, self.language_field, self.tfds_data_dir, self.max_row_bytes
        )

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong."""
        if not self.text_field:
            raise ValueError("config.ingest.text_field= should name a field of the rows.")
        for name in ("max_row_bytes", "shard_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"config.ingest.{name}={value} must be positive.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"config.ingest.max_bad_share={self.max_bad_share} must be in [0, 1].")
        if self.min_bad_rows < 0:
            raise ValueError(f"config.ingest.min_bad_rows={self.min_bad_rows} must be 0 or more.")


def run(
    directory: epath.PathLike,
    given: str,
    config: IngestConfig,
    engine: Engine,
    max_source_loss: float = 1.0,
) -> dict[str, Any]:
    """Reads sources into the document shards of a corpus.

    Args:
      directory: of the corpus; document shards that it already has are replaced.
      given: the sources, `NAME=PATH,…`: see sources.py.
      max_source_loss: a larger part of a source's rows that is bad stops the run.

    Returns:
      'shards', 'documents', 'bytes' of UTF-8, 'bad_rows', 'reasons' (bad rows, by reason),
      'sources' (documents, bytes and bad rows, by source) and 'languages' ([found, name, rows]
      for what stood for a language and is no name: such a row is kept, as 'und' if all fails).

    Raises:
      ValueError: a source is malformed, absent or without any document; more rows are bad than
        the config, or `max_source_loss`, allows. `rejects.jsonl` is there then, and what was
        read is kept.
    """
    directory = epath.Path(directory)
    items = list(enumerate(groups(sources.origins(given), config.shard_bytes)))
    if not items:
        raise ValueError("No source of text is given: set config.sources.")
    folder = directory / "documents" / "parts"
    results = engine.run("read", items, functools.partial(_read, str(folder), config))
    found = [of_json(block) for _, block in results]
    attempts = [folder / f"{group:05d}" / each["attempt"] for group, each in enumerate(found)]
    if any(attempt.exists() for attempt in attempts):  # else an interrupted run came to its end
        _write_rejects(directory / "rejects.jsonl", attempts)
    told = _sum(found)
    _check(told, found, config, max_source_loss, directory / "rejects.jsonl")
    for label, language, rows in told["languages"]:
        logging.warning("%s rows say %r for their language: %s.", f"{rows:,}", label, language)
    parts = [
        attempt / f"{part:05d}.parquet"
        for attempt, of_group in zip(attempts, found, strict=True)
        for part in range(of_group["parts"])
    ]
    for number, part in enumerate(parts):
        shard = directory / "documents" / f"{number:05d}.parquet"
        if part.exists():
            part.replace(shard)
        elif not shard.exists():  # an interrupted run has not moved it either
            raise ValueError(f"{shard} is missing: delete the scratch folder to read anew.")
    for shard in (directory / "documents").glob("*.parquet"):
        if int(shard.stem) >= len(parts):
            shard.unlink()
    # At once, so that an interruption leaves all parts or none.
    done = directory / "documents" / "parts-done"
    if done.exists():
        done.rmtree()
    if folder.exists():
        folder.replace(done)
        done.rmtree()
    return {"shards": len(parts), **told}


def groups(origins: list[Origin], size: int) -> list[list[Origin]]:
    """Origins that one task reads: neighbours, files of up to `size` bytes together."""
    found: list[list[Origin]] = []
    room = 0
    for origin in origins:
        need = epath.Path(origin.path).stat().length if origin.is_file else size
        need *= 4 if origin.path.endswith(_COMPRESSED) else 1
        if need > room or not found:
            found.append([])
            room = size
        found[-1].append(origin)
        room -= need
    return found


def _read(
    folder: str, config: IngestConfig, item: tuple[int, list[Origin]]
) -> Iterator[tuple[Key, Block]]:
    number, origins = item
    mine, attempt = epath.Path(folder) / f"{number:05d}", uuid.uuid4().hex
    stamp = _stamp(config, origins)
    if (mine / "done.json").exists():
        done = json.loads((mine / "done.json").read_text())
        if done["stamp"] == stamp:
            yield (number,), as_json(done["found"])
            return
    shards = _Shards(mine / attempt, config.shard_bytes)
    with whole(mine / attempt / "rejects.jsonl") as partial, partial.open("w") as rejects:
        counts = _Counts(rejects)
        for origin in origins:
            for row, document, size in _documents(origin, config, counts):
                shards.add(document, size, f"{origin.path}:{row}" if row else origin.path)
    found = {"attempt": attempt, "parts": shards.close(), **counts.told()}
    with whole(mine / "done.json") as partial:
        partial.write_text(json.dumps({"stamp": stamp, "found": found}))
    yield (number,), as_json(found)


def _documents(
    origin: Origin, config: IngestConfig, counts: "_Counts"
) -> Iterator[tuple[int, Document, int]]:
    before, is_code = counts.rows, origin.is_file and origin.path.endswith(readers.CODE_ENDINGS)
    counts.begin(origin)
    if not origin.is_file or epath.Path(origin.path).stat().length:
        for row, document in readers.read(origin, config.options, counts.bad, counts.language):
            if document.language == UNKNOWN_LANGUAGE and is_code:
                document = dataclasses.replace(document, language="code")
            size = len(document.text.encode())
            counts.document(document, size)
            yield row, document, size
    if counts.rows == before:
        counts.bad(BadRow(origin.path, 0, "empty file", "holds no row."))


def _stamp(config: IngestConfig, origins: list[Origin]) -> str:
    """Changes when what a task writes would."""
    files = [epath.Path(origin.path).stat() for origin in origins if origin.is_file]
    seen = [
        [dataclasses.astuple(origin) for origin in origins],
        [(stat.length, stat.mtime) for stat in files],
        dataclasses.astuple(config.options),
        config.shard_bytes,
    ]
    return hashlib.blake2b(json.dumps(seen).encode(), digest_size=16).hexdigest()


class _Shards:
    """Documents -> Parquet files of about `size` bytes of text."""

    def __init__(self, folder: epath.Path, size: int):
        self._folder, self._size = folder, size
        self._rows: list[tuple[str, str, str, str]] = []
        self._batches: list[pa.RecordBatch] = []
        self._waiting = self._bytes = self._files = 0

    def add(self, document: Document, size: int, origin: str) -> None:
        self._rows.append((document.text, document.source, document.language, origin))
        self._waiting += size
        self._bytes += size
        if self._bytes >= self._size:
            self._close_file()
        elif self._waiting >= _BATCH_BYTES:
            self._close_batch()

    def _close_batch(self) -> None:
        columns = [pa.array(column, pa.string()) for column in zip(*self._rows, strict=True)]
        self._batches.append(pa.record_batch(columns, schema=DOCUMENT_SCHEMA))
        self._rows, self._waiting = [], 0

    def _close_file(self) -> None:
        if self._rows:
            self._close_batch()
        path = self._folder / f"{self._files:05d}.parquet"
        write_parquet(path, pa.Table.from_batches(self._batches))
        self._files += 1
        self._batches, self._bytes = [], 0

    def close(self) -> int:
        """Writes the rest; returns the number of files."""
        if self._rows or self._batches:
            self._close_file()
        return self._files


class _Counts:
    """What a task has read so far; it writes the bad rows down."""

    def __init__(self, rejects: Any):
        self._rejects = rejects
        self._source = ""
        self._of_path: collections.Counter[str] = collections.Counter()  # bad rows
        self._reasons: collections.Counter[str] = collections.Counter()
        self._sources: dict[str, collections.Counter[str]] = {}
        self._languages: collections.Counter[tuple[str, str]] = collections.Counter()
        self.rows = 0

    def begin(self, origin: Origin) -> None:
        self._source = origin.source
        if origin.source:
            self._of(origin.source)

    def _of(self, source: str) -> collections.Counter[str]:
        zeros = {"documents": 0, "bytes": 0, "bad_rows": 0}
        return self._sources.setdefault(source, collections.Counter(zeros))

    def document(self, document: Document, size: int) -> None:
        of_source = self._of(document.source)
        of_source["documents"] += 1
        of_source["bytes"] += size
        self.rows += 1

    def language(self, found: Any) -> str:
        """The language for which `found` stands, though it is no name."""
        name = canonical(found.strip()) if isinstance(found, str) else UNKNOWN_LANGUAGE
        name = name if readers.NAME.fullmatch(name) else UNKNOWN_LANGUAGE
        label = (f"{found:.40}" if isinstance(found, str) else f"{found!r:.40}", name)
        if label not in self._languages and len(self._languages) >= _LABELS:
            label = ("others", name)
        self._languages[label] += 1
        return name

    def bad(self, bad: BadRow) -> None:
        self._rejects.write(json.dumps(dataclasses.asdict(bad)) + "\n")
        self._of(self._source)["bad_rows"] += 1
        self._reasons[bad.reason] += 1
        self._of_path[bad.path] += 1
        self.rows += 1

    def told(self) -> dict[str, Any]:
        worst = self._of_path.most_common(1)
        languages = [[*label, rows] for label, rows in self._languages.items()]
        return {
            "worst": worst,
            "reasons": self._reasons,
            "sources": self._sources,
            "languages": languages,
        }


def _sum(found: list[dict]) -> dict[str, Any]:
    reasons: collections.Counter[str] = collections.Counter()
    of_source: dict[str, collections.Counter[str]] = {}
    languages: collections.Counter[tuple[str, str]] = collections.Counter()
    for of_group in found:
        for label, name, rows in of_group["languages"]:
            languages[label, name] += rows
        reasons.update(of_group["reasons"])
        for source, counts in of_group["sources"].items():
            of_source.setdefault(source, collections.Counter()).update(counts)
    total: collections.Counter[str] = collections.Counter()
    for counts in of_source.values():
        total.update(counts)
    sums = {source: dict(counts) for source, counts in of_source.items()}
    return {
        **total,
        "reasons": dict(reasons.most_common()),
        "sources": sums,
        "languages": [[*label, rows] for label, rows in languages.most_common(_LABELS)],
    }


def _check(
    told: dict[str, Any],
    found: list[dict],
    config: IngestConfig,
    max_source_loss: float,
    rejects: epath.Path,
) -> None:
    bad, rows = told["bad_rows"], told["bad_rows"] + told["documents"]
    if bad > config.min_bad_rows and bad > config.max_bad_share * rows:
        worst = max((worst for each in found for worst in each["worst"]), key=lambda pair: pair[1])
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in told["reasons"].items())
        raise ValueError(
            f"{bad:,} of {rows:,} rows cannot be read ({reasons}), more than"
            f" config.ingest.max_bad_share={config.max_bad_share} of them. Most, {worst[1]:,}, are"
            f" in {worst[0]}; all are listed in {rejects}. Mend them, or raise the limit: what was"
            " read is kept."
        )
    for source, counts in told["sources"].items():
        if not counts["documents"]:
            raise ValueError(f"The source {source!r} holds no document at all: see {rejects}.")
        bad, rows = counts["bad_rows"], counts["bad_rows"] + counts["documents"]
        if bad > max_source_loss * rows:
            raise ValueError(
                f"{bad:,} of {rows:,} rows of the source {source!r} cannot be read, more than"
                f" config.max_source_loss={max_source_loss} of them; all are listed in {rejects}."
                " Mend them, or raise the limit: what was read is kept."
            )


def _write_rejects(path: epath.Path, attempts: list[epath.Path]) -> None:
    with whole(path) as partial, partial.open("wb") as file:
        for attempt in attempts:
            with (attempt / "rejects.jsonl").open("rb") as part:
                while block := part.read(1 << 20):
                    file.write(block)
