"""Near-duplicate documents, against exact similarities computed here."""

import functools
import gzip
import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import documents, minhash
from baichuan_jax.data.prepare.corpus import (
    DOCUMENT_SCHEMA,
    Corpus,
    ids,
    row_of,
    shard_of,
    write_parquet,
)
from baichuan_jax.data.prepare.documents import DocumentsConfig
from baichuan_jax.data.prepare.engine import Local
from tests.data.prepare import edits

SHARED = pathlib.Path(__file__).parents[4] / "shared" / "data" / "dedup"
SHARDS = 3


def write(folder, texts):
    """A corpus of some shards, and the id of each text."""
    corpus = Corpus(str(folder))
    places = np.zeros(len(texts), np.uint64)
    for shard in range(SHARDS):
        some = texts[shard::SHARDS]
        columns = {name: ["x"] * len(some) for name in DOCUMENT_SCHEMA.names} | {"text": some}
        write_parquet(corpus.document_path(shard), pa.table(columns, schema=DOCUMENT_SCHEMA))
        places[shard::SHARDS] = ids(shard, np.arange(len(some)))
    return corpus, places.tolist()


def attributes(corpus, stage="near"):
    """The attributes of all documents by id, as a dictionary of each row."""
    found = {}
    for shard in range(corpus.num_shards()):
        names = ("reason", "duplicate_of", "cluster_size", "stage")
        table = corpus.after(stage).read_all(shard, *names)
        for row in table.to_pylist():
            found[shard << 32 | row["row"]] = row
    return found


def measure(folder, texts, exact, config):
    """Recall of edges and of clusters, precision, and the least similarity to a kept document.

    Args:
      exact: similarities of the pairs of places in `texts` that have any.
    """
    corpus, places = write(folder, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "spanning", lambda edges: edges)
        engine = Local(folder / "all")
        candidates, count, edges = documents.find_edges(corpus, "near", engine, config)
    told = documents.run(corpus, "near", Local(folder / "scratch"), config)
    assert (told["candidates"], told["edges"]) == (candidates, count) == (candidates, len(edges))
    truth = {tuple(sorted((places[i], places[j]))): value for (i, j), value in exact.items()}
    edges = set(map(tuple, edges.tolist()))
    assert count <= candidates
    rows = attributes(corpus)
    kept = {place: row["duplicate_of"] for place, row in rows.items()}
    similar = [pair for pair, value in truth.items() if value >= 0.8]
    removed = [tuple(sorted(pair)) for pair in kept.items() if pair[1] is not None]
    assert len(similar) > 100 and len(removed) > 100
    return {
        "recall": np.mean([pair in edges for pair in similar]),
        "merged": np.mean([any(kept[one] is not None for one in pair) for pair in similar]),
        "precision": np.mean([truth.get(pair, 0) >= 0.7 for pair in edges]),
        "least": min(truth.get(pair, 0) for pair in removed),
    }


def assert_good(found):
    assert found["recall"] >= 0.98, found
    assert found["merged"] >= 0.98, found
    assert found["precision"] >= 0.99, found
    assert found["least"] >= 0.5, found


@pytest.mark.parametrize(("language", "simplify"), [("en", False), ("zh", False), ("zh", True)])
def test_known_edits(tmp_path, language, simplify):
    texts = edits.texts(language, originals=60, seed=0)
    if not simplify:
        texts = [text for text in texts if text.edit != "traditional"]
    exact = edits.jaccard([text.plain for text in texts])
    # The set asks something: pairs on both sides of what counts as similar.
    assert sum(0.3 < value < 0.7 for value in exact.values()) > 100
    config = DocumentsConfig(simplify=simplify)
    assert_good(measure(tmp_path, [text.text for text in texts], exact, config))


