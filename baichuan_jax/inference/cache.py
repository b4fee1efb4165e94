"""The key-value cache of the engine: fixed slots, each with room for `length` tokens.

The key of the token at position j of a slot's text lies at index j, so nothing but positions
says what is there: a slot is taken over by writing from position 0, and what a longer text left
behind is never seen. Positions from `length` on are nowhere: writes to them are dropped, which is
how padding and idle slots keep their hands off.

Slots are split over the batch axes of a mesh and heads over `tensor`. Functions that name single
slots take one index for each part of the batch, counted within that part, so that no key ever
crosses devices.

Legend: N slots, S indices, R parts of the batch (1 without a mesh), B rows, T tokens, H heads, K
head width.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import P

from baichuan_jax.config import BATCH_AXES, TENSOR_AXIS, ModelConfig
from baichuan_jax.model.attention import Cached, attention
from baichuan_jax.model.transformer import place

NOWHERE = 1 << 30  # a position whose key is dropped

_INT8_MAX = 127.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values, [N, H, S, K]; int8 ones with float32 scales [N, H, S]."""

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None


Cache = tuple[LayerCache, ...]


def create(config: ModelConfig, slots: int, length: int, dtype: jnp.dtype) -> Cache:
    """An empty cache on the current mesh; `dtype` is a float dtype or int8."""
    shape = (slots, config.num_heads, length, config.head_size)

    def zeros(shape, dtype):
        spec = P(BATCH_AXES, TENSOR_AXIS, *[None] * (len(shape) - 2))
        return place(jnp.zeros(shape, dtype), spec)

    def layer() -> LayerCache:
        scales = [zeros(shape[:-1], jnp.float32) for _ in range(2 * (dtype == jnp.int8))]
        return LayerCache(zeros(shape, dtype), zeros(shape, dtype), *scales)

    return tuple(layer() for _ in range(config.num_layers))


@functools.partial(jax.jit, static_argnames="length")
def resize(cache: Cache, length: int) -> Cache:
    """The same texts with room for `length` tokens; what lies beyond is lost."""

    def one(x):
        room = length - x.shape[2]
        if room <= 0:
            return x[:, :, :length]
        return jnp.pad(x, [(0, 0), (0, 0), (0, room)] + [(0, 0)] * (x.ndim - 3))

    return jax.tree.map(one, cache)


@functools.partial(jax.jit, donate_argnums=0)
def copy_slots(cache: Cache, sources_R: jax.Array, targets_R: jax.Array) -> Cache:
    """Copies one slot to another within each part of the batch; to NOWHERE: none."""

    def one(x, source, target):
        return x.at[target].set(x[source], mode="drop")

    sources_R, targets_R = (place(x, P(BATCH_AXES)) for x in (sources_R, targets_R))
    return jax.tree.map(lambda x: _by_part(one, x)(x, sources_R, targets_R), cache)


def take_slots(tree, slots_R: jax.Array):
    """Rows of all arrays whose first axis are slots."""
    return jax.tree.map(lambda x: _by_part(lambda x, slots: x[slots], x)(x, slots_R), tree)


def put_slots(tree, rows, slots_R: jax.Array):
    """The arrays with `rows` in place of what these slots had."""

    def one(x, new):
        return _by_part(lambda x, new, slots: x.at[slots].set(new), x)(x, new, slots_R)

    return jax.tree.map(one, tree, rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A layer's memory (`model.transformer.Memory`) for the rows of one call.

    Attributes:
      slots_R: int32; row b of each part goes on with this slot. None: row b with slot b.
    """

    layer: LayerCache
    slots_R: jax.Array | None = None

    def attend(self, q_BTHK, k_BTHK, v_BTHK, positions_BT, slopes_H):
        """Writes keys and values to their positions, then attends up to each query's own."""
        layer = self._written(k_BTHK, v_BTHK, positions_BT)
        rows = layer if self.slots_R is None else take_slots(layer, self.slots_R)
        keys = Cached(rows.key_scales, rows.value_scales)
        y_BTHK = attention(q_BTHK, rows.keys, rows.values, positions_BT, keys, slopes_H)
        return y_BTHK, Rows(layer, self.slots_R)

    def _written(self, k_BTHK, v_BTHK, positions_BT) -> LayerCache:
        layer = self.layer

        def write(x, new, positions, *slots):
            slots = slots[0] if slots else jnp.arange(x.shape[0])
            if positions.size == 1:  # XLA makes a scatter of one update a copy of the cache
                new = jnp.pad(new, [(0, 0), (0, 1)] + [(0, 0)] * (new.ndim - 2))
                positions = jnp.pad(positions, [(0, 0), (0, 1)], constant_values=NOWHERE)
            return x.at[slots[:, None], :, positions].set(new.astype(x.dtype), mode="drop")

        where = (positions_BT,) if self.slots_R is None else (positions_BT, self.slots_R)

        def put(x, new):
            return _by_part(write, x)(x, new, *where)

        if layer.key_scales is None:
            return LayerCache(put(layer.keys, k_BTHK), put(layer.values, v_BTHK))
        k, k_scales = _to_int8(k_BTHK)
        v, v_scales = _to_int8(v_BTHK)
        return LayerCache(
            put(layer.keys, k),
            put(layer.values, v),
            put(layer.key_scales, k_scales),
            put(layer.value_scales, v_scales),
        )


def _to_int8(x_BTHK):
    """Each head's vector of each token with a scale of its own: int8 [B, T, H, K], [B, T, H]."""
    x = x_BTHK.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / _INT8_MAX, 1e-30)
    return jnp.round(x / scales[..., None]).astype(jnp.int8), scales


def _by_part(function: Callable, result: jax.Array) -> Callable:
    """`function` on each device's part, its result laid out as `result`; as is without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, out_specs=jax.typeof(result).sharding.spec, check_vma=False)
