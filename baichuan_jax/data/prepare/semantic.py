"""Semantic deduplication (§2.1): documents that say the same, found inside clusters.

Embeddings (embed.py, or pooled.py by a model), k-means (kmeans.py), then in each cluster the
rule of SemDeDup (arXiv 2303.09540): the documents stand in a row, the farthest from the
centroid first, and each is as redundant as its highest cosine with one that stands before it.
Above 1 − ε it is a semantic duplicate. By default they are scored and kept: the cosine of an
embedding is a weaker proof than the n-grams of documents.py.

Attributes: `cluster_id` (uint32), `cluster_documents` (uint32, the cluster's size),
`semantic_similarity` (float32, the highest cosine with an earlier document; null for the
first) and `nearest` (uint64, that document's id).

A cluster of more than GROUP documents is compared in pieces of about equal size, cut by the
distance from the centroid. Copies lie at the same distance, near copies at almost the same,
so few pairs are cut; and no worker holds or compares more than GROUP documents at a time.

The clusters are found once: a run that goes on after an interruption takes those that it has.

Legend: N documents, D width, K clusters.
"""

import collections
import dataclasses
import functools
import itertools
import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from baichuan_jax.data.prepare import embed
from baichuan_jax.data.prepare.corpus import Corpus, ids, row_of, shard_of
from baichuan_jax.data.prepare.engine import Block, Engine, Key, as_json, of_json
from baichuan_jax.data.prepare.groups import by_key

REASON = "semantic duplicate"
GROUP = 1 << 17  # documents that a worker compares at one time: 70 MB of them at D = 256
EPSILONS = (0.03, 0.05, 0.1)  # what each would drop is reported
_BLOCK = 1 << 11  # cosines exist in squares of so many documents
_BINS = np.linspace(0, 1, 21)  # of the histogram
_SHOWN, _EXAMPLES = 10, 3  # clusters in the report, and documents of each
_FOUND = "clusters"  # the file that says which run has found them

_PLACED = np.dtype([("id", np.uint64), ("cluster", np.uint32), ("cosine", np.float32)])
_SCORED = np.dtype(
    [
        ("row", np.uint32),
        ("cluster", np.uint32),
        ("similarity", np.float32),
        ("nearest", np.uint64),
    ]
)


@dataclasses.dataclass
class SemanticConfig:
    """Semantic deduplication."""

    dimensions: int = 256  # of embeddings without a model
    frequency_documents: int = 1 << 18  # features are counted in about so many
    model_tokens: int = 512  # of a document that a model reads
    clusters: int = 0  # 0: the square root of the number of documents
    points_per_cluster: int = 256  # the centroids are fitted to so many of each, or to all
    iterations: int = 20  # of k-means, at most
    epsilon: float = 0.05  # duplicates have a cosine above 1 − epsilon
    delete: bool = False  # drop duplicates; else they are only scored

    def check(self) -> None:
        """Raises ValueError: names the field that is wrong, and what would be right."""
        if not 0 < self.epsilon < 1:
            raise ValueError(f"config.clusters.epsilon={self.epsilon} should lie between 0 and 1.")
        embed.check_dimensions(self.dimensions, "config.clusters.dimensions")
        for name in ("frequency_documents", "model_tokens", "points_per_cluster", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"config.clusters.{name}={getattr(self, name)} should be positive."
                )
        if self.clusters < 0:
            raise ValueError(
                f"config.clusters.clusters={self.clusters} should be positive, or 0 for the"
                " square root of the number of documents."
            )


