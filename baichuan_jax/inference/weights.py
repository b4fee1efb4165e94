"""A model as it is served: made layer by layer from wherever its weights are.

A served model differs from a trained one in four things, none of which changes what it computes:
its layers are a tuple of blocks instead of a stack, its weights have the dtype of the
computation, the head is already normalised (so `norm_head` is False), and matrices may be
quantised. Under a mesh each weight lies as it is computed with.

Legend: L layers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import NamedSharding

from baichuan_jax.config import ModelConfig
from baichuan_jax.inference import quantize
from baichuan_jax.model.transformer import Transformer, norm_head
from baichuan_jax.training.checkpoint import by_name

# (name, first row, past the last row) -> those rows of a parameter of the stacked model; rows of
# `layers.…` are layers. Asked for in order, one parameter after the other.
ReadRows = Callable[[str, int, int], np.ndarray | jax.Array]


def serve(
    config: ModelConfig,
    read: ReadRows,
    dtype: jnp.dtype,
    kind: str = "",
    progress: Callable[[int, str], None] = lambda done, name: None,
) -> Transformer:
    """Makes a served model on the current mesh, one weight of one layer at a time.

    Args:
      read: gives the weights, by the names that checkpoints have.
      kind: of quantisation, see `inference.quantize`; '' for none.
      progress: is told how many parameters are done, and the name of the last one.

    Raises:
      ValueError: as `read`, or a weight cannot be quantised; names it.
    """
    mesh = jax.sharding.get_mesh()
    model = quantize.abstract(config, dtype=dtype)
    leaves = by_name(model)
    stacks: dict[str, list[str]] = {}
    for name in leaves:
        stacks.setdefault(_stacked(name), []).append(name)
    loaded, done = {}, 0
    for stack, names in stacks.items():
        for row, name in enumerate(names):
            leaf = leaves[name]
            whole = name == stack
            x = read(stack, 0, leaf.shape[0]) if whole else read(stack, row, row + 1)[0]
            spec = P(*[None] * x.ndim) if leaf.sharding is None else leaf.sharding.spec
            x = jnp.asarray(x) if mesh.empty else jax.device_put(x, NamedSharding(mesh, spec))
            if name == "head" and config.norm_head:
                x = jax.jit(lambda head: norm_head(head.astype(jnp.float32)).astype(dtype))(x)
            x = x.astype(jnp.float32 if name.endswith(".gain") else dtype)
            if kind and quantize.is_linear(name):
                x = quantize.quantize_weight(name, x, kind, spec)
            loaded[name] = jax.block_until_ready(x)
            done += leaf.size
            progress(done, stack)
    return _filled(model, loaded)


def of_model(model: Transformer, config: ModelConfig, dtype: jnp.dtype) -> Transformer:
    """Makes a served model of a trained one, which stays as it is."""
    arrays = by_name(model)
    return serve(config, lambda name, start, stop: arrays[name][start:stop], dtype)


def _stacked(name: str) -> str:
    """`layers.3.mlp.down` as the stacked model calls it: `layers.mlp.down`."""
    first, _, rest = name.partition(".")
    return f"layers.{rest.partition('.')[2]}" if first == "layers" else name


def _filled(model: Transformer, loaded: dict) -> Transformer:
    """The abstract model with arrays, or quantised weights, in its places."""
    for name, x in loaded.items():
        *path, attribute = name.split(".")
        holder = model
        for part in path:
            holder = holder.layers if part == "layers" else _child(holder, part)
        quantised = not isinstance(x, jax.Array)
        setattr(holder, attribute, x if quantised else getattr(holder, attribute).replace(x))
    model.norm_head = False
    return model


def _child(holder, part: str):
    return holder[int(part)] if part.isdigit() else getattr(holder, part)
