"""The benchmark of attention: what it counts, what it compares, and that it goes on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.config import ModelConfig
from baichuan_jax.model.kernels import blockwise, cudnn
from baichuan_jax.model.position import alibi_slopes
from baichuan_jax.parallel import topology
from baichuan_jax.training import ahead, device_benchmark, widths_benchmark
from baichuan_jax.training import attention_benchmark as benchmark

LOAD = benchmark.Load("float32", 2, 8, 64, (32,))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Measurements that last as long as they must."""
    monkeypatch.setattr(device_benchmark, "_LEAST", 1e-9)
    monkeypatch.setattr(device_benchmark, "WARM_UP", 0)
    monkeypatch.setattr(device_benchmark, "product_size", lambda device: 16)


def test_flops_are_of_the_pairs_that_see_each_other():
    _, segments = device_benchmark.packed_rows(4, 16)
    visible = (segments[:, :, None] == segments[:, None]) & np.tri(16, dtype=bool)
    assert benchmark.flops(LOAD, 16, "packed", "forward") == 4 * visible.sum() * 2 * 8
    assert benchmark.flops(LOAD, 16, "whole", "backward") == 10 * 4 * (16 * 17 / 2) * 2 * 8


@pytest.mark.parametrize("kind", ["RoPE", "ALiBi"])
@pytest.mark.parametrize("rows", ["whole", "packed"])
def test_all_that_is_compared_computes_the_same(kind, rows):
    shape = LOAD.shape(32)
    q, k, v, d_out = jax.random.normal(jax.random.key(0), (4, *shape))
    where = map(jnp.asarray, benchmark._where(shape, rows))
    rest = (*where, jnp.asarray(alibi_slopes(2)) if kind == "ALiBi" else None)
    public = functools.partial(benchmark.public, "xla", rows == "packed")
    results = [
        (calls["forward"]()[0], *calls["backward"]())
        for calls in (
            benchmark.passes(kernel, (q, k, v), d_out, *rest)
            for kernel in (blockwise.attention, public)
        )
    ]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_table_on_a_cpu():
    lines = list(benchmark.table(LOAD, 1, ModelConfig(), jax.devices()[0]))
    for name in ("blockwise", "jax.nn xla"):
        found = [line for line in lines if line.startswith("    32 ") and name in line]
        assert [line.split()[1] for line in found] == ["RoPE", "ALiBi"]
        assert all(line.count("%") == 4 for line in found)
    assert sum(line.startswith("ALiBi beside RoPE by blockwise, 32 tokens") for line in lines) == 2
    assert "GB/s" in lines[-1] and "data sheet" not in lines[-1]


def test_what_fails_is_told_and_the_rest_is_measured(monkeypatch):
    def broken(q, k, v, positions_BT, segments_BT, slopes_H):
        raise NotImplementedError("no such\nkernel")

    found = {"broken": broken, "blockwise": blockwise.attention}
    monkeypatch.setattr(benchmark, "kernels", lambda *_: (found, ["broken IS NOT RIGHT HERE"]))
    lines = list(benchmark.table(LOAD, 1, ModelConfig(), jax.devices()[0]))
    assert lines[0] == "broken IS NOT RIGHT HERE"
    assert sum("NotImplementedError: no such" in line for line in lines) == 2
    assert sum("blockwise" in line and line.count("%") == 4 for line in lines) == 2
    assert any("not known" in line for line in lines)


def test_lengths_are_numbers():
    with pytest.raises(ValueError, match="--lengths=512,4k: '4k'"):
        next(benchmark.report(1, ["512", "4k"], {}))


def test_cudnn_does_not_end_the_run_where_it_is_not():
    lines = list(widths_benchmark.lines(LOAD.shape(16), "bfloat16", 1))
    assert len(lines) == 5 and all("NotImplementedError" in line for line in lines)
    assert "q and k 16 wide, v 8:" in lines[2]


@pytest.mark.aot
def test_every_program_compiles_for_a_gpu():
    pytest.importorskip("jax_plugins.xla_cuda13")
    device = ahead.devices(topology.parse("h200:1x1"))[0]
    here = jax.sharding.SingleDeviceSharding(device)

    def like(x, dtype=None):
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=here)

    load = benchmark.Load()
    shape = load.shape(4_096)
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)
    where = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=here)
    slopes = jax.ShapeDtypeStruct(shape[2:3], jnp.float32, sharding=here)
    for kernel in (cudnn.attention, blockwise.attention):
        forward, backward = benchmark._programs(kernel)
        arguments = (q, q, q, where, where, slopes)
        text = forward.lower(*arguments).compile().as_text()
        assert ("fmha" in text) == (kernel is cudnn.attention)
        transpose = jax.tree.map(like, jax.eval_shape(forward, *arguments)[1])
        backward.lower(transpose, q).compile()
    wide = jax.ShapeDtypeStruct((*shape[:-1], 136), jnp.bfloat16, sharding=here)
    statistics = jax.ShapeDtypeStruct((shape[0], shape[2], shape[1]), jnp.float32, sharding=here)
    text = widths_benchmark.forward.lower(wide, wide, q, 0.1).compile().as_text()
    assert "fmha" in text and "bf16[8,32,4096,128]" in text
    widths_benchmark.backward.lower(wide, wide, q, statistics, q, q, 0.1).compile()
