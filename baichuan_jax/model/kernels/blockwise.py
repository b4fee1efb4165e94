"""Attention in blocks, by XLA on any platform: the form that the kernels are measured by (§2.7).

Legend: B batch, T tokens, H heads, K head width; Q, J one block of T as queries, as keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = "attention"  # the name of what the backward pass can find saved
BLOCK = 512  # queries, and keys, whose logits exist at one time
_MASKED = -1e30  # finite, so that a row that sees nothing gives zeros and not NaN


def attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    slopes_H: jax.Array | None,
) -> jax.Array:
    """`model.attention.attention` among tokens in order."""
    arguments = _by_block(q_BTHK, k_BTHK, v_BTHK, positions_BT, segments_BT, slopes_H)
    return _by_token(_flash(*arguments), q_BTHK.shape[1])


def forward(q_BTHK, k_BTHK, v_BTHK, positions_BT, segments_BT, slopes_H):
    """The same, and each row's log-sum-exp [B, H, T]: for a kernel that cannot always do it."""
    T = q_BTHK.shape[1]
    arguments = _by_block(q_BTHK, k_BTHK, v_BTHK, positions_BT, segments_BT, slopes_H)
    out, (*_, lse) = _flash_forward(*arguments)
    return _by_token(out, T), lse[:, :, :T]


def backward(q_BTHK, k_BTHK, v_BTHK, positions_BT, segments_BT, slopes_H, out, lse_BHT, d_out):
    """Gradients of queries, keys and values from what `forward` returned."""
    T = q_BTHK.shape[1]
    arguments = _by_block(q_BTHK, k_BTHK, v_BTHK, positions_BT, segments_BT, slopes_H)
    block, q = arguments[:2]
    out, d_out, lse = (
        _pad_to(x, 2, q.shape[2]) for x in (out.swapaxes(1, 2), d_out.swapaxes(1, 2), lse_BHT)
    )
    gradients = _flash_backward(block, (*arguments[1:], out, lse), d_out)
    return tuple(_by_token(d, T) for d in gradients[:3])


def _by_block(q_BTHK, k_BTHK, v_BTHK, positions_BT, segments_BT, slopes_H):
    """Arguments of `_flash`: whole blocks, heads before tokens."""
    T, H = q_BTHK.shape[1:3]
    if slopes_H is None:
        slopes_H = jnp.zeros(H, jnp.float32)
    block = min(T, BLOCK)
    size = -(-T // block) * block
    q, k, v = (_pad_to(x.swapaxes(1, 2), 2, size) for x in (q_BTHK, k_BTHK, v_BTHK))
    where = _pad_to(jnp.stack([positions_BT, segments_BT]), 2, size)
    return block, q, k, v, where, slopes_H


def _by_token(x_BHTK, T: int):
    return x_BHTK[:, :, :T].swapaxes(1, 2)


def _pad_to(x, axis: int, size: int):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


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
def _flash(block, q, k, v, where, slopes_H):
    return _flash_forward(block, q, k, v, where, slopes_H)[0]


def _flash_forward(block, q, k, v, where, slopes_H):
    """Online softmax over key blocks; keeps the output and each row's log-sum-exp."""
    B, H, T, K = q.shape
    count = T // block

    def rows(i, result):
        q_i, where_i = _take(q, 2, i, block), _take(where, 2, i, block)

        def accumulate(j, carry):
            out, top, total = carry
            k_j, v_j = _take(k, 2, j, block), _take(v, 2, j, block)
            s = _logits(q_i, k_j, where_i, _take(where, 2, j, block), slopes_H)
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.where(s > _MASKED, jnp.exp(s - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            update = jnp.einsum(
                "bhqj,bhjk->bhqk", p.astype(v.dtype), v_j, preferred_element_type=jnp.float32
            )
            return out * shrink[..., None] + update, new_top, total * shrink + p.sum(-1)

        start = (
            jnp.zeros((B, H, block, K), jnp.float32),
            jnp.full((B, H, block), _MASKED, jnp.float32),
            jnp.zeros((B, H, block), jnp.float32),
        )
        # Tokens are in order: none sees a later block.
        out, top, total = _loop(0, 1 if count == 1 else i + 1, accumulate, start)
        total = jnp.maximum(total, 1e-30)
        out = (out / total[..., None]).astype(q.dtype)
        lse = top + jnp.log(total)
        if count == 1:
            return out, lse
        return (
            jax.lax.dynamic_update_slice_in_dim(result[0], out, i * block, 2),
            jax.lax.dynamic_update_slice_in_dim(result[1], lse, i * block, 2),
        )

    empty = (jnp.zeros(q.shape, q.dtype), jnp.zeros(q.shape[:3], jnp.float32))
    out, lse = _loop(0, count, rows, empty)
    # Both, or the backward pass of a rematerialised layer would attend once more.
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, where, slopes_H, out, lse)


def _flash_backward(block, residuals, d_out):
    """Recomputes each block's probabilities from the saved log-sum-exp."""
    q, k, v, where, slopes_H, out, lse = residuals
    count = q.shape[2] // block
    scale = q.shape[-1] ** -0.5
    f32 = jnp.float32
    delta_BHT = jnp.sum(d_out.astype(f32) * out.astype(f32), axis=-1)

    def columns(j, carry):
        k_j, v_j, where_j = (_take(x, 2, j, block) for x in (k, v, where))

        def accumulate(i, carry):
            dq, dk_j, dv_j = carry
            q_i, d_out_i, where_i = (_take(x, 2, i, block) for x in (q, d_out, where))
            s = _logits(q_i, k_j, where_i, where_j, slopes_H)
            p = jnp.where(s > _MASKED, jnp.exp(s - _take(lse, 2, i, block)[..., None]), 0.0)
            dp = jnp.einsum("bhqk,bhjk->bhqj", d_out_i, v_j, preferred_element_type=f32)
            ds = p * (dp - _take(delta_BHT, 2, i, block)[..., None]) * scale
            ds, p = ds.astype(q.dtype), p.astype(q.dtype)
            dv_j += jnp.einsum("bhqj,bhqk->bhjk", p, d_out_i, preferred_element_type=f32)
            dk_j += jnp.einsum("bhqj,bhqk->bhjk", ds, q_i, preferred_element_type=f32)
            dq_i = jnp.einsum("bhqj,bhjk->bhqk", ds, k_j, preferred_element_type=f32)
            if count == 1:
                return dq + dq_i, dk_j, dv_j
            dq_i += _take(dq, 2, i, block)
            return jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * block, 2), dk_j, dv_j

        dq, dk, dv = carry
        zero = jnp.zeros(k_j.shape, f32)
        dq, dk_j, dv_j = _loop(j if count > 1 else 0, count, accumulate, (dq, zero, zero))
        if count == 1:
            return dq, dk_j, dv_j
        dk = jax.lax.dynamic_update_slice_in_dim(dk, dk_j, j * block, 2)
        dv = jax.lax.dynamic_update_slice_in_dim(dv, dv_j, j * block, 2)
        return dq, dk, dv

    carry = tuple(jnp.zeros(x.shape, f32) for x in (q, k, v))
    dq, dk, dv = _loop(0, count, columns, carry)
    return (*(d.astype(q.dtype) for d in (dq, dk, dv)), None, None)


_flash.defvjp(_flash_forward, _flash_backward)
