"""Causal attention in blocks: neither the logits nor the mask ever exist whole (§2.7).

Who may see whom follows from positions and segments alone: a token attends to the
tokens of its own segment at its own or an earlier position. Packed documents and
padding (segment 0) are cases of this one rule; a key-value cache, where the key of
position j lies at index j, is another (`cached_attention`).

Legend: B batch, T queries, S keys, H heads, K head width; Q, J one block of T, S.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = "attention"  # the name of what the backward pass can find saved
BLOCK = 512  # queries or keys whose logits exist at one time
_MASKED = -1e30  # finite, so that a row that sees nothing gives zeros and not NaN


def attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    slopes_H: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention over the keys that each query may see.

    Logits are q·k/√K in float32, plus `slope · (key position - query position)` with
    ALiBi. Segment 0 sees nothing, is seen by nobody and yields zeros.

    Args:
      q_BTHK, k_BSHK, v_BSHK: queries, keys, values of one float dtype. Where T == S the
        keys are the queries' own tokens in the same order.
      q_positions_BT, k_positions_BS: int32 positions within the documents.
      q_segments_BT, k_segments_BS: int32 documents; 0 is padding.
      slopes_H: float32 ALiBi slopes, or None for none.

    Returns:
      [B, T, H, K] in the dtype of the queries.
    """
    if slopes_H is None:
        slopes_H = jnp.zeros(q_BTHK.shape[2], jnp.float32)
    kernel = _blockwise
    if not jax.sharding.get_abstract_mesh().empty:
        heads = jax.typeof(q_BTHK).sharding.spec
        slopes_H = jax.reshard(slopes_H, jax.P(heads[2]))
        kernel = jax.shard_map(_blockwise, out_specs=heads, check_vma=False)
    where = (q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS)
    return kernel(q_BTHK, k_BSHK, v_BSHK, *where, slopes_H)


def cached_attention(
    q_BTHK: jax.Array,
    k_BHSK: jax.Array,
    v_BHSK: jax.Array,
    q_positions_BT: jax.Array,
    slopes_H: jax.Array | None = None,
    k_scales_BHS: jax.Array | None = None,
    v_scales_BHS: jax.Array | None = None,
) -> jax.Array:
    """Attention of few queries to a cache that holds the key of position j at index j.

    The same logits as `attention`; softmax in float32. Whatever lies at indices above a query's
    position is not seen, so it need not be cleared.

    Args:
      q_BTHK: queries in a float dtype.
      k_BHSK, v_BHSK: keys and values in the queries' dtype, or int8 with scales.
      q_positions_BT: int32 positions of the queries.
      slopes_H: float32 ALiBi slopes, or None for none.
      k_scales_BHS, v_scales_BHS: float32; what an int8 key or value is multiplied with.

    Returns:
      [B, T, H, K] in the dtype of the queries.
    """
    f32, dtype = jnp.float32, q_BTHK.dtype
    q_BHTK = q_BTHK.transpose(0, 2, 1, 3)
    s = jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK.astype(dtype), preferred_element_type=f32)
    if k_scales_BHS is not None:
        s *= k_scales_BHS[:, :, None, :]
    distance_BTS = jnp.arange(k_BHSK.shape[2]) - q_positions_BT[:, :, None]
    s *= q_BTHK.shape[-1] ** -0.5
    if slopes_H is not None:
        s += slopes_H[:, None, None] * distance_BTS[:, None].astype(f32)
    p = jax.nn.softmax(jnp.where(distance_BTS[:, None] <= 0, s, _MASKED), axis=-1)
    if v_scales_BHS is not None:
        p *= v_scales_BHS[:, :, None, :]
    p = p.astype(dtype)
    y = jnp.einsum("bhts,bhsk->bhtk", p, v_BHSK.astype(dtype), preferred_element_type=f32)
    return y.astype(dtype).transpose(0, 2, 1, 3)


