import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import corpus, engine, exact

SHARDS = [
    ["春眠不觉晓，处处闻啼鸟。", "one", "", "two"],
    ["one", "春眠不觉晓，处处闻啼鸟。", "One", "three "],
    ["three", "one", ""],
]


def write(folder, shards, drop=()):
    """A corpus of these texts; its stage 'before' has dropped (shard, row)s."""
    made = corpus.Corpus(str(folder))
    for shard, texts in enumerate(shards):
        columns = {"text": texts} | {name: ["x"] * len(texts) for name in ("source", "language")}
        table = pa.table(columns | {"origin": [None] * len(texts)}, schema=corpus.DOCUMENT_SCHEMA)
        corpus.write_parquet(made.document_path(shard), table)
        reasons = ["short" if (shard, row) in drop else None for row in range(len(texts))]
        reasons = pa.table({"reason": pa.array(reasons, pa.string())})
        made.write("before", shard, np.arange(len(texts)), reasons)
    return made.after("before")


def kept(made):
    return [made.read(shard, "text")["text"].to_pylist() for shard in range(made.num_shards())]


def test_the_first_of_equal_documents_stays(tmp_path):
    made = write(tmp_path, SHARDS, drop=[(0, 1)])
    told = exact.run(made, "exact", engine.Local(tmp_path / "work"), exact.ExactConfig())
    after = made.after("exact")
    assert kept(after) == [
        ["春眠不觉晓，处处闻啼鸟。", "", "two"],
        ["one", "One", "three "],  # the earlier "one" was dropped before
        ["three"],
    ]
    assert after.read(0, "copies")["copies"].to_pylist() == [2, 2, 1]
    assert after.read(1, "copies")["copies"].to_pylist() == [2, 1, 1]
    last = after.read_all(2, "reason", "copy_of", "copies").to_pydict()
    assert last["reason"] == [None, exact.REASON, exact.REASON]
    assert last["copy_of"] == [None, 1 << 32, 2]
    assert last["copies"] == [1, None, None]
    assert told["groups"] == 3
    assert told["largest"] == [{"document": n, "copies": 2} for n in (0, 2, 1 << 32)]


@pytest.mark.parametrize("seed", range(3))
def test_copies_beside_a_dictionary(seed):
    rng = np.random.default_rng(seed)
    hashed = np.zeros(2000, exact.HASHED)
    # Few values, so that documents agree in one half of the hash and differ in the other.
    hashed["high"], hashed["low"] = rng.integers(0, 40, (2, 2000))
    hashed["document"] = rng.permutation(2000) << 30
    groups = {}
    for high, low, document in sorted(hashed.tolist(), key=lambda h: h[2]):
        groups.setdefault((high, low), []).append(document)
    expected = [(d, g[0], len(g)) for g in groups.values() if len(g) > 1 for d in g]
    assert exact.copies(hashed).tolist() == sorted(expected)


def test_hashes_are_blake2b_of_the_bytes():
    texts = pa.chunked_array([["a", None], ["", "é", "e\u0301"]], pa.string()).slice(1)
    hashes = exact.hash_texts(texts)
    assert hashes[0].tobytes().hex() == "cae66941d9efbd404e4d88758ea67670"  # of nothing
    assert len(np.unique(hashes, axis=0)) == 3 and (hashes[0] == hashes[1]).all()


def test_shards_without_documents(tmp_path):
    made = write(tmp_path, [[], ["a", "a"]], drop=[(1, 0), (1, 1)])
    told = exact.run(made, "exact", engine.Local(tmp_path / "work"), exact.ExactConfig())
    assert told == {"groups": 0, "largest": []}
    assert kept(made.after("exact")) == [[], []]


def test_wrong_settings_are_named():
    exact.ExactConfig(largest=0).check()
    with pytest.raises(ValueError, match=r"config\.exact\.largest=-1 must be 0 or more"):
        exact.ExactConfig(largest=-1).check()