def test_traditional_is_another_text_unless_told(tmp_path):
    texts = edits.texts("zh", originals=10, seed=1)
    texts = [text for text in texts if text.edit in ("", "traditional")]
    for simplify, removed in ((False, 0), (True, 10)):
        corpus, _ = write(tmp_path / str(simplify), [text.text for text in texts])
        engine = Local(tmp_path / f"scratch-{simplify}")
        documents.run(corpus, "near", engine, DocumentsConfig(simplify=simplify))
        rows = attributes(corpus).values()
        assert sum(row["reason"] == documents.REASON for row in rows) == removed


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/dedup beside the repository")
@pytest.mark.parametrize("language", ["zh", "en"])
def test_two_releases_of_real_pages(tmp_path, language):
    with gzip.open(SHARED / "docs.jsonl.gz", "rt") as lines:
        rows = [row for row in map(json.loads, lines) if row["lang"] == language]
    place = {row["id"]: number for number, row in enumerate(rows)}
    with gzip.open(SHARED / "pairs.jsonl.gz", "rt") as lines:
        exact = {
            (place[pair["a"]], place[pair["b"]]): pair["jaccard_word5"]
            for pair in map(json.loads, lines)
            if pair["a"] in place and pair["b"] in place
        }
    assert_good(measure(tmp_path, [row["text"] for row in rows], exact, DocumentsConfig()))


def test_attributes_of_a_small_corpus(tmp_path):
    long = " ".join(f"word{number}" for number in range(400))
    longer = f"{long} and one more"
    other = " ".join(f"thing{number}" for number in range(400))
    texts = [long, "", other, longer, "two words", "...", "Two  words!", "!", f"{long} and"]
    corpus, place = write(tmp_path, texts)
    # An earlier stage has dropped one of them.
    dropped, dropped_id = pa.table({"reason": ["too short"]}), np.uint64(place[4])
    for shard in range(SHARDS):
        rows = np.arange(1 if shard == shard_of(dropped_id) else 0)
        rows = rows + row_of(dropped_id)
        corpus.write("short", shard, rows, dropped.slice(0, len(rows)))
    told = documents.run(
        corpus.after("short"), "near", Local(tmp_path / "scratch"), DocumentsConfig()
    )
    removed = sorted([place[0], place[8]])
    assert told["clusters"] == 1 and told["edges"] == 3
    assert told["largest"] == [{"kept": place[3], "size": 3, "members": removed}]
    rows = attributes(corpus)
    for number, one in enumerate(place):
        row = rows[one]
        if number == 4:
            assert row["reason"] is row["cluster_size"] is None
            continue
        gone = one in removed
        assert row["reason"] == ("near duplicate" if gone else None)
        assert row["duplicate_of"] == (place[3] if gone else None)
        assert row["cluster_size"] == (3 if gone or number == 3 else 1)


def test_every_shard_has_attributes_where_nothing_is_left(tmp_path):
    corpus, place = write(tmp_path, ["some words that are left by no stage before"] * 7)
    all_gone = pa.table({"reason": ["gone"] * len(place)})
    for shard in range(SHARDS):
        size = corpus.num_rows(shard)
        corpus.write("gone", shard, np.arange(size), all_gone.slice(0, size))
    engine = Local(tmp_path / "scratch")
    told = documents.run(corpus.after("gone"), "near", engine, DocumentsConfig())
    assert told == {"candidates": 0, "edges": 0, "clusters": 0, "largest": []}
    assert [row["cluster_size"] for row in attributes(corpus).values()] == [None] * len(place)


@pytest.mark.slow
def test_same_on_two_workers(tmp_path):
    texts = [text.text for text in edits.texts("en", originals=5, seed=2)]
    corpus, _ = write(tmp_path, texts)
    one = documents.run(corpus, "near", Local(tmp_path / "one"), DocumentsConfig())
    before = attributes(corpus)
    two = documents.run(corpus, "near", Local(tmp_path / "two", workers=2), DocumentsConfig())
    assert one == two and before == attributes(corpus)
    assert one["clusters"] >= 5


@pytest.mark.parametrize("threshold", [75, 1.5, 0, -1, float("nan")])
def test_threshold_must_be_a_similarity(tmp_path, threshold):
    config = DocumentsConfig(threshold=threshold)
    said = rf"config\.documents\.threshold={threshold} should be a Jaccard similarity"
    for call in (config.check, lambda: documents.run(Corpus(str(tmp_path)), "near", None, config)):
        with pytest.raises(ValueError, match=said):
            call()
    DocumentsConfig(threshold=1.0).check()


