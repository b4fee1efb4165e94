"""ALiBi in extra columns: how far its logits are from slope · (j - i)."""

import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.model.kernels.columns import COLUMNS, with_alibi
from baichuan_jax.model.position import alibi_slopes

K = 128
SLOPES = alibi_slopes(40)  # the 13B's


def bias_errors(T: int, dtype) -> np.ndarray:
    """Errors [H] of the last query's logits, for the keys within 30 of the largest bias."""
    zeros = jnp.zeros((1, T, 40, K), dtype)
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    scale = K**-0.5
    q, k = with_alibi(zeros, zeros, positions, jnp.asarray(SLOPES), scale)
    assert q.shape[-1] == k.shape[-1] == K + COLUMNS and q.dtype == dtype
    q, k = (np.asarray(x, np.float32) for x in (q[0, -1], k[0]))
    logits_HT = np.zeros((40, T), np.float32)
    for column in range(K, K + COLUMNS):  # one after the other, as a kernel adds up
        logits_HT += q[:, column, None] * k[:, :, column].T
    logits_HT = (logits_HT * np.float32(scale)).astype(np.float64)
    want_HT = SLOPES.astype(np.float64)[:, None] * (np.arange(T) - (T - 1))
    # Softmax does not see what all keys of a query have in common.
    errors_HT = (logits_HT - logits_HT[:, -1:]) - want_HT
    return np.abs(np.where(want_HT > -30, errors_HT, 0.0)).max(-1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("T", "limit"), [(4_096, 0.001), (32_768, 0.005)])
def test_the_bias_is_right_where_it_matters(T, limit, dtype):
    assert bias_errors(T, dtype).max() < limit


def test_positions_restart_in_each_document():
    """Rows of short documents carry small numbers, whatever their place in the row."""
    positions = jnp.asarray([[0, 1, 2, 0, 1]], jnp.int32)
    x = jnp.ones((1, 5, 1, 8), jnp.bfloat16)
    q, k = with_alibi(x, x, positions, jnp.float32([0.5]), 1.0)
    bias = (q[..., 8:] * k[..., 8:]).sum(-1)[0, :, 0]
    np.testing.assert_array_equal(bias, [0, 0.5, 1, 0, 0.5])


def test_a_row_that_is_too_long_is_refused():
    x = jnp.zeros((1, 131_073, 1, 1), jnp.bfloat16)
    with pytest.raises(ValueError, match="131,072 tokens, not 131,073"):
        with_alibi(x, x, jnp.zeros((1, 131_073), jnp.int32), jnp.float32([0.5]), 1.0)
