import importlib.util
import json
import subprocess
import sys

import pytest

from baichuan_jax.data.prepare import benchmark, costs


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


class InThisProcess:
    """In place of `interleave.Worker`: a process for each stage would take long."""

    def __init__(self, make, settings):
        self._side = make(**settings)

    def ask(self, what):
        return getattr(self._side, what)()

    def close(self):
        pass


def test_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(costs.interleave, "Worker", InThisProcess)
    found = list(costs.stages("embedded:300000", tmp_path, 1_200, sequence_length=64, rounds=1))
    assert [cost.stage for cost in found] == list(costs.STAGES)
    assert all(cost.seconds > 0 and cost.gigabytes > 0 for cost in found)
    before = [cost.megabytes for cost in found]
    assert before == sorted(before, reverse=True) and before[0] > before[-1] > 0.1
    # Each has done its work.
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["sets"]
    written = {path.name for path in (tmp_path / "attributes").iterdir()}
    assert written == set(costs.STAGES) - {"ingest", "embed", "pack"}
    assert (tmp_path / "embeddings").exists()


def test_a_worker_does_without_jax(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "STAGES", ("ingest", "exact", "spans", "documents"))
    found = list(costs.stages("embedded:300000", tmp_path, rounds=1))
    assert [cost.stage for cost in found if cost.jax] == []
    assert all(0.05 < cost.gigabytes < 0.5 for cost in found)  # of this process's more


def test_whole():
    """2 MB/s and 6 MB/s after each other are 1.5 MB/s, whatever of the text is left."""
    parts = [costs.Cost("a", 10, 5, 0.1, False), costs.Cost("b", 6, 1, 0.1, False)]
    assert costs.whole(parts) == pytest.approx(1.5)


def test_pairs():
    found = benchmark.pairs(size=1 << 12, rounds=1)
    assert list(found) == ["group", "verify", "components", "compare"]
    assert all(rate > 0 for rate in found.values())


@pytest.mark.slow
def test_the_command():
    call = [sys.executable, "-m", "experiments.benchmark", "--what=data", "--text=embedded:2000000"]
    done = subprocess.run(call, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = {line.split()[0] for line in done.stdout.splitlines() if line}
    assert {"signatures", "zh", "en", "stage", *costs.STAGES, "deduplication", "loader:"} <= told