def test_candidates_of_small_and_big_buckets(monkeypatch):
    monkeypatch.setattr(documents, "_STAR", 100)
    sizes = np.array([1, 2, documents.SMALL_BUCKET, documents.SMALL_BUCKET + 1, 1, 500])
    names = np.random.default_rng(0).permutation(len(sizes)).astype(np.uint64)
    keys = np.repeat(names, sizes)
    owners = np.random.default_rng(1).permutation(len(keys)).astype(np.uint64)
    pairs = documents.candidate_pairs(keys, owners)
    assert (pairs["low"] < pairs["high"]).all()
    found = set(map(tuple, pairs.tolist()))
    assert len(found) == len(pairs)
    key_of = dict(zip(owners.tolist(), keys.tolist(), strict=True))
    assert all(key_of[low] == key_of[high] for low, high in found)
    for name, size in zip(names.tolist(), sizes.tolist(), strict=True):
        mine = np.array([pair for pair in found if key_of[pair[0]] == name]).reshape(-1, 2)
        small = size <= documents.SMALL_BUCKET
        stars = -(-size // 100)
        assert len(mine) == (size * (size - 1) // 2 if small else 2 * size - 1 - 2 * stars)
        assert np.bincount(mine.ravel().astype(int), minlength=1).max() <= 100 + 1
        if size > 1:
            nodes, labels = documents.components(mine.astype(np.uint64))
            assert len(nodes) == size and len(set(labels)) == 1
    # Where the rows come from does not matter.
    order = np.random.default_rng(2).permutation(len(keys))
    assert set(map(tuple, documents.candidate_pairs(keys[order], owners[order]).tolist())) == found
    assert len(documents.candidate_pairs(keys[:0], owners[:0])) == 0


def test_a_template_makes_the_same_pairs_in_every_band():
    owners = np.arange(1000, dtype=np.uint64)
    bands = [documents.candidate_pairs(np.full(1000, key, np.uint64), owners) for key in (3, 8)]
    assert set(bands[0].tolist()) == set(bands[1].tolist())


def template(count, seed=0):
    """Texts that differ in some numbers only."""
    rng = np.random.default_rng(seed)
    words = [f"word{number}" for number in range(60)]
    return [
        " ".join([*words[:20], str(one), *words[20:40], str(two), *words[40:]])
        for one, two in zip(rng.integers(0, 10**6, count), rng.integers(0, 50, count), strict=True)
    ]


class Watching(Local):
    """Notes the largest block, and the most bytes that a call gets, after each step."""

    def run(self, name, items, first, *then):
        self.blocks, self.calls = [], []
        return super().run(name, items, first, *(functools.partial(self._watch, f) for f in then))

    def _watch(self, function, key, blocks):
        self.blocks.append(max(block.nbytes for block in blocks))
        self.calls.append(sum(block.nbytes for block in blocks))
        yield from function(key, blocks)


def test_templates_are_checked_in_parts(tmp_path, monkeypatch):
    """Parts change no result, but bound what a worker holds and what the driver gets."""
    count = 1500
    corpus, _ = write(tmp_path, template(count))
    found = []
    for rows, block in ((documents._ROWS_PER_PART, documents._CHECKED), (5, 64)):
        monkeypatch.setattr(documents, "_ROWS_PER_PART", rows)
        monkeypatch.setattr(documents, "_CHECKED", block)
        engine = Watching(tmp_path / str(rows))
        checked, edges, forest = documents.find_edges(corpus, "near", engine, DocumentsConfig())
        nodes, labels = documents.components(forest)
        assert checked < 2 * minhash.BANDS * count and edges > 2 * count
        told = documents.run(corpus, "near", Local(tmp_path / f"{rows}"), DocumentsConfig())
        assert (told["candidates"], told["edges"]) == (checked, edges)
        removed = sum(row["reason"] is not None for row in attributes(corpus).values())
        assert removed > 0.95 * count
        found.append((checked, edges, nodes.tolist(), labels.tolist(), attributes(corpus)))
        if rows == 5:
            # The largest groups are the keys of a band; of checks, 32 rows of a shard have 40 each.
            keys = 16 * count
            assert max(engine.blocks) <= keys
            assert max(engine.calls) <= max(keys, 32 * 2 * minhash.BANDS * 176)
        else:
            assert len(forest) < min(edges, SHARDS * count)  # of a worker, one for a document
    assert found[0] == found[1]


@pytest.mark.parametrize("size, count", [(1, 0), (30, 20), (100, 400)])
def test_a_forest_connects_what_its_edges_do(size, count):
    rng = np.random.default_rng(count)
    edges = rng.integers(0, size, (count, 2)).astype(np.uint64) + np.uint64(1 << 40)
    edges = np.unique(np.sort(edges[edges[:, 0] != edges[:, 1]], axis=1), axis=0)
    forest = documents.spanning(edges)
    nodes, labels = documents.components(edges)
    again, of_forest = documents.components(forest)
    assert nodes.tolist() == again.tolist()
    assert len(set(zip(labels, of_forest, strict=True))) == len(set(labels)) == len(set(of_forest))
    assert len(forest) == len(nodes) - len(set(labels))
    assert set(map(tuple, forest.tolist())) <= set(map(tuple, edges.tolist()))


def kept_by_the_rule(members, threshold):
    """In plain Python: the longest, with all that are like it; then the longest that is left."""
    kept, rows = {}, sorted(members.tolist(), key=lambda row: (row[0], -row[2], row[1]))
    signatures = {row["id"].item(): row["signature"] for row in members}
    while rows:
        cluster, first = rows[0][:2]
        for row in list(rows):
            equal = np.mean(signatures[row[1]] == signatures[first])
            if row[0] == cluster and (equal - 1 / 256) / (1 - 1 / 256) >= threshold:
                kept[row[1]] = first
                rows.remove(row)
    return [kept[number] for number in members["id"].tolist()]


@pytest.mark.parametrize("dense, leaders", [(0, 1), (0, 7), (20, 64), (10**6, 64)])
@pytest.mark.parametrize("changed", [0.12, 0.14, 0.5])
def test_kept_documents_by_the_rule(monkeypatch, dense, leaders, changed):
    monkeypatch.setattr(documents, "_DENSE", dense)
    monkeypatch.setattr(minhash, "_LEADERS", leaders)
    monkeypatch.setattr(minhash, "_COLUMNS", 16)
    rng = np.random.default_rng(0)
    members = np.zeros(180, documents._MEMBER)
    members["id"] = rng.permutation(180)
    members["cluster"] = rng.choice(4, 180, p=[0.02, 0.08, 0.2, 0.7])
    members["characters"] = rng.integers(50, 60, 180)
    drawn = rng.integers(0, 256, (4 + 180, minhash.PERMUTATIONS))
    changed = rng.random((180, minhash.PERMUTATIONS)) < changed
    members["signature"] = np.where(changed, drawn[4:], drawn[members["cluster"]])
    expected = kept_by_the_rule(members, 0.75)
    assert len(set(expected)) > 10 and (changed.mean() > 0.4 or len(set(expected)) < 150)
    assert documents.kept_documents(members, 0.75).tolist() == expected
    assert len(documents.kept_documents(members[:0], 0.75)) == 0


def test_members_that_are_unlike_the_kept_one_get_their_own():
    """A chain: each member shares less with the first."""
    members = np.zeros(6, documents._MEMBER)
    members["id"] = [10, 11, 12, 13, 14, 15]
    members["cluster"] = [0, 0, 0, 0, 0, 1]
    members["characters"] = [50, 60, 60, 40, 30, 99]
    for number in range(5):  # a shift of 16 permutations is a similarity of 0.9
        members["signature"][number] = np.arange(minhash.PERMUTATIONS) < 16 * number
    # 11 is the longest (12 is as long and later): like 10, 12 and 13, but not 14.
    assert documents.kept_documents(members, 0.75).tolist() == [11, 11, 11, 11, 14, 15]
    assert documents.kept_documents(members, 0.95).tolist() == [10, 11, 12, 13, 14, 15]
    members["characters"][4] = 70
    assert documents.kept_documents(members, 0.75).tolist() == [11, 11, 14, 14, 14, 15]
