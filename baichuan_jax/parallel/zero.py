"""Where weights, gradients and optimizer state live: hybrid, hierarchical ZeRO (paper §2.7).

The model says how a weight is split over `tensor` while it is computed with. Here the rest is
said. Master weights and AdamW's moments are stored in float32, divided over all devices. A group
of weights is held in the compute dtype during a step in one of three ways:

| placement | divided over | gathers in a step of K micro-batches | held for each device |
|---|---|---|---|
| 'replicated' (ZeRO-1) | nothing | one, of all | 2 bytes a parameter |
| 'hierarchical' | `fsdp` | one over `replica`, 2 K over `fsdp` | 2 / fsdp |
| 'full' (ZeRO-3) | `fsdp` and `replica` | 2 K over both | nothing |

A gather has two stages, first over the slow `replica`, then over `fsdp`, and its transpose
reduces the gradient in two stages, the other way round, so that the slow links carry 1 / fsdp of
the bytes. That is why a dimension is stored over `('fsdp', 'replica')`, `fsdp` being the major
one: what the first stage leaves is a shard of `fsdp`.

With one micro-batch every layer gathers its own weights where it computes and its gradients are
reduced where they arise, so that both are hidden behind compute and no gradient is held whole.
What the backward pass finds of a gather then is a matter of rematerialisation: `Route.keep` names
the stage that is kept. With several micro-batches what can be held is gathered once before
them, its gradients add up without being reduced, and are reduced once after them.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from baichuan_jax.config import BATCH_AXES, PLACEMENTS, ZeroConfig
from baichuan_jax.model.transformer import WEIGHTS, Transformer, norm_head

REPLICA_AXIS, FSDP_AXIS = BATCH_AXES


def axes_of(entry) -> tuple[str, ...]:
    """The mesh axes of one dimension of a spec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _entry(axes: tuple[str, ...]):
    """One dimension of a spec: the axis where it is one, None where there is none."""
    return axes[0] if len(axes) == 1 else axes or None


