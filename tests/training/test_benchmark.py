"""The benchmark: its arithmetic, and one small run of each side."""

import dataclasses
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax import interleave
from baichuan_jax.config import ModelConfig, validate
from baichuan_jax.model.kernels import blockwise
from baichuan_jax.model.position import alibi_slopes
from baichuan_jax.training import benchmark, device_benchmark

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


def test_the_config_says_what_is_trained():
    shape = dataclasses.replace(TINY, position="alibi", micro_batches=2, remat="full")
    config = shape.config
    validate(config)
    assert config.model == ModelConfig(128, 32, 48, 2, 2, "alibi")
    training = config.training
    assert (training.batch_size, training.micro_batches, training.remat) == (2, 2, "full")
    assert config.data.sequence_length * training.batch_size == shape.tokens == 32


def test_the_mask_of_the_other_side_is_alibi():
    """Its sum with the logits gives what the kernels give from slopes."""
    rng = np.random.default_rng(0)
    q, k, v = np.float32(rng.standard_normal((3, 1, 8, 3, 4)))
    logits = np.einsum("bthk,bshk->bhts", q, k) / 2 + benchmark.alibi_mask(3, 8)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.einsum("bhts,bshk->bthk", p / p.sum(-1, keepdims=True), v)
    positions, segments = np.arange(8, dtype=np.int32)[None], np.ones((1, 8), np.int32)
    got = blockwise.attention(q, k, v, positions, segments, jnp.asarray(alibi_slopes(3)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_packed_rows_are_whole_documents():
    positions, segments = device_benchmark.packed_rows(16, 512)
    starts = positions == 0
    np.testing.assert_array_equal(starts.cumsum(1), segments)
    assert (np.diff(positions, axis=1)[~starts[:, 1:]] == 1).all()
    assert 4 < segments[:, -1].mean() < 8


def test_short_work_is_repeated_and_told_once():
    count = 0

    def work():
        nonlocal count
        count += 1
        time.sleep(0.005)

    seconds = device_benchmark.timed(work, lambda _: None)
    before = count
    assert 0.005 <= seconds() < 0.1 and count - before > 1


def test_calls_are_timed_in_turn_and_errors_are_kept():
    order = []
    calls = {name: lambda name=name: order.append(name) or time.sleep(0.06) for name in "ab"}
    calls["bad"] = lambda: 1 / 0
    results = device_benchmark.in_turn(calls, 1)
    assert "".join(order[-4:]) == "abab" and min(results["a"], results["b"]) >= 0.06
    assert device_benchmark.first_line(results["bad"]) == "ZeroDivisionError: division by zero"


def test_our_side_runs():
    ours = benchmark.compare(TINY, 2, ["ours"])["ours"]
    assert len(ours["train"]) == 2 and min(ours["train"]) > 0
    assert ours["limit"] > 0
    assert ours["about"] == f"jax {jax.__version__}, cpu"


def test_a_worker_that_fails_is_reported():
    with pytest.raises(RuntimeError, match="worker ended"):
        benchmark.compare(dataclasses.replace(TINY, dtype="float99"), 1, ["ours"])


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
    shape = dataclasses.replace(TINY, dtype=dtype)
    assert set(benchmark.compare(shape, 1)) == {"ours", "transformers"}


@pytest.mark.oracle
def test_the_other_side_has_alibi_micro_batches_and_checkpoints():
    shape = dataclasses.replace(TINY, position="alibi", micro_batches=2, dtype="bfloat16")
    more = {"weights": "bfloat16", "checkpoint": True}
    settings = dataclasses.asdict(shape) | more
    side = interleave.run({"": (benchmark.their_side, settings)}, ["train"], ["about"], 2)[""]
    assert min(side["train"]) > 0 and side["about"].startswith("transformers")
