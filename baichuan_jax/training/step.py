"""One training step, the same for every loss: pre-training, and later SFT, reward model, DPO.

A loss is a pure function `(model, batch) -> (sum, count, sums)`: sums over tokens, not
means, so that adding them up over micro-batches and devices is exact whatever the
number of tokens in each.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from baichuan_jax.config import Config, ModelConfig, TrainingConfig, listed
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel import zero
from baichuan_jax.training import optimizer
from baichuan_jax.training.loss import next_token_loss

Batch = dict[str, jax.Array]
Loss = Callable[[nnx.Module, Batch], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a step changes: float32 master weights and AdamW's moments."""

    step: jax.Array  # int32: updates made so far
    model: nnx.Module
    opt_state: optax.OptState


def pretraining_loss(model: ModelConfig, training: TrainingConfig) -> Loss:
    """Next-token loss of packed rows (see `data.stream` for the batch's arrays)."""

    def loss(module: Transformer, batch: Batch):
        hidden_BTD = module(
            batch["tokens_BT"],
            batch["positions_BT"],
            batch["segments_BT"],
            dtype=jnp.dtype(training.compute_dtype),
            remat=training.remat,
            offload=listed(training.offload),
        )
        return next_token_loss(
            hidden_BTD,
            module.output_table(hidden_BTD),
            batch["targets_BT"],
            batch["mask_BT"],
            vocab_size=model.vocab_size,
            max_z_weight=training.max_z_weight,
            chunk=training.loss_chunk,
        )

    return loss


def create_model(config: ModelConfig, seed: int, mesh: jax.sharding.Mesh) -> Transformer:
    """Random weights, each device making only what it stores; the same on every mesh."""

    def create(key):
        return Transformer(key, config)

    key = jax.random.key(seed)
    stored = zero.shardings(jax.eval_shape(create, key), mesh)
    # Inside a mesh of explicit axes every device would make all of it.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.jit(create, out_shardings=stored)(key)


def create_state(
    model: Transformer, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """A state at step 0; the moments are stored as their weights are."""
    with jax.set_mesh(mesh):
        step = jnp.zeros((), jnp.int32, device=NamedSharding(mesh, P()))
        return TrainState(step, model, jax.jit(tx.init)(model))


def abstract_state(
    config: Config, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of `create_state`'s result, without making it."""
    key = jax.random.key(0)
    model = jax.eval_shape(lambda key: Transformer(key, config.model), key)
    model = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        model,
        zero.shardings(model, mesh),
    )
    with jax.set_mesh(mesh):
        step = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(step, model, jax.eval_shape(tx.init, model))

    def concrete(x):
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, state)


