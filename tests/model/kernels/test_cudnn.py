"""What cuDNN is given: documents as offsets and lengths, statistics, the choice of blocks instead.

cuDNN itself runs on a GPU alone (`kernels.check` tries it there). Here its primitives are a few
lines that do what their interface says, so that what stands around them can be wrong.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.model.kernels import blockwise, cudnn
from baichuan_jax.model.position import alibi_slopes
from tests.model.kernels import dense

B, T, H, K = 2, 48, 3, 8


def _logits(q, k, lengths, offsets, scale):
    """Logits [H, N, N] of flat tokens, each token's document [N] and its place in it [N]."""
    index, (H, K) = jnp.arange(q.shape[0]), q.shape[1:]
    # One offset for each document that there is, in elements; the rest are the end.
    starts = offsets.reshape(-1)[: lengths.size] // (H * K)
    document = jnp.searchsorted(starts, index, side="right") - 1
    document = jnp.where(document < 0, 0, document)
    place = index - starts[document]
    inside = (place >= 0) & (place < lengths.reshape(-1)[document])
    seen = (document[:, None] == document) & (index <= index[:, None]) & inside
    s = scale * jnp.einsum("nhk,mhk->hnm", q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen & inside[:, None], s, -jnp.inf), document, place


def _fwd(q, k, v, bias, lengths, lengths_k, offsets, offsets_k, *pages, scale, **settings):
    assert settings["mask_type"].name == "PADDING_CAUSAL" and settings["is_training"]
    assert q.shape == k.shape == v.shape and bias.size == 0
    assert lengths.shape == (B, cudnn.DOCUMENTS) and offsets.shape == (B, cudnn.DOCUMENTS + 1)
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    s, document, place = _logits(*flat[:2], lengths, offsets, scale)
    p = jax.nn.softmax(s, -1)  # NaN where nothing is seen, as memory that nobody wrote may be
    lse = jax.nn.logsumexp(s, -1)
    statistics = jnp.full((lengths.size, q.shape[2], q.shape[1]), jnp.nan)
    statistics = statistics.at[document, :, place].set(lse.T, mode="drop")
    return jnp.einsum("hnm,mhk->nhk", p, flat[2]).reshape(q.shape), statistics


def _bwd(q, k, v, bias, lengths, _, offsets, __, *rest, scale, **settings):
    statistics, out, d_out = rest[-3:]
    q_, k_, v_, out_, d_out_ = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, out, d_out))
    s, document, place = _logits(q_, k_, lengths, offsets, scale)
    p = jnp.where(s > -jnp.inf, jnp.exp(s - statistics[document, :, place].T[..., None]), 0.0)
    dp = jnp.einsum("nhk,mhk->hnm", d_out_, v_)
    ds = p * (dp - jnp.einsum("nhk,nhk->hn", d_out_, out_)[..., None]) * scale
    dq, dk = jnp.einsum("hnm,mhk->nhk", ds, k_), jnp.einsum("hnm,nhk->mhk", ds, q_)
    return [x.reshape(q.shape) for x in (dq, dk, jnp.einsum("hnm,nhk->mhk", p, d_out_))]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    real = cudnn.primitive

    def primitive(direction, scale):
        bind = {"fwd": _fwd, "bwd": _bwd}[direction]
        return types.SimpleNamespace(bind=bind), real(direction, scale)[1]

    monkeypatch.setattr(cudnn, "primitive", primitive)


def _run(segments, positions, position):
    rng = np.random.default_rng(1)
    q, k, v, d_out = rng.standard_normal((4, B, T, H, K)).astype(np.float32)
    slopes = jnp.asarray(alibi_slopes(H)) if position == "alibi" else None

    def apply(q, k, v):
        return cudnn.attention(q, k, v, positions, segments, slopes)

    out, transpose = jax.vjp(apply, q, k, v)
    biased = np.zeros(H) if slopes is None else slopes
    where = (positions, positions, segments, segments)
    return (out, *transpose(jnp.asarray(d_out))), dense.attention(q, k, v, *where, biased, d_out)


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("seed", range(3))
def test_packed_rows_match_the_dense_formula(seed, position):
    positions, segments = dense.packed(B, T, np.random.default_rng(seed))
    assert cudnn._few(segments)
    for got, want in zip(*_run(segments, positions, position), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_heads_a_few_at_a_time(monkeypatch, position):
    """As many as there is space for in cuDNN's backward pass, at least one."""
    monkeypatch.setattr(cudnn, "SPACE", 1)
    positions, segments = dense.packed(B, T, np.random.default_rng(5))
    jax.clear_caches()  # of programs of all heads
    for got, want in zip(*_run(segments, positions, position), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)
    jax.clear_caches()


def test_more_tokens_than_32_bits_count_go_through_blocks(monkeypatch):
    monkeypatch.setattr(cudnn, "_attend", None)
    x = jax.ShapeDtypeStruct((1, 2**19, 32, 128), jnp.bfloat16)
    where = jax.ShapeDtypeStruct((1, 2**19), jnp.int32)
    out = jax.eval_shape(lambda x, at: cudnn.attention(x, x, x, at, at, None), x, where)
    assert out.shape == x.shape


def test_padding_before_and_between_documents():
    segments = np.repeat(np.int32([[0, 3, 0, 4], [5, 0, 6, 0]]), [7, 20, 3, 18], axis=1)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for got, want in zip(*_run(segments, positions, "alibi"), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)


def test_more_documents_than_there_is_room_for(monkeypatch):
    """Not one of them is cut off: such rows are attended to in blocks."""
    monkeypatch.setattr(cudnn, "DOCUMENTS", 4)
    segments = np.tile(np.arange(1, T + 1, dtype=np.int32) // 3 + 1, (B, 1))
    positions = np.tile(np.arange(T, dtype=np.int32) % 3, (B, 1))
    for got, want in zip(*_run(segments, positions, "rope"), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_row_may_have_more_documents_than_another_leaves():
    """The room is that of all rows together."""
    segments = np.ones((B, T), np.int32)
    segments[0] = np.arange(1, T + 1)
    assert cudnn.DOCUMENTS < T < B * cudnn.DOCUMENTS and cudnn._few(segments)


def test_another_jax_is_not_trusted(monkeypatch):
    monkeypatch.setattr(cudnn.jax, "__version_info__", (1, 0, 0))
    assert "has not been read" in cudnn.unfit("NVIDIA H200", "bfloat16", 128, True)


def test_what_is_saved_has_its_name():
    x = jax.ShapeDtypeStruct((B, T, H, K), jnp.float32)
    where = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def total(q, positions, segments):
        return cudnn.attention(q, q, q, positions, segments, None).sum()

    policy = jax.checkpoint_policies.save_only_these_names(blockwise.SAVED)
    program = jax.make_jaxpr(jax.grad(jax.checkpoint(total, policy=policy)))(x, where, where)
    assert str(program).count("= cond[") == 2  # forward once, backward once
