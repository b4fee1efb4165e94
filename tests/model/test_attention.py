"""Attention on a CPU beside a dense float64 reference, and which kernel is chosen where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.model import attention as module
from baichuan_jax.model.attention import Cached, Packed, attention
from baichuan_jax.model.kernels import blockwise
from baichuan_jax.model.position import alibi_slopes
from tests.model.kernels import dense

B, H, K = 2, 3, 8


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("T", [1, 16, 37, 64])
def test_matches_the_dense_formula(monkeypatch, T, position):
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    rng = np.random.default_rng(T)
    q, k, v, d_out = rng.standard_normal((4, B, T, H, K)).astype(np.float32)
    positions, segments = dense.packed(B, T, rng)
    slopes = alibi_slopes(H) if position == "alibi" else None

    def apply(q, k, v):
        return attention(q, k, v, positions, Packed(segments), slopes)

    out, transpose = jax.vjp(apply, q, k, v)
    got = (out, *transpose(jnp.asarray(d_out)))
    biased = np.zeros(H) if slopes is None else slopes
    want = dense.attention(q, k, v, positions, positions, segments, segments, biased, d_out)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.asarray(out)[segments == 0].any()


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_decodes_from_a_cache(position):
    """Of a cache, a query sees what lies up to its own position, whatever lies beyond."""
    rng = np.random.default_rng(0)
    S, T = 50, 3
    k, v = rng.standard_normal((2, B, S, H, K)).astype(np.float32)
    q, d_out = rng.standard_normal((2, B, T, H, K)).astype(np.float32)
    q_pos = np.array([[37, 38, 39], [4, 5, 6]], np.int32)
    k_pos = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    ones = np.ones((B, S), np.int32)
    slopes = alibi_slopes(H) if position == "alibi" else None
    by_head = (jnp.asarray(x.swapaxes(1, 2)) for x in (k, v))
    out = attention(jnp.asarray(q), *by_head, q_pos, Cached(), slopes)
    biased = np.zeros(H) if slopes is None else slopes
    want = dense.attention(q, k, v, q_pos, k_pos, ones[:, :T], ones, biased, d_out)[0]
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_bfloat16_keeps_alibi_exact():
    """The bias is float32 even where queries and keys are bfloat16 (§2.2)."""
    T = 2_048
    zeros = jnp.zeros((1, T, 1, K), jnp.bfloat16)
    v = jnp.zeros((1, T, 1, K), jnp.bfloat16).at[0, T - 2].set(1.0)
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    ones = jnp.ones((1, T), jnp.int32)
    slope = np.float32([0.917004])
    out = attention(zeros, zeros, v, positions, Packed(ones), slope)
    weights = np.exp(-slope * np.arange(T, dtype=np.float64))
    np.testing.assert_allclose(float(out[0, -1, 0, 0]), weights[1] / weights.sum(), rtol=4e-3)


def test_no_buffer_of_all_pairs():
    T = 32_768
    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    where = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def total(q, k, v, positions, segments):
        return attention(q, k, v, positions, Packed(segments)).sum()

    lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x, where, where)
    compiled = lowered.compile()
    assert f"{T},{T}" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "kernel"),
    [
        (("tpu", "TPU v5 lite"), "bfloat16", 128, "splash"),
        (("gpu", "NVIDIA H100 80GB HBM3"), "bfloat16", 128, "cudnn"),
        (("gpu", "NVIDIA GH200 480GB"), "bfloat16", 64, "cudnn"),
        (("gpu", "NVIDIA H200"), "float32", 128, "blockwise"),
        (("gpu", "NVIDIA H200"), "bfloat16", 100, "blockwise"),
        (("gpu", "NVIDIA H200"), "bfloat16", 256, "blockwise"),
        (("tpu", "TPU v5 lite"), "float32", 128, "blockwise"),
        (("gpu", "NVIDIA A100-SXM4-80GB"), "bfloat16", 128, "blockwise"),
        (("cpu", "cpu"), "bfloat16", 128, "blockwise"),
    ],
)
def test_each_platform_has_its_kernel(device, dtype, head_size, kernel):
    assert module.choose.__wrapped__(*device, dtype, head_size, True) == kernel


def test_heads_may_be_wider_without_alibi():
    assert module.choose.__wrapped__("gpu", "NVIDIA H200", "bfloat16", 256, False) == "cudnn"


@pytest.fixture
def log(monkeypatch):
    """What is logged; choices are not kept, and tests of kernels are short."""
    monkeypatch.setattr(module, "choose", functools.cache(module.choose.__wrapped__))
    monkeypatch.setattr(module.check, "_T", 200)
    lines = []
    for level in ("info", "warning"):

        def write(text, *args, level=level):
            lines.append(f"{level}: {text % args}")

        monkeypatch.setattr(module.logging, level, write)
    return lines


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, log):
    """The test runs on the device in hand; here no kernel but one can be right."""

    def without_bias(q, k, v, positions, segments, slopes):
        return blockwise.attention(q, k, v, positions, segments, None)

    monkeypatch.setitem(module._KERNELS, "splash", without_bias)
    monkeypatch.setenv(module.VARIABLE, "splash")
    assert module.choose.__wrapped__("cpu", "cpu", "float32", 16, True) == "blockwise"
    assert "warning: Attention: splash is not used. ALiBi, whole rows: output is off" in log[0]
    assert log[1].endswith("blockwise (splash failed its test)")


def test_a_kernel_that_is_right_is_used_also_within_a_program(monkeypatch, log):
    """Its test is not traced into the program that asks for it, nor does it meet its mesh."""
    calls = []

    def another(*args):
        calls.append(args)
        return blockwise.attention(*args)

    monkeypatch.setitem(module._KERNELS, "splash", another)
    monkeypatch.setenv(module.VARIABLE, "splash")
    mesh = jax.make_mesh((2,), ("replica",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jnp.ones((2, 8, 3, 24))
    where = jnp.ones((2, 8), jnp.int32)

    @jax.jit
    def program(x, where):
        return attention(x, x, x, where, Packed(where), jnp.ones(3))

    with jax.set_mesh(mesh):
        split = jax.P("replica")
        got = program(jax.device_put(x, split), jax.device_put(where, split))
    np.testing.assert_allclose(got, 1.0, rtol=1e-6)
    where = "cpu, float32, heads of 24 with ALiBi"
    assert calls and log == [f"info: Attention on {where}: splash (BAICHUAN_ATTENTION says so)"]


def test_an_unknown_kernel_is_refused(monkeypatch):
    monkeypatch.setenv(module.VARIABLE, "flash")
    with pytest.raises(ValueError, match=r"BAICHUAN_ATTENTION=flash: .*splash, cudnn, blockwise"):
        module.choose.__wrapped__("cpu", "cpu", "float32", 16, True)
