"""Takes documents that hold evaluation items out of the corpus.

An item is an object of a JSON file, a line of a JSONL file or a row of a CSV file, whatever its
fields; each string in it, however deep, is looked for by itself, so that neither a long passage
hides a question nor four options in a row. The rule:

  - A field is found in a document when runs of `ngram` tokens that both have cover `coverage` of
    its tokens: a copy stays one with a few words changed, and a book is no copy because a
    question quotes a line of it. Shorter fields, down to `short_ngram` tokens, are found as a
    whole only; still shorter ones are too common to tell anything.
  - A document is dropped when the found fields of one item hold `enough_bytes` bytes of letters
    (in Chinese three a character), or half of that where it is half of the item's text. An
    option or a famous verse alone is less.
  - A field that very many items of a set share (licence, instructions) is not looked for.

How many documents hold an item does not matter: a test set is copied as often as a licence is.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from baichuan_jax.data.prepare import evaluation_sets, text
from baichuan_jax.data.prepare.corpus import Corpus, ids, whole
from baichuan_jax.data.prepare.engine import Block, Engine, Key
from baichuan_jax.data.prepare.evaluation_sets import Files

REASON = "evaluation text: "  # and the set's name
HELD = np.dtype([("document", "<u8"), ("item", "<u4"), ("size", "<u4")])
# A field, its bytes, the n-grams it is looked for by, and how many tokens they are to cover.
FIELD = np.dtype([("item", "<u4"), ("size", "<u4"), ("ngram", "<u4"), ("need", "<u4")])
# An item, where it is from, and how many bytes of it are to be found.
ITEM = np.dtype([("set", "<u4"), ("file", "<u4"), ("number", "<u4"), ("need", "<u4")])
_SHARED = (20, 0.01)  # a field of more items than this, and this part of the set, is boilerplate


@dataclasses.dataclass
class DecontaminateConfig:
    """Which evaluation sets are taken out, and what counts as finding one of their items.

    `against` are sets separated by commas, each `NAME=PATH` or `PATH`: a file, a glob or a
    folder of .jsonl, .json or .csv, with .gz or without. Without a NAME a set is called by its
    file or folder, and the folders in a folder are sets of their own.
    """

    against: str = ""  # empty: nothing to do
    ngram: int = 13  # tokens
    short_ngram: int = 8
    coverage: float = 0.7
    enough_bytes: int = 100

    def check(self) -> None:
        """Reads all sets once; raises a ValueError that names the field, or the file, at fault."""
        if not 0 < self.short_ngram < self.ngram:
            raise ValueError(
                f"config.decontaminate.short_ngram={self.short_ngram} must be positive and below"
                f" config.decontaminate.ngram={self.ngram}."
            )
        if not 0 < self.coverage <= 1:
            raise ValueError(f"config.decontaminate.coverage={self.coverage} must be in (0, 1].")
        if self.enough_bytes < 1:
            raise ValueError(
                f"config.decontaminate.enough_bytes={self.enough_bytes} must be 1 or more."
            )
        if self.against:
            try:
                for _, path in evaluation_sets.files(self.against):
                    collections.deque(evaluation_sets.fields(path), maxlen=0)
            except ValueError as error:
                raise ValueError(f"config.decontaminate.against={self.against}: {error}") from None


def run(corpus: Corpus, stage: str, engine: Engine, config: DecontaminateConfig) -> dict[str, Any]:
    """Drops the documents that hold an item of the evaluation sets.

    It writes `reason`; `evaluation_items` (uint32: how many items the document holds); and
    `evaluation_item` (string: file and number of the one it holds most of, or null).

    Args:
      corpus: the documents as this stage finds them.
      stage: whose attributes are written.
      engine: does the work.
      config: see there.

    Returns:
      For the report, for each set: items; those that are long enough to be found; those seen in
      the corpus; and documents dropped.

    Raises:
      ValueError: a file cannot be read; names it.
    """
    files = evaluation_sets.files(config.against)
    folder = epath.Path(corpus.directory) / "evaluation"
    path = folder / f"{stage}-{_digest(config, files)}.npz"
    if not path.exists():
        _save(_build(config, files), path)
    shards = range(corpus.num_shards())
    results = engine.run(stage, shards, functools.partial(_scan, corpus, stage, str(path)))
    held = np.concatenate([np.empty(0, HELD), *(block for _, block in results)])
    index, sets = _load(str(path)), {}
    for number, name in enumerate(index.sets.tolist()):
        mine = held[index.items["set"][held["item"]] == number]
        of_set = index.items["set"] == number
        sets[name] = {
            "items": int(np.count_nonzero(of_set)),
            "long_enough": int(np.count_nonzero(of_set & index.findable())),
            "seen": len(np.unique(mine["item"])),
            "documents": len(np.unique(mine["document"])),
        }
    return {"sets": sets}


def fingerprint(config: DecontaminateConfig) -> str:
    """A hash of the evaluation files' content and of all that is looked for in them.

    Raises:
      ValueError: `config.against` names no files.
    """
    return _digest(config, evaluation_sets.files(config.against))


def _digest(config: DecontaminateConfig, files: Files) -> str:
    digest = hashlib.blake2b(repr(dataclasses.astuple(config)).encode(), digest_size=16)
    for name, path in files:
        content = path.read_bytes()
        digest.update(f"{name} {path} {len(content)} ".encode() + content)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Index:
    """All n-grams of the evaluation items, and where they stand.

    Shapes: G n-grams, each once; P their places in fields; F fields that are looked for; I items.
    """

    ngrams: np.ndarray  # uint64 [G], rising
    offsets: np.ndarray  # int64 [G + 1]; n-gram g stands at places offsets[g] to offsets[g + 1]
    fields: np.ndarray  # uint32 [P]
    places: np.ndarray  # uint32 [P]: the n-gram's first token in the field
    table: np.ndarray  # FIELD [F]
    items: np.ndarray  # ITEM [I]
    sets: np.ndarray  # names
    files: np.ndarray  # paths

    @functools.cached_property
    def lengths(self) -> list[int]:
        """The n of the n-grams."""
        return np.unique(self.table["ngram"]).tolist()

    @functools.cached_property
    def bloom(self) -> tuple[np.ndarray, np.uint64]:
        """A Bloom filter, so that few n-grams of other texts are searched for at all.

        For each n-gram two bits are set, which its leading and its last bits choose; uint8, and
        how many bits choose.
        """
        size = max(16, (16 * len(self.ngrams)).bit_length())
        marks = np.zeros(1 << size, bool)
        marks[self.ngrams >> np.uint64(64 - size)] = True
        marks[self.ngrams & np.uint64((1 << size) - 1)] = True
        return np.packbits(marks, bitorder="little"), np.uint64(size)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint64 [M] → which of them are n-grams of the index, and which of it: int64 twice."""
        bits, size = self.bloom
        maybe = np.flatnonzero(_bit(bits, hashes >> (np.uint64(64) - size)))
        last = hashes[maybe] & ((np.uint64(1) << size) - np.uint64(1))
        maybe = maybe[np.flatnonzero(_bit(bits, last))]
        place = np.searchsorted(self.ngrams, hashes[maybe])
        place = np.minimum(place, len(self.ngrams) - 1)
        real = self.ngrams[place] == hashes[maybe]
        return maybe[real], place[real]

    def findable(self) -> np.ndarray:
        """bool [I]: the items whose fields are long enough to drop a document."""
        sizes = np.bincount(self.table["item"], self.table["size"], len(self.items))
        return sizes >= self.items["need"]


