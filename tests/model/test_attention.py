"""Blockwise attention beside a dense float64 reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.model import attention as attention_module
from baichuan_jax.model.attention import attention
from baichuan_jax.model.position import alibi_slopes

B, H, K = 2, 3, 8


def dense(q, k, v, q_pos, k_pos, q_seg, k_seg, slopes, d_out):
    """Output and gradients in float64, by the textbook formulas."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    distance = k_pos[:, None, :] - q_pos[:, :, None]
    visible = (q_seg[:, :, None] == k_seg[:, None]) & (distance <= 0) & (q_seg[:, :, None] > 0)
    s = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    s = s + slopes[:, None, None] * distance[:, None]
    e = np.where(visible[:, None], np.exp(s - s.max(-1, keepdims=True)), 0.0)
    p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhts,bshk->bthk", p, v)
    dp = np.einsum("bthk,bshk->bhts", d_out, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    dq = np.einsum("bhts,bshk->bthk", ds, k)
    dk = np.einsum("bhts,bthk->bshk", ds, q)
    dv = np.einsum("bhts,bthk->bshk", p, d_out)
    return out, dq, dk, dv


def packed(T, rng):
    """Positions and segments of rows with documents of random lengths and some padding."""
    positions, segments = np.zeros((2, B, T), np.int32)
    for row in range(B):
        start, number = 0, 1
        stop_all = T - int(rng.integers(0, 3))
        while start < stop_all:
            stop = min(stop_all, start + int(rng.integers(1, T)))
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = number
            start, number = stop, number + 1
    return positions, segments


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("T", [1, 16, 37, 64])
def test_matches_the_dense_formula(monkeypatch, T, position):
    monkeypatch.setattr(attention_module, "BLOCK", 16)
    rng = np.random.default_rng(T)
    q, k, v, d_out = rng.standard_normal((4, B, T, H, K)).astype(np.float32)
    positions, segments = packed(T, rng)
    slopes = alibi_slopes(H) if position == "alibi" else None

    def apply(q, k, v):
        return attention(q, k, v, positions, positions, segments, segments, slopes)

    out, transpose = jax.vjp(apply, q, k, v)
    got = (out, *transpose(jnp.asarray(d_out)))
    biased = np.zeros(H) if slopes is None else slopes
    want = dense(q, k, v, positions, positions, segments, segments, biased, d_out)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.asarray(out)[segments == 0].any()


@pytest.mark.parametrize("block", [16, 512])
def test_decodes_from_a_cache(monkeypatch, block):
    monkeypatch.setattr(attention_module, "BLOCK", block)
    rng = np.random.default_rng(0)
    S, T = 50, 3
    k, v = rng.standard_normal((2, B, S, H, K)).astype(np.float32)
    q, d_out = rng.standard_normal((2, B, T, H, K)).astype(np.float32)
    k_pos = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    k_seg = (k_pos < 40).astype(np.int32)
    k_seg[1, 5:9] = 0  # padding between prompt and continuation
    q_pos = np.tile(np.arange(37, 40, dtype=np.int32), (B, 1))
    ones = np.ones((B, T), np.int32)
    slopes = alibi_slopes(H)
    out = attention(q, k, v, q_pos, k_pos, ones, k_seg, slopes)
    want = dense(q, k, v, q_pos, k_pos, ones, k_seg, slopes, d_out)[0]
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_bfloat16_keeps_alibi_exact():
    """The bias is float32 even where queries and keys are bfloat16 (§2.2)."""
    T = 2_048
    zeros = jnp.zeros((1, T, 1, K), jnp.bfloat16)
    v = jnp.zeros((1, T, 1, K), jnp.bfloat16).at[0, T - 2].set(1.0)
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    ones = jnp.ones((1, T), jnp.int32)
    slope = np.float32([0.917004])
    out = attention(zeros, zeros, v, positions, positions, ones, ones, slope)
    weights = np.exp(-slope * np.arange(T, dtype=np.float64))
    np.testing.assert_allclose(float(out[0, -1, 0, 0]), weights[1] / weights.sum(), rtol=4e-3)


def test_no_buffer_of_all_pairs():
    T = 2_048
    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    where = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def total(q, k, v, positions, segments):
        return attention(q, k, v, positions, positions, segments, segments).sum()

    lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x, where, where)
    assert f"{T},{T}" not in lowered.compile().as_text()
