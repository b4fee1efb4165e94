"""ALiBi by extra columns of queries and keys, for kernels that know no bias (§2.7).

The bias slope · (j - i) differs from slope · j by a constant of the query's row, which softmax does
not see. So a query takes the slope into further columns of its head, a key its position, and the
product of both adds the bias to the logit. bfloat16 holds neither exactly: the slope is the sum of
two terms, the position that of two integers of 8 bits each, and their products are exact in the
float32 in which a kernel adds up. For the keys that matter, those within 30 of a logit below the
largest bias, the bias is then wrong by less than 0.001 at 4,096 tokens and 0.005 at 32,768, where
positions in bfloat16 would be wrong by 15 and 118.

Legend: B batch, T tokens, H heads, K head width, C columns.
"""

import jax
import jax.numpy as jnp

COLUMNS = 8  # four are used; kernels want the width in eighths
LONGEST = 131_072  # tokens of a row; bfloat16 holds integers up to 256, and their multiples


def with_alibi(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    positions_BT: jax.Array,
    slopes_H: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys, wider by COLUMNS, whose products carry the bias.

    Args:
      q_BTHK, k_BTHK: of the same tokens, in one float dtype.
      positions_BT: int32, each below T.
      slopes_H: float32.
      scale: what the kernel multiplies products with before softmax.

    Returns:
      Both as [B, T, H, K + COLUMNS], in their dtype.

    Raises:
      ValueError: there are more than LONGEST tokens.
    """
    T = positions_BT.shape[1]
    if T > LONGEST:
        raise ValueError(
            f"ALiBi in columns reaches {LONGEST:,} tokens, not {T:,}: set "
            "BAICHUAN_ATTENTION=blockwise, which has no limit."
        )
    dtype, bf16 = q_BTHK.dtype, jnp.bfloat16
    slope_H = slopes_H / scale
    coarse_H = slope_H.astype(bf16).astype(jnp.float32)
    fine_H = (slope_H - coarse_H).astype(bf16).astype(jnp.float32)
    # Around the middle, where numbers are half as large and float32's last digit half as coarse.
    j_BT = positions_BT - T // 512 * 256
    high_BT, low_BT = j_BT // 256 * 256, j_BT % 256

    def widened(x_BTHK, *columns):
        shape = x_BTHK.shape[:3]
        columns = [jnp.broadcast_to(column, shape).astype(dtype) for column in columns]
        columns += [jnp.zeros(shape, dtype)] * (COLUMNS - len(columns))
        return jnp.concatenate([x_BTHK, jnp.stack(columns, -1)], -1)

    high, low = high_BT[..., None], low_BT[..., None]
    q = widened(q_BTHK, coarse_H, coarse_H, fine_H, fine_H)
    return q, widened(k_BTHK, high, low, high, low)
