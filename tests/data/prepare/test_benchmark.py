import importlib.util
import json

import pytest

from baichuan_jax.data.prepare import benchmark


@pytest.fixture
def source(tmp_path):
    rows = [{"text": "some words of a text " * 200, "lang": "en"}] * 3
    rows += [{"text": "一些文字。" * 200, "lang": "zh"}] * 9
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_signatures(source, monkeypatch):
    rows = benchmark.signatures(source, megabytes=0.008, rounds=1)
    # Whole documents, until there is enough: 4,200 bytes each in English, 3,000 in Chinese.
    assert [(row["language"], row["documents"]) for row in rows] == [("en", 2), ("zh", 3)]
    assert rows[0]["megabytes"] == pytest.approx(0.0084)
    compared = importlib.util.find_spec("datasketch") is not None
    for row in rows:
        assert row["ours"] > 0 and ("ratio" in row) == compared
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    alone = benchmark.signatures(source, megabytes=0.008, rounds=1)
    assert set(alone[0]) == {"language", "documents", "megabytes", "ours"}


@pytest.mark.oracle
def test_datasketch_agrees_with_our_signatures():
    """Its estimate and ours of the same two texts, with the same shingles."""
    import numpy as np
    import pyarrow as pa

    from baichuan_jax.data.prepare import minhash

    words = [f"word{n}" for n in range(1000)]
    texts = [" ".join(words), " ".join(words[:750])]
    one, other = benchmark._datasketch(texts)
    signatures = minhash.sketch(pa.array(texts)).signatures
    ours = minhash.similarity(signatures, np.array([0]), signatures, np.array([1]))[0]
    for estimate in (one.jaccard(other), ours):
        assert estimate == pytest.approx(746 / 996, abs=0.12)