def run(
    corpus: Corpus,
    stage: str,
    engine: Engine,
    config: SemanticConfig,
    mesh=None,
    seed: int = 0,
    model=None,
) -> dict[str, Any]:
    """Clusters the documents, and scores or drops those that say what another one says.

    Args:
      mesh: the devices that cluster; None: all.
      model: a `LanguageModel` that embeds, on its own devices; None: hashed n-grams.

    Returns:
      For the report: `clusters` and `documents`; `largest`, the largest clusters with their
      sources and the ids of the documents nearest to the centroid; `similarity`, a histogram;
      `dropped_at`, the share of the documents that each epsilon would drop.

    Raises:
      ValueError: as `config.check`.
    """
    config.check()
    # Finished work of an interrupted run has its clusters' numbers, and other devices may find
    # others. So the clusters bear a name that only this run knows, for it is in its own folder.
    [(_, name)] = engine.run("name", [0], _name)
    name = name.tobytes().hex()
    found = _found(corpus, stage)
    if found.get("name") != name:
        if model is None:
            embed.run(corpus, stage, engine, config.dimensions, config.frequency_documents, seed)
        else:
            from baichuan_jax.data.prepare import pooled  # not above: workers do without JAX

            pooled.run(corpus, stage, model, config.model_tokens)
        sizes_K, mean_cosine = _cluster(corpus, stage, config, mesh, seed)
        found = {"name": name, "sizes": sizes_K.tolist(), "mean_cosine": mean_cosine}
        embed.save(corpus, stage, _FOUND, as_json(found))
    sizes_K = np.array(found["sizes"], np.int64)
    bounds = group_bounds(sizes_K, _cosines(corpus, stage, np.flatnonzero(sizes_K > GROUP)), GROUP)
    results = engine.run(
        "compare",
        range(corpus.num_shards()),
        functools.partial(_group, corpus, stage, bounds),
        _compare,
        functools.partial(_write, corpus, stage, config, sizes_K),
    )
    for shard in range(corpus.num_shards()):
        if not len(embed.load(corpus, stage, _placed(shard))):  # nothing of it was sent anywhere
            _write(corpus, stage, config, sizes_K, (shard,), [np.zeros(0, _SCORED)])
    documents = int(sizes_K.sum())
    counts = sum((block for _, block in results), np.zeros(len(_BINS) - 1 + len(EPSILONS), int))
    histogram, dropped = np.split(counts, [len(_BINS) - 1])
    return {
        "documents": documents,
        "clusters": len(sizes_K),
        "mean_cosine": found["mean_cosine"],
        "largest": _largest(corpus, stage, sizes_K),
        "similarity": {"bins": _BINS.round(2).tolist(), "documents": histogram.tolist()},
        "dropped_at": {
            str(epsilon): count / max(1, documents)
            for epsilon, count in zip(EPSILONS, dropped.tolist(), strict=True)
        },
    }


def number_of_clusters(documents: int) -> int:
    """The square root, rounded up.

    So finding each document's cluster (documents × clusters) costs as much as comparing the
    documents inside the clusters (documents² / clusters).
    """
    return max(1, math.isqrt(max(0, documents - 1)) + 1)


