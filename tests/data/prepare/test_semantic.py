"""Semantic deduplication beside the rule of SemDeDup, spelled out."""

import collections
import functools
import itertools
import json

import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import embed, engine, kmeans, semantic
from baichuan_jax.data.prepare.corpus import ids
from baichuan_jax.data.prepare.semantic import SemanticConfig
from tests.data.prepare.test_exact import write

TOPICS, COLUMNS = 6, ("cluster_id", "cluster_documents", "semantic_similarity", "nearest")


def topic_texts(sizes=(70, 41, 1, 30), copies=12, seed=0, vocabulary=120):
    """Shards of texts, each of the words of one topic; some are near copies of others."""
    rng = np.random.default_rng(seed)
    words = [[f"t{topic}w{n}" for n in range(vocabulary)] for topic in range(TOPICS)]
    texts = [list(rng.choice(words[n % TOPICS], 80)) for n in range(sum(sizes) - copies)]
    for n in range(copies):
        texts.append([*texts[5 * n][:-2], "other", f"end{n}"])
    order = rng.permutation(len(texts))
    texts = [" ".join(texts[n]) for n in order]
    cuts = np.cumsum((0, *sizes))
    return [texts[start:end] for start, end in itertools.pairwise(cuts)]


def read(corpus, *columns):
    """The columns of all kept documents, and their ids."""
    tables = [corpus.read(shard, *columns) for shard in range(corpus.num_shards())]
    found = [ids(shard, table["row"]) for shard, table in enumerate(tables)]
    table = pa.concat_tables(tables)
    return {name: table[name].to_pylist() for name in columns}, np.concatenate(found).tolist()


def by_the_rule(corpus, found, numbers):
    """{id: (the highest cosine with an earlier document of its cluster, whose)}."""
    vectors = np.concatenate(
        [
            embed.load(corpus, "semantic", embed.shard_name(shard))
            for shard in range(corpus.num_shards())
        ]
    ).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centroid_cosine = np.concatenate(
        [
            embed.load(corpus, "semantic", f"{shard:05d}.clusters")["cosine"]
            for shard in range(corpus.num_shards())
        ]
    )
    clusters, expected = collections.defaultdict(list), {}
    for place, cluster in enumerate(found["cluster_id"]):
        clusters[cluster].append((centroid_cosine[place], numbers[place], vectors[place]))
    for members in clusters.values():
        members.sort(key=lambda member: member[:2])  # the farthest from the centroid first
        for place, (_, number, vector) in enumerate(members):
            before = [(float(vector @ other), name) for _, name, other in members[:place]]
            expected[number] = max(before, default=(None, None), key=lambda pair: pair[0])
    return expected


@pytest.mark.parametrize("group", [semantic.GROUP, 40])
def test_scores(tmp_path, monkeypatch, group):
    monkeypatch.setattr(semantic, "GROUP", group)  # 40: clusters share workers, or not
    monkeypatch.setattr(semantic, "_BLOCK", 7)
    made = write(tmp_path, topic_texts(), drop=[(0, 3), (2, 0)])
    config = SemanticConfig(dimensions=128, clusters=TOPICS, epsilon=0.1)
    told = semantic.run(made, "semantic", engine.Local(tmp_path / "work"), config, seed=1)
    after = made.after("semantic")
    found, numbers = read(after, *COLUMNS)
    expected = by_the_rule(made, found, numbers)
    assert len(numbers) == 140 == told["documents"]  # scored, not dropped
    duplicates = 0
    for number, similarity, nearest in zip(
        numbers, found["semantic_similarity"], found["nearest"], strict=True
    ):
        best, whose = expected[number]
        assert (similarity is None) == (best is None) == (nearest is None)
        if best is not None:
            assert abs(best - similarity) < 1e-5 and nearest == whose
            duplicates += best > 0.9
    assert 8 <= duplicates <= 20
    assert told["dropped_at"]["0.1"] == duplicates / 140

    sizes = collections.Counter(found["cluster_id"])
    assert found["cluster_documents"] == [sizes[cluster] for cluster in found["cluster_id"]]
    assert found["semantic_similarity"].count(None) == len(sizes)
    assert sum(told["similarity"]["documents"]) == 140 - len(sizes)
    assert len(told["similarity"]["bins"]) == len(told["similarity"]["documents"]) + 1
    assert json.loads(json.dumps(told)) == told
    assert after.read_all(2, *COLUMNS).to_pylist()[0]["cluster_id"] is None
    schema = after.read(0, *COLUMNS).schema
    assert [str(schema.field(name).type) for name in COLUMNS] == [
        *("uint32", "uint32", "float", "uint64")
    ]


