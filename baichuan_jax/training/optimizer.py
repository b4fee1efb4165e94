"""AdamW as the paper runs it (§2.6): warm-up, cosine, decay on matrices only, clipping.

Parameters and moments are float32; what arrives here are float32 gradients of a
bfloat16 forward and backward pass.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from baichuan_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine to `final_learning_rate` at `num_steps`."""
    from_zero = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=num_steps,
        end_value=config.final_learning_rate,
    )
    return lambda step: from_zero(step + 1)  # a first step at rate zero would be wasted


def is_matrix(model: nnx.Module) -> nnx.Module:
    """True for matrices, false for norm gains, told apart by the spec of a single layer."""
    return jax.tree.map(
        lambda param: param.replace(len(param.spec) > 1),
        model,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def adamw(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW on gradients that are already clipped (see `clip`)."""
    return optax.adamw(
        schedule(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=is_matrix,
    )


def squared_norms(gradients: nnx.Module) -> dict[str, jax.Array]:
    """Sum of squares by parameter; for the stacked parameters of the layers, by layer."""

    def one(path, param):
        stacked = param[...].ndim > len(param.spec)
        axes = tuple(range(1, param[...].ndim)) if stacked else None
        return jnp.sum(jnp.square(param[...]), axis=axes)

    leaves = jax.tree_util.tree_leaves_with_path(
        gradients, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return {jax.tree_util.keystr(path).lstrip("."): one(path, param) for path, param in leaves}


def clip(gradients: nnx.Module, norm: jax.Array, limit: float) -> nnx.Module:
    """Scales the gradients so that their global norm does not pass `limit`."""
    return jax.tree.map(lambda g: g * jnp.minimum(1.0, limit / norm), gradients)
