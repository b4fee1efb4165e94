"""What exists for speed on a CPU alone: a rule for projections, and memory that is kept.

Why `projection`: autodiff writes the weight's gradient of `btd,df->btf` as a product followed
by a transpose, which XLA's CPU backend runs at half (float32) to a quarter (bfloat16) of the
speed of the same product asked for directly as `btd,btf->df`. Keeping batch and time as two
axes matters too: flattened to one, the bfloat16 product falls back to the slow path again.
`jnp.einsum` sums shared axes in the order of the alphabet, and XLA copies a weight that lies
otherwise in memory: hence `c`, `h`, `k` for the axes of Q, K and V.

Measured on 23 November 2026, two cores of an AMD EPYC (Zen 5). The weight's gradient of 1,024
tokens, 512 -> 1,376, in GFLOP per CPU-second:

| | autodiff | flattened to 2-D | this file |
|---|---|---|---|
| jax 0.10.2 float32 / bfloat16 | 109 / 108 | 190 / 184 | 217 / 405 |
| jax 0.12.0.1 float32 / bfloat16 | 114 / 114 | 198 / 182 | 214 / 442 |

A whole training step of 27 M parameters (4 x 256 tokens, 6 scanned layers, AdamW; the smallest of
six to ten interleaved steps; jax 0.10.2) against autodiff, with every projection
written `btd,df->btf`: 1.25 times as fast in float32, 1.45 times in bfloat16; less where weights
have more axes, which autodiff multiplies at 80 to 95 percent of this speed in float32.
No gain: `optimization_barrier` around transposes (XLA turns them back into layouts).

Why `keep_memory`: glibc gives each large buffer back to the system when it is freed, and
the next one is cleared page by page; the step above spends a sixth of its time there.

Why `unroll`: a scan copies each layer's weights out of the stack and its gradients into it,
a tenth of the step above.
"""

import ctypes
import functools
import importlib.util

import jax
import jax.numpy as jnp


def keep_memory() -> None:
    """Lets the process reuse large buffers. For programs that train; before JAX sees a device.

    Does nothing where JAX may use an accelerator, or without glibc.
    """
    if jax.config.jax_platforms != "cpu" and _has_accelerator_plugin():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # of malloc.h
    mallopt(mmap_threshold, 2_000_000_000)
    mallopt(trim_threshold, 2_000_000_000)
    mallopt(arena_max, 1)  # other arenas are too small for large buffers


def unroll(num_layers: int) -> int:
    """How many layers a scan over them should unroll: all of a small model on one CPU, else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size > 1 or mesh.abstract_device.platform != "cpu":
        return 1
    return num_layers if num_layers <= 12 else 1


def _has_accelerator_plugin() -> bool:
    return any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))


def _gradient_spec(x: jax.Array) -> jax.P | None:
    """Where x is marked as reduced, its gradient has yet to be."""
    sharding = jax.typeof(x).sharding
    spec = sharding.spec
    return None if sharding.mesh.empty else jax.P(*spec.partitions, unreduced=spec.reduced)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def projection(
    equation: str, x: jax.Array, w: jax.Array, out_sharding: jax.P | None = None
) -> jax.Array:
    """`jnp.einsum(equation, x, w)` whose gradients are products XLA's CPU backend runs fast.

    Sums are in float32 whatever the operands. The values and gradients are those of autodiff up
    to the order of summation.

    Args:
      equation: `'btd,df->btf'` and its like: no `...`, no repeated letter within an operand, and
        every letter in exactly two of the operands and the result, so that each gradient is
        again one product: the letters of the other two, summed over what they share.
      x: activations, e.g. [B, T, D] or [B, T, H, K].
      w: weights, e.g. [D, F], [D, 3, H, K] or [H, K, D]; rounded to x's dtype. Its gradient comes
        back in its own dtype, so a float32 master weight gets an unrounded one.
      out_sharding: as in `jnp.einsum`, for a sum over a sharded axis; static.

    Returns:
      The product in x's dtype.
    """
    y = jnp.einsum(
        equation,
        x,
        w.astype(x.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
    return y.astype(x.dtype)


def _forward(equation, x, w, out_sharding):
    return projection(equation, x, w, out_sharding), (x, w)


def _backward(equation, out_sharding, residuals, g):
    x, w = residuals
    operands, y_axes = equation.split("->")
    x_axes, w_axes = operands.split(",")
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx = multiply(
        f"{y_axes},{w_axes}->{x_axes}", g, w.astype(x.dtype), out_sharding=_gradient_spec(x)
    )
    dw = multiply(f"{x_axes},{y_axes}->{w_axes}", x, g, out_sharding=_gradient_spec(w))
    return dx.astype(x.dtype), dw.astype(w.dtype)


projection.defvjp(_forward, _backward)
