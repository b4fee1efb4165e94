"""Positions: RoPE in the 7B, ALiBi in the 13B (paper §2.2). All in float32.

bfloat16 holds no integer above 256 exactly, so neither positions nor what is
computed from them may pass through it (§2.5).

RoPE is scaled where a model reads more tokens than it was trained with; the names and
numbers are those of Hugging Face's `modeling_rope_utils.py`. ALiBi is read as it is.

Legend: B batch, T time, H heads, K head width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Rope:
    """What RoPE turns queries and keys by; hashable, so that it can stand in a module.

    Attributes:
      frequencies: radians from one position to the next, of each of the K/2 pairs.
      attention_factor: of cos and sin, so its square is that of the logits.
    """

    frequencies: tuple[float, ...]
    attention_factor: float = 1.0


def rope(config: ModelConfig) -> Rope:
    """The angles of a config, in float64: base^(-2i/K) for pair i, scaled as `rope_scaling` says.

    '': as they are.
    'linear' (position interpolation, Chen et al. 2023): all are divided by the factor.
    'ntk' (NTK-aware): the base times factor^(K/(K-2)), so that the fastest pair stays and the
      slowest is divided by the factor. Hugging Face's 'dynamic' chooses the base by the length of
      each text, which one program for all lengths cannot; its base for a text of n times the
      original length is this one with factor n where its own factor is 1, and with
      f·n - (f - 1) where that is f.
    'yarn' (Peng et al. 2023): pairs that turn `yarn_beta_fast` times or more in
      `rope_original_length` positions stay, those that turn `yarn_beta_slow` times or less are
      divided by the factor, and between the two it is a mean whose weights go in a straight line
      from one whole pair to another. Cos and sin are multiplied by 0.1 ln(factor) + 1.
    """
    size, factor = config.head_size, config.rope_factor
    pair = np.arange(size // 2, dtype=np.float64)
    frequency = config.rope_base ** (-2.0 * pair / size)
    attention_factor = 1.0
    if config.rope_scaling == "linear":
        frequency /= factor
    elif config.rope_scaling == "ntk":
        frequency *= factor ** (-pair / max(size // 2 - 1, 1))
    elif config.rope_scaling == "yarn":

        def pair_of(turns: float) -> float:
            wavelength = config.rope_original_length / turns
            return size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_base))

        low = max(math.floor(pair_of(config.yarn_beta_fast)), 0)
        high = min(math.ceil(pair_of(config.yarn_beta_slow)), size - 1)
        # As Hugging Face does where both ends are one pair.
        slow = np.clip((pair - low) / (high - low if high != low else 0.001), 0, 1)
        frequency *= 1 - slow + slow / factor
        attention_factor = 0.1 * math.log(factor) + 1
    return Rope(tuple(frequency.tolist()), attention_factor)


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, turn: Rope) -> jax.Array:
    """Applies RoPE in the half-rotation layout: element i pairs with i + K/2.

    Args:
      x_BTHK: queries or keys, any float dtype.
      positions_BT: int32 position of each token in its document.

    Returns:
      The rotated array in the dtype of `x_BTHK`; the arithmetic is float32.
    """
    frequency = np.asarray(turn.frequencies, np.float32)
    angle_BTK = positions_BT[..., None].astype(jnp.float32) * frequency
    cos, sin = (turn.attention_factor * f(angle_BTK)[:, :, None] for f in (jnp.cos, jnp.sin))
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


def within_documents(segments_BT: np.ndarray) -> np.ndarray:
    """Each token's place in its document, int32 [B, T]; `segments_BT` as of packed rows."""
    starts_BT = np.pad(segments_BT, [(0, 0), (1, 0)])[:, :-1] != segments_BT
    index_T = np.arange(segments_BT.shape[1], dtype=np.int32)
    return index_T - np.maximum.accumulate(np.where(starts_BT, index_T, 0), axis=1)
