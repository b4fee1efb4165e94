"""Positions: RoPE in the 7B, ALiBi in the 13B (paper §2.2). All in float32.

bfloat16 holds no integer above 256 exactly, so neither positions nor what is
computed from them may pass through it (§2.5).

Legend: B batch, T time, H heads, K head width.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
    """Applies RoPE in the half-rotation layout: element i pairs with i + K/2.

    Args:
      x_BTHK: queries or keys, any float dtype.
      positions_BT: int32 position of each token in its document.
      base: the angle of pair i at position p is p · base^(-2i/K).

    Returns:
      The rotated array in the dtype of `x_BTHK`; the arithmetic is float32.
    """
    half = x_BTHK.shape[-1] // 2
    frequency = base ** (-np.arange(half, dtype=np.float64) / half)
    angle_BTK = positions_BT[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    cos, sin = jnp.cos(angle_BTK)[:, :, None, :], jnp.sin(angle_BTK)[:, :, None, :]
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes of ALiBi (Press et al. 2022), float32 [num_heads].

    A power of two n has 2^(-8k/n), k = 1 … n. Any other number takes those of the
    power p below it and then every second slope of 2p, so the 13B's 40 heads end
    with its eight steepest.
    """

    def geometric(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    power = 2 ** (num_heads.bit_length() - 1)
    extra = geometric(2 * power)[::2][: num_heads - power]
    return np.concatenate([geometric(power), extra]).astype(np.float32)
