"""Documents -> tokens -> pieces of at most T+1 tokens -> packed rows, in shards.

A document is its tokens and an EOS, no BOS. A row gives T training positions: its tokens
and the same shifted by one. A document longer than T+1 is cut into pieces that share one
token, so each step from a token to the next is trained exactly once. Pieces are put into
rows by best fit; the format of the rows is that of shards.py.

T is the sequence length.
"""

import collections
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from baichuan_jax.config import DataConfig
from baichuan_jax.data import shards, sources
from baichuan_jax.data.document import UNKNOWN_LANGUAGE, Document
from baichuan_jax.data.shards import SPLITS, Manifest, Part, Tokenizer

WINDOW_TOKENS = 1 << 23  # packed together; 32 MiB for each set and split
FILE_BYTES = 1 << 28  # of rows in one file, before compression
BATCH_CHARACTERS = 1 << 20  # of text given to the tokenizer at a time


def pack(
    config: DataConfig,
    tokenizer: Tokenizer,
    directory: epath.PathLike,
    *,
    replace: bool = True,
    progress: Callable[[int, int, int], None] = lambda documents, utf8_bytes, tokens: None,
) -> Manifest:
    """Tokenises and packs `config.sources` into a folder of shards.

    A folder that is complete and was made from the same inputs is opened as it is. One that
    was interrupted goes on after the last source it finished. One made from other inputs is
    packed anew, which is logged, or refused without `replace`. The same input gives the
    same files, byte for byte.

    Held out for 'eval' are the documents of `config.eval_sources` or, without any, the share
    `config.eval_fraction` of the documents, chosen by a hash of the text alone: copies of a
    document fall on the same side.

    Args:
      replace: whether complete rows of other inputs may be deleted.
      progress: is called now and then with the documents, bytes and tokens so far.

    Raises:
      ValueError: a source cannot be read; nothing to train on; nothing was held out.
    """
    directory = epath.Path(directory)
    reading = {
        "text_field": config.text_field,
        "language_field": config.language_field,
        "tfds_data_dir": config.tfds_data_dir,
    }
    sources.check(config.sources, **reading)
    if config.eval_sources:
        sources.check(config.eval_sources, **reading)
    inputs = _inputs(config, tokenizer)
    manifest = _resume(directory, inputs, replace)
    if manifest is None:
        return shards.load(directory, tokenizer=tokenizer, sequence_length=config.sequence_length)
    units = [("train", source) for source in inputs["sources"]]
    units += [("eval", source) for source in inputs["eval_sources"]]
    for split, source in units[len(manifest.finished) :]:
        found = sources.documents(source, **reading)
        chosen = ((split if config.eval_sources else _split(d, config), d) for d in found)
        _pack_source(chosen, tokenizer, manifest, progress)
        manifest.finished.append(f"{split} {source}")
        shards.write(manifest, shards.PARTIAL)
    if not manifest.total("train", "rows"):
        raise ValueError(
            f"{', '.join(inputs['sources'])}: no text to train on"
            f" (dropped documents: {manifest.dropped or 'none'})."
        )
    if (config.eval_sources or config.eval_fraction) and not manifest.total("eval", "rows"):
        raise ValueError(
            f"config.data.eval_fraction={config.eval_fraction} held out none of the"
            f" {manifest.total('train', 'documents')} documents: raise it, or name"
            " config.data.eval_sources."
        )
    for name, parts in manifest.sets.items():
        shards.write_tfds_metadata(directory / name, parts)
    shards.write(manifest, shards.MANIFEST)
    (directory / shards.PARTIAL).unlink()
    return manifest


def wait(config: DataConfig, tokenizer: Tokenizer, directory: epath.PathLike) -> None:
    """Returns when another process has packed these inputs into `directory`.

    It looks every few seconds: packing may take hours, and collectives time out in minutes.
    """
    inputs, directory = _inputs(config, tokenizer), epath.Path(directory)
    while not (
        (directory / shards.MANIFEST).exists()
        and shards.read(directory, shards.MANIFEST).inputs == inputs
    ):
        time.sleep(2)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs pieces into rows by best-fit decreasing.

    Args:
      lengths: of the pieces, each from 1 to `capacity`.

    Returns:
      The pieces' indices, row by row; rows are in the order of their first piece.
    """
    rows: list[list[int]] = []
    open_rows = collections.defaultdict(list)  # room that is left -> rows
    rooms = 0  # bit r is set where open_rows[r] is not empty
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the lowest bit: the best fit
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(index)
        open_rows[room - length].append(row)
        rooms |= 1 << (room - length)
    return sorted(map(sorted, rows))


def set_name(source: str, language: str) -> str:
    """The set that a document belongs to."""
    return source if language == UNKNOWN_LANGUAGE else f"{source}.{language}"


def text_hash(text: str) -> int:
    """64 bits that decide whether a document is held out: see `held_out`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def held_out(hashes: int | np.ndarray, eval_fraction: float) -> bool | np.ndarray:
    """Whether documents with these hashes of their texts, of 64 bits, are for 'eval'."""
    return hashes / 2.0**64 < eval_fraction


