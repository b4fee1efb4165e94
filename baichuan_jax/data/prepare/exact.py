"""Exact deduplication (§2.1): of documents with the same bytes the first one stays.

Documents are compared by 128-bit BLAKE2b hashes of their UTF-8: among 10^12 documents the
chance that any two different ones share a hash is below 10^-14. The hashes are spread over
partitions by their value, so no worker sees them all.
"""

import dataclasses
import functools
import hashlib
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from baichuan_jax.data.prepare.corpus import Corpus, ids, row_of, shard_of
from baichuan_jax.data.prepare.engine import Block, Engine, Key, as_json, of_json, partitions
from baichuan_jax.data.prepare.groups import by_key

REASON = "exact duplicate"
HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u8")])
COPY = np.dtype([("document", "<u8"), ("kept", "<u8"), ("copies", "<u4")])


@dataclasses.dataclass
class ExactConfig:
    """Exact deduplication has nothing to choose but the length of its report."""

    largest: int = 20  # groups of copies that the report names

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong."""
        if self.largest < 0:
            raise ValueError(f"config.exact.largest={self.largest} must be 0 or more.")


def run(corpus: Corpus, stage: str, engine: Engine, config: ExactConfig) -> dict[str, Any]:
    """Drops every document but the first, by its id, of those with the same bytes.

    It writes `reason`; `copies` (uint32, of kept documents: how many, itself included, it
    stands for); and `copy_of` (uint64, of dropped ones: the id of the one that is kept).

    Args:
      corpus: the documents as this stage finds them.
      stage: whose attributes are written.
      engine: does the work.
      config: see there.

    Returns:
      For the report: the number of groups, and the largest ones by the kept document's id.
    """
    shards = corpus.num_shards()
    results = engine.run(
        stage,
        range(shards),
        functools.partial(_hash, corpus, partitions(shards, 256)),
        functools.partial(_compare, shards),
        functools.partial(_write, corpus, stage, config.largest),
    )
    found = [of_json(block) for _, block in results]
    largest = [group for part in found for group in part["largest"]]
    largest.sort(key=operator.itemgetter("copies"), reverse=True)
    groups = sum(part["groups"] for part in found)
    return {"groups": groups, "largest": largest[: config.largest]}


def hash_texts(texts: pa.ChunkedArray) -> np.ndarray:
    """The 128-bit hashes of texts: uint64 [N, 2]. A null counts as an empty text."""
    digests = (
        hashlib.blake2b(text.as_buffer() if text.is_valid else b"", digest_size=16).digest()
        for text in texts
    )
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def copies(hashed: np.ndarray) -> np.ndarray:
    """Finds the documents whose hash another one shares.

    Args:
      hashed: HASHED [N], in any order.

    Returns:
      COPY [M], by document: each document of a group, the one of the group that is kept (of
      the smallest id, which may be the document itself), and the size of the group.
    """
    ordered = hashed[np.lexsort((hashed["document"], hashed["low"], hashed["high"]))]
    differs = np.ones(len(ordered), bool)
    differs[1:] = False
    for part in ("high", "low"):
        differs[1:] |= ordered[part][1:] != ordered[part][:-1]
    starts = np.flatnonzero(differs)
    sizes = np.diff(starts, append=len(ordered))
    found = np.empty(len(ordered), COPY)
    found["document"] = ordered["document"]
    found["kept"] = np.repeat(ordered["document"][starts], sizes)
    found["copies"] = np.repeat(sizes, sizes)
    found = found[found["copies"] > 1]
    return found[np.argsort(found["document"])]


def _hash(corpus: Corpus, ranges: int, shard: int) -> Iterator[tuple[Key, Block]]:
    table = corpus.read(shard, "text")
    hashed = np.empty(len(table), HASHED)
    hashed["high"], hashed["low"] = hash_texts(table["text"]).T
    hashed["document"] = ids(shard, table["row"])
    for number in range(ranges):
        yield (number,), hashed[hashed["low"] % np.uint64(ranges) == number]


def _compare(shards: int, key: Key, blocks: list[Block]) -> Iterator[tuple[Key, Block]]:
    found = copies(np.concatenate(blocks))
    parts = dict(by_key(shard_of(found["document"]), found))
    for shard in range(shards):  # all of them: each is to write its table
        yield (shard,), parts.get(shard, found[:0])


def _write(
    corpus: Corpus, stage: str, largest: int, key: Key, blocks: list[Block]
) -> Iterable[tuple[Key, Block]]:
    (shard,) = key
    found = np.concatenate(blocks)
    rows = np.asarray(corpus.read(shard)["row"])
    places = np.searchsorted(rows, row_of(found["document"]))
    dropped = np.zeros(len(rows), bool)
    counts, kept = np.ones(len(rows), np.uint32), np.zeros(len(rows), np.uint64)
    dropped[places] = found["document"] != found["kept"]
    counts[places], kept[places] = found["copies"], found["kept"]
    attributes = {
        "reason": pa.array(np.where(dropped, REASON, None), pa.string()),
        "copies": pa.array(counts, mask=dropped),
        "copy_of": pa.array(kept, mask=~dropped),
    }
    corpus.write(stage, shard, rows, pa.table(attributes))
    groups = np.sort(found[found["document"] == found["kept"]], order="document")
    top = groups[np.argsort(-groups["copies"].astype(np.int64), kind="stable")[:largest]]
    named = [{"document": int(g["document"]), "copies": int(g["copies"])} for g in top]
    yield key, as_json({"groups": len(groups), "largest": named})
