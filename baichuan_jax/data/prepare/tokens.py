"""The prepared documents -> tokens -> packed rows, in the format of shards.py (§2.1, §2.3).

Tokens are attributes of the documents like any other, so what is sampled how often may change
without tokenising again. Packing counts each document as often as the mixture says, its copies in
later passes over the documents, so that no row holds the same text twice. Held out for 'eval' are
documents by a hash of their text, each once, whatever its count.

A task packs one set (a source in a language) of some neighbouring shards of documents. Which, and
so every row, depends on the documents alone; files get their numbers when all tasks are done.
"""

import collections
import dataclasses
import functools
import itertools
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils import epath

from baichuan_jax.data import packing, shards
from baichuan_jax.data.prepare import mixture
from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.engine import Block, Engine, Key, as_json, of_json
from baichuan_jax.data.prepare.mixture import MixtureConfig, available, rows_of_sets
from baichuan_jax.data.shards import SPLITS, File, Manifest, Part
from baichuan_jax.tokenizer import Tokenizer

TASK_TOKENS = 1 << 27  # of a set, with repeats, that one task packs
_BATCH_BYTES = 1 << 21  # of text given to the tokenizer at a time


@dataclasses.dataclass
class TokensConfig:
    """What rows are made of the documents."""

    sequence_length: int = 4_096
    eval_fraction: float = 0.005  # of the documents, held out by a hash of their text

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong."""
        if self.sequence_length < 1:
            raise ValueError(
                f"config.tokens.sequence_length={self.sequence_length} must be positive."
            )
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"config.tokens.eval_fraction={self.eval_fraction} must be in [0, 1).")


def run(corpus: Corpus, stage: str, engine: Engine, tokenizer: epath.PathLike) -> dict[str, int]:
    """Tokenises every document.

    It writes `tokens` (list of int32, without EOS), `text_bytes` (uint32, of UTF-8), `text_hash`
    (uint64, see `packing.held_out`), and the `reason` "no text" for white space alone.

    Args:
      tokenizer: a SentencePiece .model file that all workers can read.

    Returns:
      'documents', 'bytes' of UTF-8 and 'tokens' (without EOS) of those with text.

    Raises:
      ValueError, FileNotFoundError: from `Tokenizer`.
    """
    Tokenizer(tokenizer)  # here it fails early
    encode = functools.partial(_encode, corpus, stage, os.fspath(tokenizer))
    total = collections.Counter({"documents": 0, "bytes": 0, "tokens": 0})
    for _, block in engine.run("tokens", range(corpus.num_shards()), encode):
        total.update(of_json(block))
    return dict(total)


def encode(texts: pa.ChunkedArray, tokenizer: shards.Tokenizer) -> pa.ListArray:
    """Token ids of texts, int32, without BOM or EOS."""
    sizes = pc.binary_length(texts).to_numpy().cumsum()
    ends = np.searchsorted(sizes, np.arange(_BATCH_BYTES, sizes[-1:].sum(), _BATCH_BYTES)) + 1
    bounds = np.unique([0, *ends.tolist(), len(texts)]).tolist()
    lengths, values = [np.zeros(1, np.int64)], []
    for start, stop in itertools.pairwise(bounds):
        ids = tokenizer.encode_batch(texts.slice(start, stop - start).to_pylist())
        lengths.append(np.array([len(each) for each in ids], np.int64))
        values.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32))
    offsets = np.concatenate(lengths).cumsum().astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([*values, np.zeros(0, np.int32)]))


def pack(
    corpus: Corpus,
    directory: epath.PathLike,
    engine: Engine,
    config: TokensConfig,
    mix: MixtureConfig,
    tokenizer: shards.Tokenizer,
    factors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Packs the documents that are left into `directory`, as `packing.pack` does with sources.

    Args:
      corpus: after `run` and, if documents count, `mixture.run`.
      mix: the sets' weights go into the manifest; see `mixture.set_weights`.
      tokenizer: that of `run`.
      factors: of sources, for the sets' weights; see `mixture.set_weights`.

    Returns:
      'sets': by name and split, `documents`, `utf8_bytes`, `tokens` (an EOS for each document),
      `rows`, each with repeats, and `padding`; 'weights': of the sets, in tokens.

    Raises:
      ValueError: a field is wrong; nothing is left to train on, or nothing was held out.
    """
    config.check()
    mix.check()
    directory = epath.Path(directory)
    counted = bool(available(corpus, ["count"]))
    look = functools.partial(_sizes, corpus, counted)
    sizes = [of_json(b) for _, b in engine.run("sizes", range(corpus.num_shards()), look)]
    items = [*enumerate(_tasks(sizes))]
    parts = directory / "parts"
    make = functools.partial(_pack, corpus, counted, os.fspath(parts), config, tokenizer.eos_id)
    packed = [of_json(block) for _, block in engine.run("rows", items, make)]
    manifest = Manifest(
        directory,
        inputs={
            "prepared": True,  # so nobody packs anew here
            "eval_fraction": config.eval_fraction,
            "tokenizer": tokenizer.fingerprint,
            "sequence_length": config.sequence_length,
        },
    )
    source_of = {name: of_set[2] for of_shard in sizes for name, of_set in of_shard.items()}
    moves: Moves = []
    for (number, (name, _)), found in zip(items, packed, strict=True):
        of_set = manifest.sets.setdefault(name, {split: Part() for split in SPLITS})
        made = parts / f"{number:05d}" / found["attempt"]
        for split in SPLITS:
            moves += _add(found[split], made, of_set[split], directory / name, split)
            of_set[split].padding = of_set[split].empty_share(config.sequence_length + 1)
    _check(manifest, corpus, config)
    trained = {name: of_set["train"] for name, of_set in manifest.sets.items()}
    tokens = {name: part.tokens for name, part in trained.items() if part.rows}
    manifest.weights = mixture.set_weights(tokens, source_of, mix, factors=factors)
    if not _holds(directory, manifest):
        _replace(directory, manifest, moves)
    shards.write(manifest, shards.MANIFEST)
    if parts.exists():
        parts.rmtree()
    return _told(manifest)