def _inputs(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    train, held_out = sources.split(config.sources), sources.split(config.eval_sources)
    return {
        "sources": train,
        "eval_sources": held_out,
        "eval_fraction": 0.0 if held_out else config.eval_fraction,
        "files": sources.stamp(train + held_out, config.tfds_data_dir),
        "text_field": config.text_field,
        "language_field": config.language_field,
        "tokenizer": tokenizer.fingerprint,
        "sequence_length": config.sequence_length,
    }


def _resume(directory: epath.Path, inputs: dict[str, Any], replace: bool) -> Manifest | None:
    """What is left to do goes into the manifest returned; None: nothing is."""
    manifest = Manifest(directory, inputs)
    for name in (shards.MANIFEST, shards.PARTIAL):
        if (directory / name).exists():
            old = shards.read(directory, name)
            changed = [key for key, value in inputs.items() if old.inputs.get(key) != value]
            if not changed and name == shards.MANIFEST:
                return None
            if not changed:
                manifest = old
                logging.info("%s: goes on after %s.", directory, "; ".join(old.finished))
                break
            if name == shards.MANIFEST and not replace:
                lines = [f"{key}: {old.inputs.get(key)} -> {inputs[key]}" for key in changed]
                raise ValueError(
                    f"{directory} holds rows that were packed from other inputs:\n"
                    + "\n".join(lines)
                    + "\nUse another folder, or --config.checkpoint.accept_changed_data=true to"
                    " pack anew in this one."
                )
            logging.warning("%s: packed anew, for %s changed since.", directory, ", ".join(changed))
            (directory / name).unlink()
    known = {path for name in manifest.sets for s in SPLITS for path in manifest.paths(name, s)}
    for path in directory.glob("*/rows-*.array_record-*") if directory.exists() else []:
        if path not in known:
            path.unlink()
    return manifest


def _split(document: Document, config: DataConfig) -> str:
    return "eval" if held_out(text_hash(document.text), config.eval_fraction) else "train"


def _pack_source(
    documents: Iterator[tuple[str, Document]],
    tokenizer: Tokenizer,
    manifest: Manifest,
    progress: Callable[[int, int, int], None],
) -> None:
    dropped = collections.Counter(manifest.dropped)
    writers: dict[tuple[str, str], RowWriter] = {}
    for batch in _batches(documents):
        batch_ids = tokenizer.encode_batch([document.text for _, document in batch])
        for (split, document), ids in zip(batch, batch_ids, strict=True):
            if not document.text.strip():
                dropped["white space only" if document.text else "empty"] += 1
                continue
            name = set_name(document.source, document.language)
            if (name, split) not in writers:
                part = manifest.sets.setdefault(name, {s: Part() for s in SPLITS})[split]
                folder = manifest.directory / name
                writers[name, split] = RowWriter(part, folder, split, manifest.sequence_length)
            writers[name, split].add([*ids, tokenizer.eos_id], len(document.text.encode()))
        progress(
            *(
                sum(manifest.total(split, field) for split in SPLITS)
                for field in ("documents", "utf8_bytes", "tokens")
            )
        )
    for writer in writers.values():
        writer.close()
    manifest.dropped = dict(dropped)


def _batches(
    documents: Iterator[tuple[str, Document]],
) -> Iterator[list[tuple[str, Document]]]:
    batch, size = [], 0
    for split, document in documents:
        batch.append((split, document))
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class RowWriter:
    """Documents of one set's split -> files of packed rows, counted in its `Part`.

    Args:
      part: counts what is written; its files' numbers go on from those it has.
      folder: for the files, `rows-SPLIT.array_record-NNNNN`.
    """

    def __init__(self, part: Part, folder: epath.Path, split: str, sequence_length: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._part, self._folder, self._split = part, folder, split
        self._step, self._capacity = sequence_length, sequence_length + 1
        self._window: list[np.ndarray] = []
        self._window_tokens = 0
        self._file: shards.FileWriter | None = None

    def add(self, ids: Sequence[int] | np.ndarray, utf8_bytes: int) -> None:
        """Adds the tokens of a document, its EOS included."""
        tokens = np.array(ids, np.int32)
        for start in range(0, len(tokens) - 1, self._step):
            piece = tokens[start : start + self._capacity]
            self._window.append(piece)
            self._window_tokens += len(piece)
        self._part.documents += 1
        self._part.utf8_bytes += utf8_bytes
        self._part.tokens += len(tokens)
        if self._window_tokens >= WINDOW_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Packs what waits; documents added before and after do not share a row."""
        part = self._part
        for row in best_fit([len(piece) for piece in self._window], self._capacity):
            pieces = [self._window[index] for index in row]
            if self._file is None:
                name = f"rows-{self._split}.array_record-{len(part.files):05d}"
                self._file = shards.FileWriter(self._folder / name)
            part.rows += 1
            if self._file.write(shards.encode_row(pieces)) >= FILE_BYTES:
                self._close_file()
        part.pieces += len(self._window)
        part.padding = part.empty_share(self._capacity)
        self._window, self._window_tokens = [], 0

    def _close_file(self) -> None:
        self._part.files.append(self._file.close())
        self._file = None

    def close(self) -> None:
        """Packs the rest and closes the last file."""
        self.flush()
        if self._file:
            self._close_file()