def redundancy(vectors_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The highest cosine of each row with an earlier one, in memory for a few rows at a time.

    Args:
      vectors_ND: of any length; zeros are like nothing.

    Returns:
      It, float32 [N], NaN for the first; and that row's number, int64 [N].
    """
    unit_ND = vectors_ND.astype(np.float32)
    lengths = np.linalg.norm(unit_ND, axis=1, keepdims=True)
    unit_ND /= np.where(lengths > 0, lengths, 1)
    best = np.full(len(unit_ND), -np.inf, np.float32)
    nearest = np.zeros(len(unit_ND), np.int64)
    for start in range(0, len(unit_ND), _BLOCK):
        rows = slice(start, start + _BLOCK)
        for first in range(0, start + 1, _BLOCK):
            cosines = unit_ND[rows] @ unit_ND[first : first + _BLOCK].T
            if first == start:
                np.copyto(cosines, -np.inf, where=np.tri(len(cosines), dtype=bool).T)
            at = cosines.argmax(axis=1)
            found = np.take_along_axis(cosines, at[:, None], axis=1)[:, 0]
            better = found > best[rows]
            best[rows] = np.where(better, found, best[rows])
            nearest[rows] = np.where(better, first + at, nearest[rows])
    best[:1] = np.nan
    return np.minimum(best, 1), nearest


def group_bounds(sizes_K: np.ndarray, cosines: Mapping[int, np.ndarray], limit: int) -> np.ndarray:
    """Cuts the clusters into groups of at most about `limit` documents, for one worker each.

    The clusters stand on a line, each with its documents in the order of their cosine with the
    centroid (see `place`). Small clusters share a group; only one that is larger than the limit
    is cut.

    Args:
      sizes_K: documents of each cluster.
      cosines: of the documents of each cluster that is larger than the limit.

    Returns:
      The places where a new group begins, float64, ascending.
    """
    bounds, size = [], 0
    for cluster in map(int, np.flatnonzero(sizes_K)):
        if size and size + sizes_K[cluster] > limit:
            bounds.append(float(cluster))
            size = 0
        pieces = -(-int(sizes_K[cluster]) // limit)
        if pieces > 1:
            ordered = np.sort(cosines[cluster])
            cuts = ordered[np.arange(1, pieces) * len(ordered) // pieces]
            bounds += place(cluster, cuts).tolist()
            size = 0
        size += int(sizes_K[cluster]) // pieces
    return np.array(bounds)


def place(clusters: np.ndarray | int, cosines: np.ndarray) -> np.ndarray:
    """Where documents stand on the line of clusters: the cluster and a fraction, float64."""
    return clusters + (1 + np.clip(cosines, -1, 1).astype(np.float64)) / 4


def _placed(shard: int) -> str:
    return f"{shard:05d}.clusters"


def _name(_: int) -> Iterable[tuple[Key, Block]]:
    yield (0,), np.frombuffer(uuid.uuid4().bytes, np.uint8)


def _found(corpus: Corpus, stage: str) -> dict[str, Any]:
    """The clusters that the last run has found, if any."""
    there = embed.path(corpus, stage, _FOUND).exists()
    return of_json(embed.load(corpus, stage, _FOUND)) if there else {}


def _cluster(
    corpus: Corpus, stage: str, config: SemanticConfig, mesh, seed: int
) -> tuple[np.ndarray, float]:
    """Writes each document's cluster.

    Returns:
      The sizes of the clusters [K]; and the mean cosine of the documents with their centroids.
    """
    from baichuan_jax.data.prepare import kmeans  # not above: workers do without JAX

    shards = range(corpus.num_shards())
    ends = np.cumsum([0] + [len(corpus.read(shard)) for shard in shards])
    documents = int(ends[-1])
    K = min(config.clusters or number_of_clusters(documents), documents)
    if documents:
        sample_ND = _sample(corpus, stage, ends, K * config.points_per_cluster, seed)
        options = {"iterations": config.iterations, "seed": seed, "mesh": mesh}
        centroids_KD, _ = kmeans.fit(sample_ND, K, **options)
    sizes_K, total = np.zeros(K, np.int64), 0.0
    for shard in shards:
        rows = corpus.read(shard)["row"]
        placed = np.zeros(len(rows), _PLACED)
        placed["id"] = ids(shard, rows)
        if len(rows):
            vectors_ND = embed.load(corpus, stage, embed.shard_name(shard))
            placed["cluster"], placed["cosine"] = kmeans.assign(vectors_ND, centroids_KD, mesh)
        embed.save(corpus, stage, _placed(shard), placed)
        sizes_K += np.bincount(placed["cluster"], minlength=K)
        total += placed["cosine"].sum(dtype=np.float64)
    return sizes_K, total / max(1, documents)


def _sample(corpus: Corpus, stage: str, ends: np.ndarray, most: int, seed: int) -> np.ndarray:
    """The embeddings of so many documents, or of all; `ends` counts them shard by shard."""
    size = min(most, int(ends[-1]))
    drawn = np.random.default_rng(seed).choice(ends[-1], size, replace=False, shuffle=False)
    drawn.sort()
    cuts = np.searchsorted(drawn, ends)
    for shard, (first, last) in enumerate(itertools.pairwise(cuts)):
        vectors_ND = embed.load(corpus, stage, embed.shard_name(shard))
        if not shard:
            sample_ND = np.empty((size, vectors_ND.shape[1]), vectors_ND.dtype)
        sample_ND[first:last] = vectors_ND[drawn[first:last] - ends[shard]]
    return sample_ND


def _cosines(corpus: Corpus, stage: str, clusters: np.ndarray) -> dict[int, np.ndarray]:
    """With the centroid, of all documents of these clusters."""
    found = {int(cluster): [] for cluster in clusters}
    for shard in range(corpus.num_shards()) if found else ():
        placed = embed.load(corpus, stage, _placed(shard))
        for cluster, parts in found.items():
            parts.append(placed["cosine"][placed["cluster"] == cluster])
    return {cluster: np.concatenate(parts) for cluster, parts in found.items()}


def _group(
    corpus: Corpus, stage: str, bounds: np.ndarray, shard: int
) -> Iterable[tuple[Key, Block]]:
    placed = embed.load(corpus, stage, _placed(shard))
    vectors_ND = embed.load(corpus, stage, embed.shard_name(shard))
    vector = ("vector", vectors_ND.dtype, vectors_ND.shape[1:])
    sent = np.zeros(len(placed), [*_PLACED.descr, vector])
    for name in _PLACED.names:
        sent[name] = placed[name]
    sent["vector"] = vectors_ND
    groups = np.searchsorted(bounds, place(placed["cluster"], placed["cosine"]), "right")
    for group, some in by_key(groups, sent):
        yield (group,), some


def _compare(key: Key, blocks: list[Block]) -> Iterable[tuple[Key, Block]]:
    sent = np.concatenate(blocks)
    sent = sent[np.lexsort((sent["id"], sent["cosine"], sent["cluster"]))]
    scored = np.zeros(len(sent), _SCORED)
    scored["row"], scored["cluster"] = row_of(sent["id"]), sent["cluster"]
    starts = np.flatnonzero(np.diff(sent["cluster"], prepend=-1))
    for start, end in itertools.pairwise([*starts, len(sent)]):
        similarity, nearest = redundancy(sent["vector"][start:end])
        scored["similarity"][start:end] = similarity
        scored["nearest"][start:end] = sent["id"][start:end][nearest]
    for shard, some in by_key(shard_of(sent["id"]), scored):
        yield (shard,), some


def _write(
    corpus: Corpus,
    stage: str,
    config: SemanticConfig,
    sizes_K: np.ndarray,
    key: Key,
    blocks: list[Block],
) -> Iterable[tuple[Key, Block]]:
    """Writes a shard's attributes; tells the histogram, and what each epsilon would drop."""
    scored = np.concatenate(blocks)
    similarity = scored["similarity"]
    first = np.isnan(similarity)
    drop = (similarity > 1 - config.epsilon) & config.delete
    columns = {
        "cluster_id": scored["cluster"],
        "cluster_documents": sizes_K[scored["cluster"]].astype(np.uint32),
        "semantic_similarity": pa.array(similarity, mask=first),
        "nearest": pa.array(scored["nearest"], mask=first),
        "reason": pa.array(np.where(drop, REASON, None), pa.string()),
    }
    corpus.write(stage, key[0], scored["row"], pa.table(columns))
    histogram, _ = np.histogram(np.clip(similarity[~first], 0, 1), _BINS)
    dropped = [np.count_nonzero(similarity > 1 - epsilon) for epsilon in EPSILONS]
    return [(key, np.concatenate([histogram, dropped]))]


def _largest(corpus: Corpus, stage: str, sizes_K: np.ndarray) -> list[dict[str, Any]]:
    """The largest clusters: their sources, and the documents nearest to the centroid."""
    shown = np.argsort(-sizes_K, kind="stable")[:_SHOWN].tolist()
    nearest = np.zeros(0, _PLACED)
    sources = {cluster: collections.Counter() for cluster in shown}
    for shard in range(corpus.num_shards()):
        placed = embed.load(corpus, stage, _placed(shard))
        of_shown = np.isin(placed["cluster"], shown)
        source = corpus.read(shard, "source")["source"].filter(pa.array(of_shown))
        pairs = pa.table({"cluster": placed["cluster"][of_shown], "source": source})
        counts = pairs.group_by(["cluster", "source"]).aggregate([([], "count_all")])
        for pair in counts.to_pylist():
            sources[pair["cluster"]][pair["source"]] += pair["count_all"]
        nearest = np.concatenate([nearest, placed[of_shown]])
        nearest = nearest[np.lexsort((nearest["id"], -nearest["cosine"], nearest["cluster"]))]
        starts = np.searchsorted(nearest["cluster"], nearest["cluster"])
        nearest = nearest[np.arange(len(nearest)) - starts < _EXAMPLES]
    return [
        {
            "cluster": cluster,
            "documents": int(sizes_K[cluster]),
            "sources": dict(sources[cluster].most_common(3)),
            "examples": nearest["id"][nearest["cluster"] == cluster].tolist(),
        }
        for cluster in shown
    ]