def _encode(corpus: Corpus, stage: str, tokenizer: str, shard: int) -> Iterator[tuple[Key, Block]]:
    documents = corpus.read(shard, "text")
    texts = documents["text"]
    empty = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0)
    tokens = encode(texts, Tokenizer(tokenizer))
    hashes = np.fromiter((packing.text_hash(text) for text in texts.to_pylist()), np.uint64)
    reason = pc.if_else(empty, "no text", pa.scalar(None, pa.string()))
    sizes = pc.binary_length(texts).to_numpy().astype(np.uint32)
    attributes = {"reason": reason, "tokens": tokens, "text_bytes": sizes, "text_hash": hashes}
    corpus.write(stage, shard, documents["row"], pa.table(attributes))
    full = ~empty.to_numpy()
    lengths = tokens.value_lengths().to_numpy()
    sums = {"documents": full.sum(), "bytes": sizes[full].sum(), "tokens": lengths[full].sum()}
    yield (shard,), as_json({name: int(value) for name, value in sums.items()})


def _sizes(corpus: Corpus, counted: bool, shard: int) -> Iterator[tuple[Key, Block]]:
    """By set: tokens with repeats, the largest count, and the source."""
    columns = ("tokens", *(("count",) if counted else ()))
    table = corpus.read(shard, "source", "language", *columns)
    lengths = pc.list_value_length(table["tokens"]).to_numpy().astype(np.int64) + 1
    counts = _counts(table, counted)
    found = {}
    for name, rows in rows_of_sets(table).items():
        source = table["source"][int(rows[0])].as_py()
        found[name] = [int(lengths[rows] @ counts[rows]), int(counts[rows].max()), source]
    yield (shard,), as_json(found)


def _counts(table: pa.Table, counted: bool) -> np.ndarray:
    return table["count"].to_numpy().astype(np.int64) if counted else np.ones(len(table), np.int64)


Pieces = list[tuple[int, int]]  # shards, and the largest count there


def _tasks(sizes: Sequence[Mapping[str, list]]) -> list[tuple[str, Pieces]]:
    """Sets by their names, and the neighbouring shards that go together."""
    found = []
    for name in sorted({name for of_shard in sizes for name in of_shard}):
        room = 0
        for shard, of_shard in enumerate(sizes):
            if name in of_shard:
                tokens, most, _ = of_shard[name]
                if tokens > room or not found or found[-1][0] != name:
                    found.append((name, []))
                    room = TASK_TOKENS
                found[-1][1].append((shard, most))
                room -= tokens
    return found


