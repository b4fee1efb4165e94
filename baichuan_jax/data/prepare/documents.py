"""Near-duplicate documents, by MinHash-LSH with every verdict checked (§2.1).

    candidates   documents that meet in a bucket: they agree on a band of their sketches
    edges        candidates whose signatures are as similar as the threshold asks
    clusters     connected by edges; in each the longest document is kept, and stands for the
                 members that are similar to it, not only to a neighbour. Of those that are not
                 the longest is kept, and so on.

A bucket only proposes and a chain of edges only gathers: what removes a document is its own
similarity to the one that is kept. Documents without any token are never duplicates.

Signatures lie in `DIRECTORY/signatures/STAGE/00000.npy`, 168 bytes a document. The connected
components are found in one process, 2^31 documents at most, from a spanning forest of the edges:
an edge at most for each document and worker. A component is settled by one worker, which holds
180 bytes for each of its documents.
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
from baichuan_jax.data.prepare.corpus import Corpus, ids, row_of, shard_of, whole
from baichuan_jax.data.prepare.engine import Block, Engine, Key, as_json, of_json, partitions
from baichuan_jax.data.prepare.groups import by_key

REASON = "near duplicate"
# A bucket of up to so many documents makes candidates of all its pairs. In a bigger one each is
# paired with the next, and with the first of its `_STAR`: two pairs at most for each document.
SMALL_BUCKET = 8
_STAR = 1 << 10  # so that no document, and no worker, gets the pairs of a whole template
_ROWS_PER_PART = 15  # as a power of two: a worker checks the pairs of so many rows of a shard
_CHECKED = 1 << 14  # pairs in a block, with a signature of each: 3 MB
_DENSE = 1 << 8  # documents of a cluster, from which on it is settled by itself
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

    def check(self) -> None:
        """Raises ValueError: the threshold is no similarity."""
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"config.documents.threshold={self.threshold} should be a Jaccard similarity,"
                " above 0 and at most 1."
            )


def run(corpus: Corpus, stage: str, engine: Engine, config: DocumentsConfig) -> dict[str, Any]:
    """Writes the attributes of all documents.

    They are `reason`; `duplicate_of` (uint64), the id of the kept document, for removed ones;
    `cluster_size` (uint32), of how many documents the kept one stands for, itself included: 1
    for a document like no other.

    Args:
      corpus: what the stages before this one kept.
      stage: the name of the attributes.
      engine: runs it.
      config: see there.

    Returns:
      candidates, edges: numbers of pairs of documents, checked and similar enough.
      clusters: number of kept documents that stand for others.
      largest: up to 20 clusters, each with the `kept` id, its `size`, and ids of some `members`.

    Raises:
      ValueError: as `config.check`.
    """
    config.check()
    candidates, edges, forest = find_edges(corpus, stage, engine, config)
    members, clusters = components(forest)
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
        "edges": edges,
        "clusters": sum(report["clusters"] for report in reports),
        "largest": largest[:_LARGEST],
    }


def find_edges(
    corpus: Corpus, stage: str, engine: Engine, config: DocumentsConfig
) -> tuple[int, int, np.ndarray]:
    """Sketches all documents, and checks those that meet.

    Returns:
      The number of different pairs checked; of those that are similar enough; and of these as
      many as connect what they all connect (`spanning`): ids, uint64 [E, 2], the lower one
      first, in order.
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
    forest = [block for (kind,), block in found if kind == _EDGES]
    forest = np.concatenate([np.zeros((0, 2), np.uint64), *forest])
    counts = [block for (kind,), block in found if kind == _COUNT]
    checked, edges = np.sum([np.zeros(2, int), *counts], axis=0).tolist()
    return checked, edges, forest[np.lexsort((forest[:, 1], forest[:, 0]))]