def test_largest_clusters(tmp_path):
    made = write(tmp_path, topic_texts())
    config = SemanticConfig(dimensions=128, clusters=TOPICS)
    told = semantic.run(made, "semantic", engine.Local(tmp_path / "work"), config, seed=1)
    found, numbers = read(made.after("semantic"), "cluster_id")
    members = collections.defaultdict(list)
    for number, cluster in zip(numbers, found["cluster_id"], strict=True):
        members[cluster].append(number)
    sizes = [len(members[group["cluster"]]) for group in told["largest"]]
    assert sizes == [group["documents"] for group in told["largest"]]
    assert sizes == sorted(map(len, members.values()), reverse=True)
    for group in told["largest"]:
        assert group["sources"] == {"x": group["documents"]}
        placed = {}
        for shard in range(4):
            for row in embed.load(made, "semantic", f"{shard:05d}.clusters"):
                if row["cluster"] == group["cluster"]:
                    placed[int(row["id"])] = row["cosine"]
        assert group["examples"] == sorted(placed, key=lambda n: (-placed[n], n))[:3]


def test_clusters_are_of_one_topic(tmp_path):
    made = write(tmp_path, topic_texts(copies=0, vocabulary=30))
    config = SemanticConfig(dimensions=128, clusters=3 * TOPICS)
    semantic.run(made, "semantic", engine.Local(tmp_path / "work"), config)
    found, _ = read(made.after("semantic"), "cluster_id", "text")
    joint = collections.Counter(
        zip(found["cluster_id"], (words[:2] for words in found["text"]), strict=True)
    )
    main = collections.Counter()
    for (cluster, _), count in joint.items():
        main[cluster] = max(main[cluster], count)
    assert len(main) > 2 * TOPICS and main.total() > 0.9 * joint.total()


def test_copies_meet_in_a_cluster_that_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(semantic, "GROUP", 10)
    shards = topic_texts()
    shards[1][:5], shards[3][:3] = shards[0][10:15], shards[0][12:15]
    made = write(tmp_path, shards)
    config = SemanticConfig(dimensions=128, clusters=2)
    semantic.run(made, "semantic", engine.Local(tmp_path / "work"), config)
    found, numbers = read(made.after("semantic"), *COLUMNS)
    copies = [(1 << 32) + row for row in range(5)] + [(3 << 32) + row for row in range(3)]
    originals = [10, 11, 12, 13, 14, 12, 13, 14]
    similarity = dict(zip(numbers, found["semantic_similarity"], strict=True))
    nearest = dict(zip(numbers, found["nearest"], strict=True))
    for copy, original in zip(copies, originals, strict=True):
        # Of equal ones the lowest id comes first; NumPy's products may round apart.
        first, later = sorted((copy, original), key=lambda n: similarity[n] or 0)
        assert similarity[later] > 0.9999
        assert nearest[later] in {first, *copies, *originals}


def test_drops_on_request(tmp_path):
    made = write(tmp_path, [["a b c d e f"] * 3 + ["x y z u v w"], ["a b c d e f", "g h i j k"]])
    config = SemanticConfig(dimensions=64, clusters=2, delete=True)
    semantic.run(made, "semantic", engine.Local(tmp_path / "work"), config)
    after = made.after("semantic")
    reasons = [
        row["reason"] for shard in range(2) for row in after.read_all(shard, "reason").to_pylist()
    ]
    # Of equally far copies the one with the lowest id stays.
    assert reasons == [None, semantic.REASON, semantic.REASON, None, semantic.REASON, None]


def test_the_same_by_two_processes(tmp_path):
    config = SemanticConfig(dimensions=64, clusters=5)
    results = []
    for workers in (1, 2):
        made = write(tmp_path / str(workers), topic_texts(seed=3))
        local = engine.Local(tmp_path / f"work{workers}", workers)
        told = semantic.run(made, "semantic", local, config, seed=2)
        results.append((told, read(made.after("semantic"), *COLUMNS)))
    assert results[0] == results[1]


@pytest.mark.parametrize("texts", [["dropped"], ["the only one"], ["", "，"], ["same"] * 5])
def test_next_to_nothing(tmp_path, texts):
    drop = [(0, 0)] if texts == ["dropped"] else []
    made = write(tmp_path, [texts], drop)
    told = semantic.run(made, "semantic", engine.Local(tmp_path / "work"), SemanticConfig())
    found, numbers = read(made.after("semantic"), *COLUMNS)
    assert told["documents"] == len(numbers) == len(texts) - len(drop)
    assert json.loads(json.dumps(told)) == told
    similar = [value for value in found["semantic_similarity"] if value is not None]
    assert all(0 <= value <= 1 for value in similar)
    assert sum(told["similarity"]["documents"]) == len(similar)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 100])