def _pad_to(x, axis: int, size: int):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _blockwise(q_BTHK, k_BSHK, v_BSHK, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, slopes_H):
    T, S = q_BTHK.shape[1], k_BSHK.shape[1]
    q_block, k_block = min(T, BLOCK), S if T * S <= BLOCK * BLOCK else min(S, BLOCK)
    q_size, k_size = -(-T // q_block) * q_block, -(-S // k_block) * k_block
    q = _pad_to(q_BTHK.transpose(0, 2, 1, 3), 2, q_size)
    k = _pad_to(k_BSHK.transpose(0, 2, 1, 3), 2, k_size)
    v = _pad_to(v_BSHK.transpose(0, 2, 1, 3), 2, k_size)
    q_where = _pad_to(jnp.stack([q_pos_BT, q_seg_BT]), 2, q_size)
    k_where = _pad_to(jnp.stack([k_pos_BS, k_seg_BS]), 2, k_size)
    out_BHTK = _flash((q_block, k_block, T == S), q, k, v, q_where, k_where, slopes_H)
    return out_BHTK[:, :, :T].transpose(0, 2, 1, 3)


def _take(x, axis: int, block, size: int):
    """Block number `block` of an axis; the whole array where there is only one."""
    if x.shape[axis] == size:
        return x
    return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _loop(start, stop, body, carry):
    """`fori_loop` that leaves no loop behind where there is only one block."""
    if isinstance(start, int) and isinstance(stop, int) and stop - start == 1:
        return body(start, carry)
    return jax.lax.fori_loop(start, stop, body, carry)


def _logits(q_BHQK, k_BHJK, q_where, k_where, slopes_H):
    """Scaled and biased float32 logits of one block pair and the mask beside them."""
    (q_pos, q_seg), (k_pos, k_seg) = q_where, k_where
    s = jnp.einsum("bhqk,bhjk->bhqj", q_BHQK, k_BHJK, preferred_element_type=jnp.float32)
    distance_BQJ = k_pos[:, None, :] - q_pos[:, :, None]
    s = s * q_BHQK.shape[-1] ** -0.5
    s += slopes_H[:, None, None] * distance_BQJ[:, None].astype(jnp.float32)
    visible_BQJ = (q_seg[:, :, None] == k_seg[:, None, :]) & (distance_BQJ <= 0)
    visible_BQJ &= q_seg[:, :, None] > 0
    return jnp.where(visible_BQJ[:, None], s, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(blocks, q, k, v, q_where, k_where, slopes_H):
    return _flash_forward(blocks, q, k, v, q_where, k_where, slopes_H)[0]


def _flash_forward(blocks, q, k, v, q_where, k_where, slopes_H):
    """Online softmax over key blocks; keeps the output and each row's log-sum-exp."""
    q_block, k_block, same_order = blocks
    B, H, T, K = q.shape
    q_count, k_count = T // q_block, k.shape[2] // k_block

    def rows(i, result):
        q_i, q_where_i = _take(q, 2, i, q_block), _take(q_where, 2, i, q_block)

        def accumulate(j, carry):
            out, top, total = carry
            s = _logits(
                q_i, _take(k, 2, j, k_block), q_where_i, _take(k_where, 2, j, k_block), slopes_H
            )
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.where(s > _MASKED, jnp.exp(s - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            v_j = _take(v, 2, j, k_block)
            update = jnp.einsum(
                "bhqj,bhjk->bhqk", p.astype(v.dtype), v_j, preferred_element_type=jnp.float32
            )
            return out * shrink[..., None] + update, new_top, total * shrink + p.sum(-1)

        start = (
            jnp.zeros((B, H, q_block, K), jnp.float32),
            jnp.full((B, H, q_block), _MASKED, jnp.float32),
            jnp.zeros((B, H, q_block), jnp.float32),
        )
        stop = _last_block(i, q_block, k_block, k_count) if same_order else k_count
        out, top, total = _loop(0, stop, accumulate, start)
        total = jnp.maximum(total, 1e-30)
        out = (out / total[..., None]).astype(q.dtype)
        lse = top + jnp.log(total)
        if q_count == 1:
            return out, lse
        return (
            jax.lax.dynamic_update_slice_in_dim(result[0], out, i * q_block, 2),
            jax.lax.dynamic_update_slice_in_dim(result[1], lse, i * q_block, 2),
        )

    empty = (jnp.zeros(q.shape, q.dtype), jnp.zeros(q.shape[:3], jnp.float32))
    out, lse = _loop(0, q_count, rows, empty)
    # Both, or the backward pass of a rematerialised layer would attend once more.
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, q_where, k_where, slopes_H, out, lse)


def _last_block(i, q_block: int, k_block: int, k_count: int):
    """One past the last key block that query block `i` can see when both run in order."""
    if k_count == 1:
        return 1
    return ((i + 1) * q_block + k_block - 1) // k_block


def _flash_backward(blocks, residuals, d_out):
    """Recomputes each block's probabilities from the saved log-sum-exp."""
    q, k, v, q_where, k_where, slopes_H, out, lse = residuals
    q_block, k_block, same_order = blocks
    q_count, k_count = q.shape[2] // q_block, k.shape[2] // k_block
    scale = q.shape[-1] ** -0.5
    f32 = jnp.float32
    delta_BHT = jnp.sum(d_out.astype(f32) * out.astype(f32), axis=-1)

    def columns(j, carry):
        k_j, v_j = _take(k, 2, j, k_block), _take(v, 2, j, k_block)
        k_where_j = _take(k_where, 2, j, k_block)

        def accumulate(i, carry):
            dq, dk_j, dv_j = carry
            q_i, d_out_i = _take(q, 2, i, q_block), _take(d_out, 2, i, q_block)
            s = _logits(q_i, k_j, _take(q_where, 2, i, q_block), k_where_j, slopes_H)
            p = jnp.where(s > _MASKED, jnp.exp(s - _take(lse, 2, i, q_block)[..., None]), 0.0)
            dp = jnp.einsum("bhqk,bhjk->bhqj", d_out_i, v_j, preferred_element_type=f32)
            ds = p * (dp - _take(delta_BHT, 2, i, q_block)[..., None]) * scale
            ds, p = ds.astype(q.dtype), p.astype(q.dtype)
            dv_j += jnp.einsum("bhqj,bhqk->bhjk", p, d_out_i, preferred_element_type=f32)
            dk_j += jnp.einsum("bhqj,bhqk->bhjk", ds, q_i, preferred_element_type=f32)
            dq_i = jnp.einsum("bhqj,bhjk->bhqk", ds, k_j, preferred_element_type=f32)
            if q_count == 1:
                return dq + dq_i, dk_j, dv_j
            dq_i += _take(dq, 2, i, q_block)
            return jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * q_block, 2), dk_j, dv_j

        start = (j * k_block) // q_block if same_order and q_count > 1 else 0
        dq, dk, dv = carry
        zero = jnp.zeros(k_j.shape, f32)
        dq, dk_j, dv_j = _loop(start, q_count, accumulate, (dq, zero, zero))
        if k_count == 1:
            return dq, dk_j, dv_j
        dk = jax.lax.dynamic_update_slice_in_dim(dk, dk_j, j * k_block, 2)
        dv = jax.lax.dynamic_update_slice_in_dim(dv, dv_j, j * k_block, 2)
        return dq, dk, dv

    carry = tuple(jnp.zeros(x.shape, f32) for x in (q, k, v))
    dq, dk, dv = _loop(0, k_count, columns, carry)
    return (*(d.astype(q.dtype) for d in (dq, dk, dv)), None, None, None)


_flash.defvjp(_flash_forward, _flash_backward)