def build(config: DecontaminateConfig) -> Index:
    """Reads the evaluation sets.

    Raises:
      ValueError: a file cannot be read, or has not the form that its name says; names it.
    """
    return _build(config, evaluation_sets.files(config.against))


def _build(config: DecontaminateConfig, files: Files) -> Index:
    names = sorted({name for name, _ in files})
    items, strings, owners = [], [], []
    for number, (name, path) in enumerate(files):
        for place, fields in evaluation_sets.fields(path):
            strings += fields
            owners += [len(items)] * len(fields)
            items.append((names.index(name), number, place, 0))
    items, owners = np.array(items, ITEM), np.array(owners, np.uint32)
    used = ~_boilerplate(strings, items["set"][owners], np.bincount(items["set"]))

    table, ngrams, fields, places = [np.empty(0, FIELD)], [], [], []
    lengths = (config.ngram, config.short_ngram)
    item_sizes, known = np.zeros(len(items)), 0
    for batch in text.batches(strings):
        joined = text.join(strings[batch])
        tokens = text.tokens(joined)
        size = np.append(0, np.cumsum(_sizes(joined, tokens)))
        count = np.diff(tokens.rows)
        of_field = np.empty(len(count), FIELD)
        of_field["item"], of_field["size"] = owners[batch], np.diff(size[tokens.rows])
        of_field["ngram"] = np.where(count >= config.ngram, *lengths)
        share = np.where(count >= config.ngram, config.coverage, 1.0)
        of_field["need"] = np.ceil(share * count)
        mine = used[batch]
        item_sizes += np.bincount(owners[batch], of_field["size"] * mine, len(items))
        mine = mine & (count >= of_field["ngram"])
        number = known + np.cumsum(mine) - 1
        for length in lengths:
            hashes, rows = text.ngrams(tokens, length)
            field = np.repeat(np.arange(len(mine)), np.diff(rows))
            chosen = (mine & (of_field["ngram"] == length))[field]
            ngrams.append(hashes[chosen])
            fields.append(number[field[chosen]])
            places.append((np.arange(len(hashes)) - rows[field])[chosen])
        table.append(of_field[mine])
        known += np.count_nonzero(mine)
    half = config.enough_bytes / 2
    items["need"] = np.ceil(np.clip(item_sizes / 2, half, config.enough_bytes))
    fields, places = (np.concatenate([[], *parts]) for parts in (fields, places))
    hashes = np.concatenate([np.empty(0, np.uint64), *ngrams])
    order = np.argsort(hashes, kind="stable")
    unique, counts = np.unique(hashes, return_counts=True)
    return Index(
        ngrams=unique,
        offsets=np.append(0, np.cumsum(counts)),
        fields=fields[order].astype(np.uint32),
        places=places[order].astype(np.uint32),
        table=np.concatenate(table),
        items=items,
        sets=np.array(names),
        files=np.array([str(path) for _, path in files]),
    )