def candidate_pairs(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Pairs of documents with the same key: all in a small bucket, stars and a chain in a big one.

    Args:
      keys: uint64 [K], the keys of one band.
      documents: uint64 [K], ids; each once.

    Returns:
      `_PAIR` [P], the lower id first. The order of a big bucket's documents is drawn, and is the
      same for every key: so those of one template make the same pairs in most bands.
    """
    order = np.argsort(keys)
    ordered = keys[order]
    equal = ordered[1:] == ordered[:-1]
    shared = np.zeros(len(keys), bool)
    shared[1:] |= equal
    shared[:-1] |= equal
    keys, documents = ordered[shared], documents[order[shared]]
    order = np.lexsort((text.mix(documents), keys))
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
    ray = np.flatnonzero(big & (place % _STAR > 1))  # what follows its centre is in the chain
    first.append(ray - place[ray] % _STAR)
    second.append(ray)
    first, second = documents[np.concatenate(first)], documents[np.concatenate(second)]
    pairs = np.empty(len(first), _PAIR)
    pairs["low"], pairs["high"] = np.minimum(first, second), np.maximum(first, second)
    return pairs


def components(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected components: edges uint64 [E, 2] → the nodes in order, the component of each."""
    nodes, graph = _graph(edges)
    return nodes, csgraph.connected_components(graph, directed=False)[1].astype(np.int64)


def spanning(edges: np.ndarray) -> np.ndarray:
    """Edges, uint64 [E, 2] → such of them as have the same components and no circle."""
    nodes, graph = _graph(edges)
    forest = csgraph.minimum_spanning_tree(graph).tocoo()
    return np.sort(np.stack([nodes[forest.row], nodes[forest.col]], axis=1), axis=1)


def _graph(edges: np.ndarray) -> tuple[np.ndarray, sparse.csr_array]:
    nodes, places = np.unique(edges, return_inverse=True)
    places = places.reshape(edges.shape)
    ones = np.ones(len(edges), np.int8)
    graph = sparse.coo_array((ones, (places[:, 0], places[:, 1])), shape=(len(nodes),) * 2)
    return nodes, graph.tocsr()


def kept_documents(members: np.ndarray, threshold: float) -> np.ndarray:
    """For each member of a cluster the id of the document that stands for it, maybe its own.

    Args:
      members: `_MEMBER` [K], whole clusters.
      threshold: estimated similarity to the kept document.

    Returns:
      uint64 [K].
    """
    kept = members["id"].copy()
    signatures = members["signature"]
    longest_first = -members["characters"].astype(np.int64)
    left = np.lexsort((members["id"], longest_first, members["cluster"]))
    while len(left):
        cluster = members["cluster"][left]
        first = np.append(True, cluster[1:] != cluster[:-1])
        if len(left) > _DENSE * np.count_nonzero(first):
            for own in np.split(left, np.flatnonzero(first)[1:]):
                kept[own] = members["id"][own[minhash.leaders(signatures[own], threshold)]]
            break
        root = left[first][np.cumsum(first) - 1]  # one for each cluster, all at the same time
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
    """Candidates of a band and range, by the part of a shard that has the lower id."""
    keyed = np.concatenate(blocks)
    yield from _by_part(candidate_pairs(keyed["key"], keyed["id"]), "low")


def _send(key: Key, blocks: list[Block], corpus: Corpus, stage: str) -> Iterator[tuple[Key, Block]]:
    """Each candidate once, with the signature of the lower id, by the part of the higher."""
    pairs = np.concatenate(blocks)
    pairs = pairs[np.lexsort((pairs["low"], pairs["high"]))]
    pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
    stored = _stored(corpus, stage, key[0])
    for part, group in _by_part(pairs, "high"):
        for start in range(0, len(group), _CHECKED):
            some = group[start : start + _CHECKED]
            checks = np.empty(len(some), _CHECK)
            checks["low"], checks["high"] = some["low"], some["high"]
            checks["signature"] = stored["signature"][_places(stored, some["low"])]
            yield part, checks


def _check(
    key: Key, blocks: list[Block], corpus: Corpus, stage: str, threshold: float
) -> Iterator[tuple[Key, Block]]:
    """Of the candidates that are similar enough a forest, and how many were checked and are."""
    stored = _stored(corpus, stage, key[0])
    edges = []
    for block in blocks:
        places = _places(stored, block["high"])
        own = np.arange(len(block))
        similar = minhash.similarity(block["signature"], own, stored["signature"], places)
        found = block[similar >= threshold]
        edges.append(np.stack([found["low"], found["high"]], axis=1))
    edges = np.concatenate(edges)
    yield (_EDGES,), spanning(edges)
    yield (_COUNT,), np.array([sum(map(len, blocks)), len(edges)])


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
    for shard, some in by_key(shard_of(verdicts["id"]), verdicts):
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
    of_row = np.searchsorted(rows, row_of(verdicts["id"]))
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


def _by_part(pairs: np.ndarray, field: str) -> Iterator[tuple[Key, Block]]:
    """The pairs by the shard of the ids of a field, and which part of the shard has them."""
    parts = pairs[field] >> np.uint64(_ROWS_PER_PART)
    in_shard = 32 - _ROWS_PER_PART
    for part, group in by_key(parts, pairs):
        yield (part >> in_shard, part & ((1 << in_shard) - 1)), group


def _places(stored: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Where the ids of a shard's documents stand among its stored signatures."""
    return np.searchsorted(stored["row"], row_of(documents))


def _stored(corpus: Corpus, stage: str, shard: int) -> np.ndarray:
    content = _signature_path(corpus, stage, shard).read_bytes()
    return np.load(io.BytesIO(content), allow_pickle=False)


def _signature_path(corpus: Corpus, stage: str, shard: int) -> epath.Path:
    return epath.Path(corpus.directory) / "signatures" / stage / f"{shard:05d}.npy"