def _pack(
    corpus: Corpus,
    counted: bool,
    parts: str,
    config: TokensConfig,
    eos_id: int,
    item: tuple[int, tuple[str, Pieces]],
) -> Iterator[tuple[Key, Block]]:
    number, (name, pieces) = item
    attempt = uuid.uuid4().hex  # a cluster may do a task twice, even at the same time
    folder = epath.Path(parts) / f"{number:05d}" / attempt
    found = {split: Part() for split in SPLITS}
    writers = {
        split: packing.RowWriter(found[split], folder, split, config.sequence_length)
        for split in SPLITS
    }
    columns = ("tokens", "text_bytes", "text_hash", *(("count",) if counted else ()))
    for copy in range(max(1, *(most for _, most in pieces), 1)):
        for shard, most in pieces:
            if copy and copy >= most:
                continue
            table = corpus.read(shard, "source", "language", *columns)
            rows = rows_of_sets(table)[name]
            counts = _counts(table, counted)[rows]
            eval_ = packing.held_out(table["text_hash"].to_numpy()[rows], config.eval_fraction)
            for split, chosen in (
                ("eval", eval_ & (copy == 0)),
                ("train", ~eval_ & (counts > copy)),
            ):
                for tokens, size in _documents(table, rows[chosen]):
                    writers[split].add(np.append(tokens, eos_id), size)
        writers["train"].flush()  # so a copy never shares a row with its original
    for writer in writers.values():
        writer.close()
    told = {split: dataclasses.asdict(part) for split, part in found.items()}
    yield (number,), as_json({"attempt": attempt, **told})


def _documents(table: pa.Table, rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """The tokens and the bytes of text of some documents."""
    chosen = table.take(pa.array(rows))
    sizes = chosen["text_bytes"].to_pylist()
    lists = chosen["tokens"].combine_chunks()
    offsets, values = lists.offsets.to_pylist(), lists.values.to_numpy()
    for (start, stop), size in zip(itertools.pairwise(offsets), sizes, strict=True):
        yield values[start:stop], size


Moves = list[tuple[epath.Path, epath.Path]]  # from where, and where to


def _add(
    found: Mapping[str, Any], made: epath.Path, part: Part, folder: epath.Path, split: str
) -> Moves:
    """Counts what a task has written into its set; returns its files' ways there."""
    moves = []
    for values in found["files"]:
        file = File(**values)
        old = made / file.name
        file.name = f"rows-{split}.array_record-{len(part.files):05d}"
        part.files.append(file)
        moves.append((old, folder / file.name))
    for field in ("documents", "utf8_bytes", "tokens", "pieces", "rows"):
        setattr(part, field, getattr(part, field) + found[field])
    return moves


def _holds(directory: epath.Path, manifest: Manifest) -> bool:
    """Whether these very rows are there already, whole: they are not taken away for a moment."""
    try:
        return shards.read(directory, shards.MANIFEST).sets == manifest.sets
    except ValueError:
        return False


def _replace(directory: epath.Path, manifest: Manifest, moves: Moves) -> None:
    """All that is in the folder, but for the manifest, which is gone then."""
    for name in (shards.MANIFEST, shards.PARTIAL):
        (directory / name).unlink(missing_ok=True)
    for old, new in moves:
        if old.exists():
            new.parent.mkdir(parents=True, exist_ok=True)
            old.replace(new)
        elif not new.exists():  # an interrupted run has not moved it either
            raise ValueError(f"{new} is missing: delete the scratch folder to pack anew.")
    known = {path for name in manifest.sets for s in SPLITS for path in manifest.paths(name, s)}
    for path in directory.glob("*/rows-*.array_record-*"):
        if path not in known:
            path.unlink()
    for name, of_set in manifest.sets.items():
        shards.write_tfds_metadata(directory / name, of_set)


def _check(manifest: Manifest, corpus: Corpus, config: TokensConfig) -> None:
    if not manifest.total("train", "rows"):
        raise ValueError(
            f"{corpus.directory}: no document is left to train on: see what the stages"
            " dropped, and the weights."
        )
    if config.eval_fraction and not manifest.total("eval", "rows"):
        raise ValueError(
            f"config.tokens.eval_fraction={config.eval_fraction} held out none of the"
            f" {manifest.total('train', 'documents'):,} documents: raise it, or set it to 0."
        )


def _told(manifest: Manifest) -> dict[str, Any]:
    fields = ("documents", "utf8_bytes", "tokens", "rows", "padding")
    return {
        "sets": {
            name: {s: {f: getattr(part, f) for f in fields} for s, part in of_set.items()}
            for name, of_set in manifest.sets.items()
        },
        "weights": manifest.weights,
    }