def held_items(joined: text.Joined, index: Index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The evaluation items that texts hold.

    Returns:
      int64 [M] three times: the text, the item, and the bytes of it that were found, in the
      order of the texts and items.
    """
    tokens = text.tokens(joined)
    rows, ngrams = [], []
    for length in index.lengths:
        hashes, starts = text.ngrams(tokens, length)
        at, ngram = index.find(hashes)
        rows.append(np.searchsorted(starts, at, "right") - 1)
        ngrams.append(ngram)
    none = np.zeros(0, np.int64)
    row, ngram = np.concatenate([none, *rows]), np.concatenate([none, *ngrams])
    pairs = np.unique(row * len(index.ngrams) + ngram)
    row, ngram = np.divmod(pairs, max(1, len(index.ngrams)))
    # Each n-gram at all places where it stands, in all fields.
    counts = index.offsets[ngram + 1] - index.offsets[ngram]
    shift = np.repeat(index.offsets[ngram] - (np.cumsum(counts) - counts), counts)
    at = np.arange(counts.sum()) + shift
    row, field, place = np.repeat(row, counts), index.fields[at].astype(np.int64), index.places[at]
    order = np.lexsort((place, field, row))
    row, field, place = row[order], field[order], place[order].astype(np.int64)
    if not len(row):
        return none, none, none
    length = index.table["ngram"][field].astype(np.int64)
    last = np.append((row[1:] != row[:-1]) | (field[1:] != field[:-1]), True)
    covers = np.where(last, length, np.minimum(length, np.append(place[1:], 0) - place))
    first = np.flatnonzero(np.append(True, last[:-1]))
    covered = np.add.reduceat(covers, first)
    row, field = row[first], field[first]
    found = covered >= index.table["need"][field]
    # Fields of one item are added up.
    item = index.table["item"][field[found]].astype(np.int64)
    keys, group = np.unique(row[found] * len(index.items) + item, return_inverse=True)
    size = np.bincount(group, index.table["size"][field[found]], len(keys)).astype(np.int64)
    row, item = np.divmod(keys, len(index.items))
    enough = size >= index.items["need"][item]
    return row[enough], item[enough], size[enough]


def _bit(bits: np.ndarray, places: np.ndarray) -> np.ndarray:
    return bits[places >> np.uint64(3)] >> places.astype(np.uint8) % 8 & 1


def _sizes(joined: text.Joined, tokens: text.Tokens) -> np.ndarray:
    """int64 [K]: about the bytes of each token in UTF-8."""
    lengths = tokens.ends - tokens.starts
    return np.where(joined.codes[tokens.starts] >= 0x2E80, 3 * lengths, lengths)


def _boilerplate(strings: list[str], of_set: np.ndarray, items: np.ndarray) -> np.ndarray:
    keys = list(zip(of_set.tolist(), strings, strict=True))
    counts = collections.Counter(keys)
    least, part = _SHARED
    return np.array([counts[key] > max(least, part * items[key[0]]) for key in keys], bool)


def _scan(corpus: Corpus, stage: str, path: str, shard: int) -> Iterator[tuple[Key, Block]]:
    index, table = _load(path), corpus.read(shard, "text")
    texts, rows = table["text"], np.asarray(table["row"])
    parts = [np.empty(0, HELD)]
    for batch in text.batches(texts):
        row, item, size = held_items(text.join(texts[batch]), index)
        parts.append(np.empty(len(row), HELD))
        parts[-1]["document"] = ids(shard, rows[batch][row])
        parts[-1]["item"], parts[-1]["size"] = item, size
    held = np.concatenate(parts)
    owner = np.searchsorted(ids(shard, rows), held["document"])
    best = np.full(len(rows), -1)
    order = np.lexsort((-held["item"].astype(np.int64), held["size"]))
    best[owner[order]] = held["item"][order]  # the largest stands last, of equals the first item
    reasons, names = np.full((2, len(rows)), None)
    for place in np.flatnonzero(best >= 0):
        item = index.items[best[place]]
        reasons[place] = f"{REASON}{index.sets[item['set']]}"
        names[place] = f"{index.files[item['file']]}, item {item['number']}"
    attributes = {
        "reason": pa.array(reasons, pa.string()),
        "evaluation_items": np.bincount(owner, minlength=len(rows)).astype(np.uint32),
        "evaluation_item": pa.array(names, pa.string()),
    }
    corpus.write(stage, shard, rows, pa.table(attributes))
    yield (shard,), held


def _save(index: Index, path: epath.Path) -> None:
    arrays = {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}
    with whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


@functools.lru_cache(maxsize=1)
def _load(path: str) -> Index:
    with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return Index(**arrays)