def gradients(
    loss: Loss,
    model: nnx.Module,
    batch: Batch,
    micro_batches: int = 1,
    placement: zero.Placement | None = None,
):
    """Gradients of the loss per token over the batch, and the sums beside them.

    Args:
      batch: arrays [rows, …]. With several micro-batches each device takes every so many-th
        of its own rows at a time, so that no row moves.
      placement: where weights are held during the step; None: where they are stored.

    Returns:
      (gradients, count, sums), with `loss` among the sums.
    """

    def one(batch):
        def scalar(held):
            total, count, sums = loss(held, batch)
            return total, (count, {"loss": total, **sums})

        (_, (count, sums)), grads = jax.value_and_grad(scalar, has_aux=True)(held)
        return grads, count, sums

    def empty(x):
        dtype = placement.sum_dtype(x) if placement else x.dtype
        return jnp.zeros(x.shape, dtype, device=x.sharding)

    def add(carry, batch):
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), carry, one(batch)), None

    held, release = model, lambda gradients: gradients
    if placement:
        held, release = zero.hold(model, placement, micro_batches)
    if micro_batches == 1:
        grads, count, sums = one(batch)
    else:
        stacked = {name: _split_rows(x, micro_batches) for name, x in batch.items()}
        like = jax.eval_shape(lambda stacked: one({k: x[0] for k, x in stacked.items()}), stacked)
        (grads, count, sums), _ = jax.lax.scan(add, jax.tree.map(empty, like), stacked)
    per_token = 1 / jnp.maximum(count, 1)
    return jax.tree.map(lambda g: g * per_token, release(grads)), count, sums


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[rows, …] to [parts, rows / parts, …], every device keeping its rows."""
    shape = (x.shape[0] // parts, parts, *x.shape[1:])
    spec = None
    if not jax.sharding.get_abstract_mesh().empty:
        rows, *rest = jax.typeof(x).sharding.spec
        spec = P(rows, None, *rest)
    return jnp.swapaxes(jnp.reshape(x, shape, out_sharding=spec), 0, 1)


def train_step(
    state: TrainState,
    number: jax.Array | int,
    batch: Batch,
    *,
    loss: Loss,
    tx: optax.GradientTransformation,
    clip_norm: float,
    micro_batches: int = 1,
    placement: zero.Placement | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One AdamW update. A step whose loss or gradient is not finite changes no weight.

    Nor does any after it: whoever reads the results later finds the weights that it met.

    Args:
      number: of this step, from 1; the state changes only where it is the next one.

    Returns:
      The new state and the metrics: sums over tokens as the loss names them, `tokens`,
      `gradient_norm` before clipping, and `squared_norms` by parameter and layer.
    """
    grads, count, sums = gradients(loss, state.model, batch, micro_batches, placement)
    squares = optimizer.squared_norms(grads)
    norm = jnp.sqrt(sum(jnp.sum(square) for square in squares.values()))
    good = jnp.isfinite(norm) & jnp.isfinite(sums["loss"]) & (number == state.step + 1)
    grads = optimizer.clip(grads, norm, clip_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.model)
    model = optax.apply_updates(state.model, updates)
    new = TrainState(state.step + 1, model, opt_state)
    state = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state)
    metrics = {**sums, "tokens": count, "gradient_norm": norm, "squared_norms": squares}
    return state, metrics


def compiled_step(
    config: Config,
    loss: Loss,
    tx: optax.GradientTransformation,
    compiler_options: dict[str, bool | int] | None = None,
) -> Callable:
    """`train_step` of a config, jitted: (state, number, batch) -> (state, metrics).

    The state that it is given is gone afterwards.

    Args:
      compiler_options: see `parallel.flags`.
    """
    training = config.training
    step = functools.partial(
        train_step,
        loss=loss,
        tx=tx,
        clip_norm=config.optimizer.clip_norm,
        micro_batches=training.micro_batches,
        placement=zero.Placement(config.zero, jnp.dtype(training.compute_dtype)),
    )
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options or None)


def first_nonfinite(loss: Loss, model: nnx.Module, batch: Batch, micro_batches: int = 1) -> str:
    """Names the tensor in which NaN or Inf appears first: a weight, the loss, or a gradient.

    Gradients are searched in the order in which the backward pass makes them: the head
    first, then the layers from the last to the first, then the embedding.
    """

    def bad(tree):
        squares = jax.jit(optimizer.squared_norms)(tree)
        return {name: ~jnp.isfinite(square) for name, square in squares.items()}

    outside = {"embedding": -1, "norm.gain": 1 << 30, "head": 1 << 31}  # the layers lie between

    def backward_order(found):
        for name, flags in found.items():
            for layer in jnp.flatnonzero(jnp.atleast_1d(flags)).tolist():
                in_stack = name.startswith("layers.")
                depth = layer if in_stack else outside[name]
                yield depth, f"layer {layer}: {name}" if in_stack else name

    weights = sorted(backward_order(bad(model)))
    if weights:
        return f"weight {weights[0][1]}"
    again = jax.jit(lambda model, batch: gradients(loss, model, batch, micro_batches))
    grads, _, sums = again(model, batch)
    if not jnp.isfinite(sums["loss"]):
        return "the loss of the forward pass (all weights are finite)"
    found = sorted(backward_order(bad(grads)), reverse=True)
    return f"gradient of {found[0][1]}" if found else "no tensor on a second look"
