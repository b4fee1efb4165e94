"""Near-duplicate documents, by MinHash-LSH with every verdict checked (§2.1).

    candidates   documents that meet in a bucket: they agree on a band of their sketches
    edges        candidates whose signatures are as similar as the threshold asks
    clusters     connected by edges; in each the longest document is kept, and stands for the
                 members that are similar to it, not only to a neighbour. Of those that are not
                 the longest is kept, and so on.

A bucket only proposes and a chain of edges only gathers: what removes a document is its own
similarity to the one that is kept. Documents without any token are never duplicates.

Signatures lie beside the attribute tables, in `00000.signatures.npy` of each shard, 168 bytes a
document. The connected components are found in one process: 2^31 documents at most.
"""

import dataclasses
import functools
import io
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath
from scipy import sparse
from scipy.sparse import csgraph

from baichuan_jax.data.prepare import minhash, text
from baichuan_jax.data.prepare.corpus import Corpus, ids, whole
from baichuan_jax.data.prepare.engine import Block, Engine, Key, as_json, of_json, partitions

REASON = "near duplicate"
# A bucket of up to so many documents makes candidates of all its pairs. A bigger one, only of
# each with the first and with the next: as many pairs, at most, for each document.
SMALL_BUCKET = 24
_SHARDS_PER_RANGE = 256  # band keys of about so many shards are grouped by one worker
_MEMBERS_PER_PART = 1 << 18  # of clusters, settled by one worker
_LARGEST, _EXAMPLES = 20, 5  # clusters in the report, and their members

_EDGES, _COUNT, _MEMBERS, _WRITE, _REPORT = range(5)  # what a key begins with

_KEYED = np.dtype([("key", np.uint64), ("id", np.uint64)])
_PAIR = np.dtype([("low", np.uint64), ("high", np.uint64)])
_SIGNATURE = (np.uint8, (minhash.PERMUTATIONS,))
_CHECK = np.dtype([("low", np.uint64), ("high", np.uint64), ("signature", *_SIGNATURE)])
_STORED = np.dtype([("row", np.uint32), ("characters", np.uint32), ("signature", *_SIGNATURE)])
_MEMBER = np.dtype(
    [
        *(("cluster", np.int64), ("id", np.uint64), ("characters", np.uint32)),
        ("signature", *_SIGNATURE),
    ]
)
_VERDICT = np.dtype([("id", np.uint64), ("kept", np.uint64), ("size", np.uint32)])


@dataclasses.dataclass
class DocumentsConfig:
    """When two documents count as the same."""

    threshold: float = 0.75  # estimated Jaccard similarity of 5-token shingles
    simplify: bool = False  # traditional Chinese counts as the same as simplified


def run(
    corpus: Corpus, stage: str, engine: Engine, config: DocumentsConfig, seed: int = 0
) -> dict[str, Any]:
    """Writes the attributes of all documents.

    They are `reason`; `duplicate_of` (uint64), the id of the kept document, for removed ones;
    `cluster_size` (uint32), of how many documents the kept one stands for, itself included: 1
    for a document like no other.

    Args:
      corpus: what the stages before this one kept.
      stage: the name of the attributes.
      engine: runs it.
      config: see there.
      seed: not used; nothing here is drawn at random.

    Returns:
      candidates, edges: numbers of pairs of documents.
      clusters: number of kept documents that stand for others.
      largest: up to 20 clusters, each with the `kept` id, its `size`, and ids of some `members`.

    Raises:
      ValueError: the threshold is no similarity.
    """
    if not 0 < config.threshold <= 1:
        raise ValueError(
            f"{stage}: threshold={config.threshold} should be a Jaccard similarity, above 0 and"
            " at most 1."
        )
    candidates, edges = find_edges(corpus, stage, engine, config)
    members, clusters = components(edges)
    parts = 1 + len(members) // _MEMBERS_PER_PART
    starts = np.arange(corpus.num_shards() + 1, dtype=np.uint64) << np.uint64(32)
    cuts = np.searchsorted(members, starts)
    items = [
        (shard, members[start:stop], clusters[start:stop])
        for shard, (start, stop) in enumerate(itertools.pairwise(cuts))
    ]
    reports = engine.run(
        f"{stage}-clusters",
        items,
        functools.partial(_members, corpus=corpus, stage=stage, parts=parts),
        functools.partial(_settle, threshold=config.threshold),
        functools.partial(_write, corpus=corpus, stage=stage),
    )
    reports = [of_json(block) for _, block in reports]
    largest = sorted(
        (cluster for report in reports for cluster in report["largest"]),
        key=lambda cluster: (-cluster["size"], cluster["kept"]),
    )
    return {
        "candidates": candidates,
        "edges": len(edges),
        "clusters": sum(report["clusters"] for report in reports),
        "largest": largest[:_LARGEST],
    }


