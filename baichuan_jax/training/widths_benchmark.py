"""cuDNN's attention by the widths of its heads: what columns for a bias cost (`kernels.columns`).

Whole rows and no bias, so that values may be narrower than queries and keys, as they may not where
rows are packed.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from baichuan_jax.model.kernels import columns, cudnn
from baichuan_jax.training import device_benchmark


def lines(shape: tuple[int, int, int, int], dtype: str, rounds: int) -> Iterator[str]:
    """A line for each pair of widths, beside that of the head as it is.

    Args:
      shape: [B, T, H, K] of queries.
    """
    K, calls, results = shape[-1], {}, {}
    wide = K + columns.COLUMNS
    pairs = [(K, K), (wide, wide), (wide, K), (K + 16, K + 16), (K + 64, K + 64)]
    for pair in pairs:
        sizes = (pair[0], pair[0], pair[1], pair[1])
        q, k, v, d_out = (
            jax.random.normal(jax.random.key(number), (*shape[:-1], size), dtype)
            for number, size in enumerate(sizes)
        )
        try:
            for which, call in _passes(q, k, v, d_out, K**-0.5).items():
                calls[pair, which] = call
        except Exception as error:  # of cuDNN, of any kind
            results[pair, "forward"] = error
    results |= device_benchmark.in_turn(calls, rounds)
    for pair in pairs:
        told = []
        for which in ("forward", "backward"):
            found, usual = results.get((pair, which)), results.get((pairs[0], which))
            if isinstance(found, Exception):
                told.append(f"{which} {device_benchmark.first_line(found)}")
            elif found is not None:
                times = f" ({found / usual:.2f} ×)" if isinstance(usual, float) else ""
                told.append(f"{which} {1e3 * found:.2f} ms{times}")
        yield f"cuDNN, whole rows, q and k {pair[0]} wide, v {pair[1]}: {', '.join(told)}"


@functools.partial(jax.jit, static_argnums=3)
def forward(q_BTHK, k_BTHK, v_BTHK, scale: float):
    """Output and statistics of causal attention without documents."""
    primitive, settings = _primitive("fwd", scale)
    return primitive.bind(*_operands(q_BTHK, k_BTHK, v_BTHK), **settings, is_training=True)


@functools.partial(jax.jit, static_argnums=6)
def backward(q_BTHK, k_BTHK, v_BTHK, statistics, out, d_out, scale: float):
    """Gradients of queries, keys and values."""
    primitive, settings = _primitive("bwd", scale)
    operands = _operands(q_BTHK, k_BTHK, v_BTHK)
    return primitive.bind(*operands, statistics, out, d_out, **settings)


def _passes(q, k, v, d_out, scale):
    out, statistics = forward(q, k, v, scale)
    return {
        "forward": lambda: forward(q, k, v, scale),
        "backward": lambda: backward(q, k, v, statistics, out, d_out, scale),
    }


def _operands(q, k, v):
    none = jnp.zeros(0, q.dtype)  # no bias, lengths, offsets or pages
    return (q, k, v, *[none] * 7)


def _primitive(direction: str, scale: float):
    primitive, settings = cudnn.primitive(direction, scale)  # what is private to JAX stands there
    return primitive, settings | {"mask_type": type(settings["mask_type"]).CAUSAL}