def stored_spec(spec: P, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """The spec a weight is stored with: `fsdp` and `replica` join dimensions that they divide.

    Both join the largest dimension that their product divides, one that is not split over
    `tensor` before one that is; failing that, two different dimensions; failing that, as many of
    them join as divide one, and the others hold copies. Norm gains (one dimension) stay whole.
    `shape` may have more dimensions in front (stacked layers), which stay whole.
    """
    stacked = len(shape) - len(spec)
    entries = [axes_of(entry) for entry in (*[None] * stacked, *spec)]
    if len(spec) == 1:
        return P(*[None] * stacked, *spec)

    def join(*axes: str) -> bool:
        def parts(axis):
            return [mesh.shape[name] for name in (*entries[axis], *axes)]

        def fits(axis):
            return shape[axis] % functools.reduce(int.__mul__, parts(axis)) == 0

        def rank(axis):
            return mesh.shape[entries[axis][0]] == 1 if entries[axis] else 1, shape[axis], -axis

        dimensions = [axis for axis in range(stacked, len(shape)) if fits(axis)]
        if dimensions:
            entries[max(dimensions, key=rank)] += axes
        return bool(dimensions)

    several = [axis for axis in (FSDP_AXIS, REPLICA_AXIS) if mesh.shape[axis] > 1]
    if several and not join(*several):
        for axis in several:
            join(axis)
    return P(*map(_entry, entries))


def shardings(model: nnx.Module, mesh: jax.sharding.Mesh) -> nnx.Module:
    """The model's tree with a `NamedSharding` in place of each array."""

    def one(param: nnx.Param) -> nnx.Param:
        spec = stored_spec(param.spec, param.shape, mesh)
        return param.replace(NamedSharding(mesh, spec))

    return _map(one, model)


def _map(function: Callable, *trees):
    return jax.tree.map(function, *trees, is_leaf=lambda x: isinstance(x, nnx.Variable))


@dataclasses.dataclass(frozen=True)
class Route:
    """How a weight comes to where it is computed with, and its gradient back.

    Attributes:
      stages: specs from where the weight is held to where it is computed with. Each but the
        first is marked as reduced over the axes that are gathered by then.
      keep: number of the stage that the backward pass finds kept; 0: it gathers again.
      gradient_dtype: in which devices reduce.
    """

    stages: tuple[P, ...]
    keep: int
    gradient_dtype: str

    def __call__(self, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The weight in `dtype`: cast first, then gathered."""
        if len(self.stages) == 1:
            return w.astype(dtype)
        return _bring(w, self, jnp.dtype(dtype), w.dtype)

    def back(self, gradient: jax.Array) -> jax.Array:
        """Reduces a gradient, of a layer or of a stack of them, to where the weight is held."""
        gradient = gradient.astype(self.gradient_dtype)
        for spec in reversed(self.stages[:-1]):
            stack = [None] * (gradient.ndim - len(spec.partitions))
            # Where the weight is reduced, its gradient has yet to be.
            gradient = jax.reshard(gradient, P(*stack, *spec.partitions, unreduced=spec.reduced))
        return gradient


def _forward(w, route, dtype, _):
    w = w.astype(dtype)
    for number, spec in enumerate(route.stages[1:], 1):
        w = jax.reshard(w, spec)
        if number == route.keep:
            w = checkpoint_name(w, WEIGHTS)
    return w


# Not autodiff's own transpose, which would reduce in the compute dtype.
_bring = jax.custom_vjp(_forward, nondiff_argnums=(1, 2, 3))
_bring.defvjp(
    lambda w, *how: (_forward(w, *how), None),
    lambda route, _, stored, __, gradient: (route.back(gradient).astype(stored),),
)


def layer_groups(config: ZeroConfig, num_layers: int) -> list[tuple[str, int]]:
    """Placement and number of layers of each group, in the order of the layers."""
    counts = (
        config.replicated_layers,
        num_layers - config.replicated_layers - config.full_layers,
        config.full_layers,
    )
    return [group for group in zip(PLACEMENTS, counts, strict=True) if group[1]]


@dataclasses.dataclass(frozen=True)
class Placement:
    """`ZeroConfig` for a computation in `dtype`."""

    config: ZeroConfig
    dtype: jnp.dtype

    def sum_dtype(self, gradient: jax.Array) -> jnp.dtype:
        """In which the gradients of micro-batches add up."""
        return jnp.promote_types(gradient.dtype, self.config.gradient_dtype)


def hold(
    model: Transformer, placement: Placement, micro_batches: int
) -> tuple[Transformer, Callable[[Transformer], Transformer]]:
    """The model as the micro-batches of a step use it, and the way back for its gradients.

    Args:
      model: float32 master weights, divided as `stored_spec` says.

    Returns:
      The model with its layers in groups of one placement each, with every weight its `Route`,
      and the head normalised. And a function that takes gradients by that model, summed over
      the micro-batches, to float32 gradients by `model`, reduced over all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return model, lambda gradients: gradients
    config, dtype = placement.config, placement.dtype
    groups = layer_groups(config, model.layers.mlp_norm.gain.shape[0])

    def split(model: Transformer) -> Transformer:
        """In float32 and as stored: a part of this that autodiff takes back by itself."""
        parts, start = _map(lambda param: param, model), 0
        parts.layers = ()
        for _, count in groups:
            layers = slice(start, start := start + count)
            parts.layers += (jax.tree.map(lambda x, layers=layers: x[layers], model.layers),)
        if model.norm_head:
            parts.head, parts.norm_head = model.head.replace(norm_head(model.head[...])), False
        return parts

    def by_placement(function: Callable, first: Transformer, *rest: Transformer) -> Transformer:
        """`first` with each weight made by the function from its placement and the weights."""
        new = _map(lambda param: param, first)
        for name in ("embedding", "head"):
            weights = (getattr(tree, name) for tree in (first, *rest))
            setattr(new, name, function(getattr(config, name), *weights))
        new.layers = tuple(
            _map(functools.partial(function, placement), *stacks)
            for (placement, _), *stacks in zip(
                groups, *(tree.layers for tree in (first, *rest)), strict=True
            )
        )
        return new

    def routes(placement: str, param: nnx.Param) -> tuple[Route, Route]:
        """From where the weight is stored to where it is held, and from there on."""
        stages, at = _stages(param, mesh), PLACEMENTS[::-1].index(placement)
        held, keep = (0, at) if micro_batches == 1 else (at, 0)
        before = Route(stages[: held + 1], 0, config.gradient_dtype)
        return before, Route(stages[held:], keep, config.gradient_dtype)

    def collect(placement: str, param: nnx.Param) -> nnx.Param:
        if len(param.spec) == 1:
            return param
        before, after = routes(placement, param)
        value = param[...]
        if len(before.stages) > 1:  # layer by layer, so that no second stack is made on the way
            gather = functools.partial(before, dtype=dtype)
            value = jax.lax.map(gather, value) if value.ndim > len(param.spec) else gather(value)
        return param.replace(value, bring=after)

    def reduce(placement: str, param: nnx.Param, gradient: nnx.Param) -> nnx.Param:
        value = gradient[...]
        if len(param.spec) > 1:
            value = routes(placement, param)[0].back(value)
        return param.replace(value.astype(param[...].dtype))

    def release(gradients: Transformer) -> Transformer:
        reduced = by_placement(reduce, parts, gradients)
        reduced.norm = gradients.norm
        return join(reduced)[0]

    parts, join = jax.vjp(split, model)
    return by_placement(collect, parts), release


def _stages(param: nnx.Param, mesh: jax.sharding.AbstractMesh) -> tuple[P, P, P]:
    """Specs of one layer's weight: as stored, gathered over `replica`, and over `fsdp`, too."""
    stacked = param[...].ndim - len(param.spec)
    stored = stored_spec(param.spec, param[...].shape, mesh).partitions[stacked:]

    def without(*gathered: str) -> P:
        entries = (tuple(a for a in axes_of(entry) if a not in gathered) for entry in stored)
        reduced = gathered if mesh.size > 1 else ()  # JAX has no such mark for a lone device
        return P(*map(_entry, entries), reduced=frozenset(reduced))

    return P(*stored), without(REPLICA_AXIS), without(REPLICA_AXIS, FSDP_AXIS)
