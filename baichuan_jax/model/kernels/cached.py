"""Attention of few queries to a key-value cache, for decoding.

Legend: B batch, T queries, S cache length, H heads, K head width.
"""

import jax
import jax.numpy as jnp


def attention(
    q_BTHK: jax.Array,
    k_BHSK: jax.Array,
    v_BHSK: jax.Array,
    q_positions_BT: jax.Array,
    slopes_H: jax.Array | None,
    k_scales_BHS: jax.Array | None,
    v_scales_BHS: jax.Array | None,
) -> jax.Array:
    """`model.attention.attention` to a cache that holds the key of position j at index j."""
    f32, dtype = jnp.float32, q_BTHK.dtype
    q_BHTK = q_BTHK.transpose(0, 2, 1, 3)
    s = jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK.astype(dtype), preferred_element_type=f32)
    if k_scales_BHS is not None:
        s *= k_scales_BHS[:, :, None, :]
    distance_BTS = jnp.arange(k_BHSK.shape[2]) - q_positions_BT[:, :, None]
    s *= q_BTHK.shape[-1] ** -0.5
    if slopes_H is not None:
        s += slopes_H[:, None, None] * distance_BTS[:, None].astype(f32)
    p = jax.nn.softmax(jnp.where(distance_BTS[:, None] <= 0, s, -1e30), axis=-1)
    if v_scales_BHS is not None:
        p *= v_scales_BHS[:, :, None, :]
    p = p.astype(dtype)
    y = jnp.einsum("bhts,bhsk->bhtk", p, v_BHSK.astype(dtype), preferred_element_type=f32)
    return y.astype(dtype).transpose(0, 2, 1, 3)
