"""The benchmark: its arithmetic, and one small run of each side."""

import sys
import types

import jax
import pytest

from baichuan_jax import interleave
from baichuan_jax.training import benchmark

TINY = benchmark.Shape(32, 48, 2, 2, 128, 2, 16)


def test_table_shows_ratios_of_minima_and_medians():
    results = {
        "ours": {"about": "jax", "train": [2.0, 1.0, 3.0], "limit": 1e7},
        "transformers": {"about": "torch", "train": [6.0, 3.0, 3.0], "limit": 1e7},
    }
    text = benchmark.table(TINY, results)
    assert f"{TINY.flops / 1e7:.0%}  jax" in text  # the share of a limit of ten MFLOP/s
    assert "3.00× as fast by the minima, 1.50× by the medians" in text
    assert "pip install" in benchmark.table(TINY, {"ours": results["ours"]})


def test_flops_of_a_step():
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 128 * 32
    assert TINY.flops == 2 * 16 * (6 * matrices + 6 * 16 * 32 * 2)


def test_our_side_runs():
    ours = benchmark.compare(TINY, 2, ["ours"])["ours"]
    assert len(ours["train"]) == 2 and min(ours["train"]) > 0
    assert ours["limit"] > 0
    assert ours["about"] == f"jax {jax.__version__}, cpu"


def test_a_worker_that_fails_is_reported():
    with pytest.raises(RuntimeError, match="worker ended"):
        benchmark.compare(benchmark.Shape(32, 48, 2, 2, 128, 2, 16, "float99"), 1, ["ours"])


def test_when_a_worker_dies_the_others_are_closed(monkeypatch):
    workers = []

    class Watched(interleave.Worker):
        def __init__(self, make, settings):
            super().__init__(make, settings)
            workers.append(self._process)
            if make is sys.exit:
                self._process.wait()  # so that what it is asked finds a broken pipe

    monkeypatch.setattr(interleave, "Worker", Watched)
    alive = (types.SimpleNamespace, {"seconds": 3})
    with pytest.raises(RuntimeError, match="The benchmark's worker ended"):
        interleave.run({"a": alive, "dead": (sys.exit, {}), "b": alive}, ["seconds"], [], 1)
    assert len(workers) == 3 and all(process.poll() is not None for process in workers)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_run(dtype):
    shape = benchmark.Shape(32, 48, 2, 2, 128, 2, 16, dtype)
    assert set(benchmark.compare(shape, 1)) == {"ours", "transformers"}
