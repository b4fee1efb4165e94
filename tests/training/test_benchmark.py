"""The benchmark: its arithmetic, and one small run of each side."""

import pytest

from baichuan_jax.training import benchmark

TINY = benchmark.Shape(32, 48, 2, 2, 128, 2, 16)


def test_table_shows_ratios_of_minima_and_medians():
    results = {
        "ours": {"train": [2.0, 1.0, 3.0], "gemm": 1e12},
        "transformers": {"train": [6.0, 3.0, 3.0], "gemm": 2e12},
    }
    text = benchmark.table(TINY, results)
    assert "3.00× as fast by the minima, 1.50× by the medians" in text
    assert "pip install" in benchmark.table(TINY, {"ours": results["ours"]})


def test_flops_of_a_step():
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 128 * 32
    assert TINY.flops == 2 * 16 * (6 * matrices + 6 * 16 * 32 * 2)


def test_our_side_runs():
    results = benchmark.compare(TINY, 2, ["ours"])
    assert len(results["ours"]["train"]) == 2 and min(results["ours"]["train"]) > 0
    assert results["ours"]["gemm"] > 0


def test_a_worker_that_fails_is_reported():
    with pytest.raises(RuntimeError, match="worker ended"):
        benchmark.compare(benchmark.Shape(32, 48, 2, 2, 128, 2, 16, "float99"), 1, ["ours"])


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_run(dtype):
    shape = benchmark.Shape(32, 48, 2, 2, 128, 2, 16, dtype)
    assert set(benchmark.compare(shape, 1)) == {"ours", "transformers"}