def test_redundancy(size, monkeypatch):
    monkeypatch.setattr(semantic, "_BLOCK", 16)
    rng = np.random.default_rng(size)
    x = rng.standard_normal((size, 8)) * rng.uniform(0.1, 9, (size, 1))
    x[size // 2] = 0
    similarity, nearest = semantic.redundancy(x.astype(np.float32))
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    assert np.isnan(similarity[0])
    for row in range(1, size):
        before = unit[:row] @ unit[row]
        assert abs(similarity[row] - before.max()) < 1e-5
        assert before[nearest[row]] > before.max() - 1e-5


def test_groups_are_of_whole_clusters_or_of_slices():
    rng = np.random.default_rng(0)
    sizes = np.array([0, 5, 4, 300, 0, 3, 11, 2, 10, 9, 25])
    clusters = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    cosines = rng.uniform(-0.2, 1, len(clusters)).astype(np.float32)
    of = {k: cosines[clusters == k] for k in np.flatnonzero(sizes > 10).tolist()}
    bounds = semantic.group_bounds(sizes, of, 10)
    assert (np.diff(bounds) > 0).all()
    groups = np.searchsorted(bounds, semantic.place(clusters, cosines), "right")
    assert np.bincount(groups).max() <= 10
    assert np.bincount(groups).sum() / 10 > 0.7 * (groups.max() + 1)  # they are not small, either
    for k in np.flatnonzero(sizes):
        of_cluster = groups[clusters == k]
        assert len(set(of_cluster)) == -(-sizes[k] // 10)
        # Slices by the distance from the centroid.
        assert (np.diff(of_cluster[np.argsort(cosines[clusters == k])]) >= 0).all()


def test_copies_are_never_cut_apart():
    cosines = np.repeat(np.float32([0.5, 0.7]), 50)
    bounds = semantic.group_bounds(np.array([100]), {0: cosines}, 10)
    groups = np.searchsorted(bounds, semantic.place(np.zeros(100, int), cosines), "right")
    assert len(set(groups[:50])) == len(set(groups[50:])) == 1 and groups[0] != groups[50]


@pytest.mark.parametrize("documents, clusters", [(0, 1), (1, 1), (2, 2), (9, 3), (10, 4)])
def test_number_of_clusters(documents, clusters):
    assert semantic.number_of_clusters(documents) == clusters


@pytest.mark.parametrize(
    "field, value",
    [("epsilon", 0.0), ("epsilon", 1.5), ("clusters", -1), ("iterations", 0), ("dimensions", 100)],
)
def test_refuses(tmp_path, field, value):
    made = write(tmp_path, [["a"]])
    config = SemanticConfig(**{field: value})
    said = rf"config\.clusters\.{field}={value} (should|must) "
    for call in (config.check, lambda: semantic.run(made, "semantic", None, config)):
        with pytest.raises(ValueError, match=said):
            call()


class Interrupted(Exception):
    pass


def test_goes_on_with_the_clusters_that_it_has(tmp_path, monkeypatch):
    """A resumed run does not mix its own clusters with those of finished work."""
    made = write(tmp_path, topic_texts(seed=4))
    config = SemanticConfig(dimensions=64, clusters=5)
    call = functools.partial(semantic.run, made, "semantic", config=config)
    expected = call(engine=engine.Local(tmp_path / "whole")), read(made.after("semantic"), *COLUMNS)

    fit, compare, group = kmeans.fit, semantic._compare, semantic._group
    fitted, grouped = [], []

    def fit_otherwise(*arguments, **options):  # as on another number of devices, only more so
        centroids_KD, history = fit(*arguments, **options)
        fitted.append(len(centroids_KD))
        return np.roll(centroids_KD, len(fitted) - 1, axis=0), history

    def interrupt(*arguments):
        raise Interrupted

    def count(corpus, stage, bounds, shard):
        grouped.append(shard)
        if len(grouped) == 3:
            raise Interrupted
        return group(corpus, stage, bounds, shard)

    monkeypatch.setattr(kmeans, "fit", fit_otherwise)
    work = tmp_path / "work"
    monkeypatch.setattr(semantic, "_group", count)
    with pytest.raises(Interrupted):  # two of four shards are sent
        call(engine=engine.Local(work))
    monkeypatch.setattr(semantic, "_compare", interrupt)
    with pytest.raises(Interrupted):
        call(engine=engine.Local(work))
    assert grouped == [0, 1, 2, 2, 3]
    monkeypatch.setattr(semantic, "_compare", compare)
    assert (call(engine=engine.Local(work)), read(made.after("semantic"), *COLUMNS)) == expected
    assert fitted == [5]
    # Another run, as after a change of the settings before it, finds its own.
    call(engine=engine.Local(tmp_path / "other"))
    assert fitted == [5, 5]


def test_the_sample_is_of_all_shards(tmp_path):
    made = write(tmp_path, topic_texts(sizes=(30, 1, 0, 50), copies=0))
    embed.run(made, "semantic", engine.Local(tmp_path / "work"), 64)
    every = np.concatenate([embed.load(made, "semantic", embed.shard_name(n)) for n in range(4)])
    ends = np.cumsum([0, 30, 1, 0, 50])
    np.testing.assert_array_equal(semantic._sample(made, "semantic", ends, 500, 0), every)
    few, other = (semantic._sample(made, "semantic", ends, 20, seed) for seed in (0, 1))
    rows = [np.flatnonzero((every == one).all(axis=1)).tolist() for one in few]
    assert len(few) == 20 and all(len(row) == 1 for row in rows) and rows == sorted(rows)
    assert rows[0][0] < 30 <= rows[-1][0] and (few != other).any()