def find_edges(
    corpus: Corpus, stage: str, engine: Engine, config: DocumentsConfig
) -> tuple[int, np.ndarray]:
    """Sketches all documents, and checks those that meet.

    Returns:
      The number of different pairs checked, and the ids of those that are similar enough:
      uint64 [E, 2], the lower id first, in order.
    """
    ranges = partitions(corpus.num_shards(), _SHARDS_PER_RANGE)
    found = engine.run(
        f"{stage}-edges",
        range(corpus.num_shards()),
        functools.partial(_sketch, corpus=corpus, stage=stage, config=config, ranges=ranges),
        _meet,
        functools.partial(_send, corpus=corpus, stage=stage),
        functools.partial(_check, corpus=corpus, stage=stage, threshold=config.threshold),
    )
    edges = [block for (kind,), block in found if kind == _EDGES]
    edges = np.concatenate([np.zeros((0, 2), np.uint64), *edges])
    count = sum(int(block.sum()) for (kind,), block in found if kind == _COUNT)
    return count, edges[np.lexsort((edges[:, 1], edges[:, 0]))]


def candidate_pairs(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Pairs of documents with the same key: all in a small bucket, a star and a chain in a big one.

    Args:
      keys: uint64 [K], the keys of one band.
      documents: uint64 [K], ids; each once.

    Returns:
      `_PAIR` [P], the lower id first. The order of a big bucket is another one for each key,
      so that the bands together connect a document to many others.
    """
    order = np.argsort(keys)
    ordered = keys[order]
    equal = ordered[1:] == ordered[:-1]
    shared = np.zeros(len(keys), bool)
    shared[1:] |= equal
    shared[:-1] |= equal
    keys, documents = ordered[shared], documents[order[shared]]
    order = np.lexsort((text.mix(documents ^ keys), keys))
    keys, documents = keys[order], documents[order]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    sizes = np.diff(np.append(starts, len(keys)))
    place = np.arange(len(keys)) - np.repeat(starts, sizes)
    left = np.repeat(sizes, sizes) - 1 - place  # documents after this one in its bucket
    big = np.repeat(sizes > SMALL_BUCKET, sizes)
    first, second = [], []
    for distance in range(1, SMALL_BUCKET):
        near = np.flatnonzero((left >= distance) & (~big | (distance == 1)))
        first.append(near)
        second.append(near + distance)
    first.append(np.repeat(starts, sizes)[big & (place > 1)])
    second.append(np.flatnonzero(big & (place > 1)))
    first, second = documents[np.concatenate(first)], documents[np.concatenate(second)]
    pairs = np.empty(len(first), _PAIR)
    pairs["low"], pairs["high"] = np.minimum(first, second), np.maximum(first, second)
    return pairs


def components(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected components: edges uint64 [E, 2] → the nodes in order, the component of each."""
    nodes, places = np.unique(edges, return_inverse=True)
    places = places.reshape(edges.shape)
    ones = np.ones(len(edges), np.int8)
    graph = sparse.coo_array((ones, (places[:, 0], places[:, 1])), shape=(len(nodes),) * 2)
    return nodes, csgraph.connected_components(graph, directed=False)[1].astype(np.int64)


def kept_documents(members: np.ndarray, threshold: float) -> np.ndarray:
    """For each member of a cluster the id of the document that stands for it, maybe its own.

    Args:
      members: `_MEMBER` [K], whole clusters.
      threshold: estimated similarity to the kept document.

    Returns:
      uint64 [K].
    """
    kept = members["id"].copy()
    longest_first = -members["characters"].astype(np.int64)
    left = np.lexsort((members["id"], longest_first, members["cluster"]))
    while len(left):
        cluster = members["cluster"][left]
        first = np.append(True, cluster[1:] != cluster[:-1])
        root = left[first][np.cumsum(first) - 1]
        signatures = members["signature"]
        like = minhash.similarity(signatures, left, signatures, root) >= threshold
        like |= first
        kept[left[like]] = members["id"][root[like]]
        left = left[~like]
    return kept


def _sketch(
    shard: int, corpus: Corpus, stage: str, config: DocumentsConfig, ranges: int
) -> Iterator[tuple[Key, Block]]:
    """Writes the signatures of a shard; gives its keys, by band and range of keys."""
    table = corpus.read(shard, "text")
    sketches = minhash.sketch(table["text"], config.simplify)
    used = ~sketches.empty
    stored = np.empty(np.count_nonzero(used), _STORED)
    stored["row"] = table["row"].to_numpy()[used]
    stored["characters"] = sketches.characters[used]
    stored["signature"] = sketches.signatures[used]
    with whole(_signature_path(corpus, stage, shard)) as path:
        buffer = io.BytesIO()
        np.save(buffer, stored, allow_pickle=False)
        path.write_bytes(buffer.getvalue())
    documents, keys = ids(shard, stored["row"]), sketches.keys[used]
    for band in range(minhash.BANDS):
        block = np.empty(len(stored), _KEYED)
        block["key"], block["id"] = keys[:, band], documents
        ranges_of = block["key"] % np.uint64(ranges)
        for number in range(ranges):
            yield (band, number), block[ranges_of == number]


def _meet(key: Key, blocks: list[Block]) -> Iterator[tuple[Key, Block]]:
    """Candidates of a band and range, by the shard of the lower id."""
    keyed = np.concatenate(blocks)
    yield from _by_shard(candidate_pairs(keyed["key"], keyed["id"]), "low")


def _send(key: Key, blocks: list[Block], corpus: Corpus, stage: str) -> Iterator[tuple[Key, Block]]:
    """Each candidate once, with the signature of the lower id, by the shard of the higher."""
    pairs = np.concatenate(blocks)
    pairs = pairs[np.lexsort((pairs["low"], pairs["high"]))]
    pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
    stored = _stored(corpus, stage, key[0])
    for shard, some in _by_shard(pairs, "high"):
        checks = np.empty(len(some), _CHECK)
        checks["low"], checks["high"] = some["low"], some["high"]
        checks["signature"] = stored["signature"][_places(stored, some["low"])]
        yield shard, checks


def _check(
    key: Key, blocks: list[Block], corpus: Corpus, stage: str, threshold: float
) -> Iterator[tuple[Key, Block]]:
    """The candidates that are similar enough, and how many were checked."""
    stored = _stored(corpus, stage, key[0])
    for block in blocks:
        places = _places(stored, block["high"])
        own = np.arange(len(block))
        similar = minhash.similarity(block["signature"], own, stored["signature"], places)
        edges = block[similar >= threshold]
        yield (_EDGES,), np.stack([edges["low"], edges["high"]], axis=1)
        yield (_COUNT,), np.array([len(block)])


def _members(
    item: tuple[int, np.ndarray, np.ndarray], corpus: Corpus, stage: str, parts: int
) -> Iterator[tuple[Key, Block]]:
    """The members of clusters with their signatures, by part of the clusters."""
    shard, documents, clusters = item
    stored = _stored(corpus, stage, shard)
    stored = stored[_places(stored, documents)]
    members = np.empty(len(documents), _MEMBER)
    members["cluster"], members["id"] = clusters, documents
    members["characters"], members["signature"] = stored["characters"], stored["signature"]
    for part in range(parts):
        yield (_MEMBERS, part), members[clusters % parts == part]
    yield (_WRITE, shard), np.zeros(0, _VERDICT)  # every shard gets its attributes


def _settle(key: Key, blocks: list[Block], threshold: float) -> Iterator[tuple[Key, Block]]:
    """Which document stands for which, by shard; and the largest clusters."""
    if key[0] == _WRITE:
        yield key, blocks[0]
        return
    members = np.concatenate(blocks)
    verdicts = np.empty(len(members), _VERDICT)
    verdicts["id"], verdicts["kept"] = members["id"], kept_documents(members, threshold)
    kept, inverse, sizes = np.unique(verdicts["kept"], return_inverse=True, return_counts=True)
    verdicts["size"] = sizes[inverse]
    for (shard,), some in _by_shard(verdicts, "id"):
        yield (_WRITE, shard), some
    report = {"clusters": int(np.count_nonzero(sizes > 1)), "largest": []}
    largest = np.lexsort((kept, -sizes))[:_LARGEST]
    for place in largest[sizes[largest] > 1]:
        others = np.sort(verdicts["id"][(inverse == place) & (verdicts["id"] != kept[place])])
        report["largest"].append(
            {
                "kept": int(kept[place]),
                "size": int(sizes[place]),
                "members": others[:_EXAMPLES].tolist(),
            }
        )
    yield (_REPORT, key[1]), as_json(report)


def _write(
    key: Key, blocks: list[Block], corpus: Corpus, stage: str
) -> Iterator[tuple[Key, Block]]:
    if key[0] == _REPORT:
        yield key, blocks[0]
        return
    shard, verdicts = key[1], np.concatenate(blocks)
    rows = corpus.read(shard)["row"].to_numpy()
    of_row = np.searchsorted(rows, (verdicts["id"] & np.uint64(0xFFFFFFFF)).astype(np.uint32))
    sizes, kept = np.ones(len(rows), np.uint32), ids(shard, rows)
    sizes[of_row], kept[of_row] = verdicts["size"], verdicts["kept"]
    stays = kept == ids(shard, rows)
    attributes = pa.table(
        {
            "reason": pa.array(np.full(len(rows), REASON), pa.string(), mask=stays),
            "duplicate_of": pa.array(kept, mask=stays),
            "cluster_size": pa.array(sizes),
        }
    )
    corpus.write(stage, shard, rows, attributes)
    yield from ()


def _by_shard(records: np.ndarray, field: str) -> Iterator[tuple[Key, Block]]:
    """The records in groups of the same shard in the ids of a field."""
    shards = (records[field] >> np.uint64(32)).astype(np.int64)
    order = np.argsort(shards, kind="stable")
    records, shards = records[order], shards[order]
    cuts = np.flatnonzero(shards[1:] != shards[:-1]) + 1
    for group in np.split(records, cuts):
        if len(group):
            yield (int(group[field][0] >> np.uint64(32)),), group


def _places(stored: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Where the ids of a shard's documents stand among its stored signatures."""
    rows = (documents & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return np.searchsorted(stored["row"], rows)


def _stored(corpus: Corpus, stage: str, shard: int) -> np.ndarray:
    content = _signature_path(corpus, stage, shard).read_bytes()
    return np.load(io.BytesIO(content), allow_pickle=False)


def _signature_path(corpus: Corpus, stage: str, shard: int) -> epath.Path:
    return corpus.attribute_path(stage, shard).with_suffix(".signatures.npy")
