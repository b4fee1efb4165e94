"""Weights in 8 or 4 bits: what a layer holds in place of a full-precision matrix.

A weight is stored with its input dimensions flattened to one axis I in front and its output
dimensions behind it. Scales are absolute maxima, symmetric around zero:

- `int8`: round(w / scale), scale = max|w| / 127 of each output channel.
- `int4`: round(w / scale), scale = max|w| / 7 of each block of 64 inputs of an output channel.
- `nf4`: the nearest of 16 quantiles of a normal distribution (Dettmers et al., arXiv 2305.14314,
  appendix E), times the block's max|w|. Codes, scales and dequantised values are those of
  bitsandbytes, with which the official code quantises, bit for bit, as long as 64 divides I.
  A shorter last block stands for itself here; bitsandbytes lets it run on into the next channel.

Two 4-bit codes share a byte, the even input's in the high half. An int4 code is stored plus 8.

A layer dequantises a weight, then multiplies. On a CPU that costs less time than jnp.uint4, which
counts as a byte each besides; scaling after the product instead would save a quarter of int8's
time with one row (1,024 × 4,096, float32, two cores: 0.9 ms instead of 1.2; nf4 1.7, with uint4
3.7, unquantised 0.4).

Legend: I inputs of a layer's matrix, G blocks of them; out: its output dimensions.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from baichuan_jax.config import TENSOR_AXIS

KINDS = ("int8", "nf4", "int4")
BLOCK = 64  # inputs that share a scale in 4 bits

NF4_CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_table = np.array(NF4_CODE, np.float32)
_NF4_BOUNDS = (_table[:-1] + _table[1:]) / np.float32(2)  # a tie goes to the lower code


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantised weight; a pytree that stands where the `nnx.Param` stood.

    Attributes:
      values: `int8`: int8 [I, *out]. 4 bits: uint8 [⌈I/2⌉, *out].
      scales: float32 [G, *out]; G is 1 for `int8` and ⌈I/64⌉ for 4 bits. Of stacked layers both
        have L in front, as they come out of a scan they have not.
      kind: one of KINDS.
      inputs: the input dimensions of the weight, e.g. (H, K).
      spec: the PartitionSpec of the dequantised weight, [*inputs, *out]. Storage is split over
        the same dimensions: see `stored_specs`.
    """

    values: jax.Array
    scales: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})
    inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    spec: P = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Of values and scales, over all devices."""
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self, dtype: jnp.dtype, after: jax.Array | None = None) -> jax.Array:
        """The weight [*inputs, *out], computed in float32 and rounded to `dtype` once.

        Under a mesh it is laid out as `spec`; what is stored over other axes is gathered first,
        in its 8 or 4 bits.

        Args:
          after: the activations that the weight multiplies. XLA then dequantises the weight when
            they are there, and not earlier: otherwise it moves the work out of a decoding loop, or
            to the front of an unrolled stack, and holds all layers in full precision.
        """
        run = functools.partial(_dequantize, kind=self.kind, inputs=self.inputs, dtype=dtype)
        after = jnp.zeros(1) if after is None else after
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return run(self.values, self.scales, after)
        specs = stored_specs(self.kind, len(self.inputs), self.spec)
        stored = map(jax.reshard, (self.values, self.scales), specs)
        specs = (*specs, jax.typeof(after).sharding.spec)
        # Each device looks at its own part of `after`, which the result does not depend on.
        on_mesh = jax.shard_map(run, in_specs=specs, out_specs=self.spec, check_vma=False)
        return on_mesh(*stored, after)


def quantize_array(weight: jax.Array, num_inputs: int, kind: str, spec: P) -> Quantized:
    """Quantises one weight; call it under `jax.jit`.

    Args:
      weight: [*inputs, *out], float32 or bfloat16; computed with in float32.
      num_inputs: how many of its dimensions are inputs.
      kind: one of KINDS.
      spec: how the weight is laid out when a layer computes with it.

    Raises:
      ValueError: see `check`.
    """
    check("A weight", weight, num_inputs, kind, spec)
    inputs = weight.shape[:num_inputs]
    run = functools.partial(_quantize, kind=kind, num_inputs=num_inputs)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Quantized(*run(weight), kind, inputs, spec)
    split = spec[0] is not None  # and with it each output channel's inputs
    values, scales = jax.shard_map(
        functools.partial(run, axis=TENSOR_AXIS if split else None),
        in_specs=spec,
        out_specs=stored_specs(kind, num_inputs, spec),
    )(jax.reshard(weight, spec))
    return Quantized(values, scales, kind, inputs, spec)


def check(name: str, weight: jax.Array, num_inputs: int, kind: str, spec: P) -> None:
    """Refuses what cannot be quantised; `weight` needs a shape and a dtype only.

    Raises:
      ValueError: an unknown kind; a dtype that is no float; a mesh that splits the inputs
        inside a block of 64.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r} must be one of {', '.join(map(repr, KINDS))}.")
    if weight.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"{name} has dtype {weight.dtype} and cannot be quantised: float32, bfloat16 and"
            " float16 can."
        )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or kind == "int8" or spec[0] is None or mesh.shape[TENSOR_AXIS] == 1:
        return
    size, parts = math.prod(weight.shape[:num_inputs]), mesh.shape[TENSOR_AXIS]
    if size % (BLOCK * parts):
        raise ValueError(
            f"{name}: config.mesh.tensor={parts} splits its {size:,} inputs inside a block of"
            f" {BLOCK} that share a scale in {kind}. {BLOCK} × tensor must divide them: use fewer"
            " devices along `tensor`, or int8."
        )


def stored_specs(kind: str, num_inputs: int, spec: P) -> tuple[P, P]:
    """How values and scales are laid out; `spec` splits the first input dimension or none."""
    if any(axis is not None for axis in spec[1:num_inputs]):
        raise ValueError(f"{spec}: only the first of {num_inputs} input dimensions may be split.")
    out = spec[num_inputs:]
    return P(spec[0], *out), P(None if kind == "int8" else spec[0], *out)


def stored_shapes(kind: str, inputs: tuple[int, ...], out: tuple[int, ...]):
    """Shapes and dtypes of values and scales, as `jax.ShapeDtypeStruct`."""
    size = math.prod(inputs)
    if kind == "int8":
        stored = jax.ShapeDtypeStruct((size, *out), jnp.int8), (1, *out)
    else:
        stored = jax.ShapeDtypeStruct((-(-size // 2), *out), jnp.uint8), (-(-size // BLOCK), *out)
    return stored[0], jax.ShapeDtypeStruct(stored[1], jnp.float32)


def _quantize(weight, *, kind, num_inputs, axis=None):
    w = weight.reshape(-1, *weight.shape[num_inputs:]).astype(jnp.float32)
    if kind == "int8":
        top = jnp.max(jnp.abs(w), axis=0, keepdims=True)
        top = top if axis is None else jax.lax.pmax(top, axis)
        scales = top / 127
        return jnp.round(w * _inverse(scales)).astype(jnp.int8), scales
    size = w.shape[0]
    padding = ((0, -size % BLOCK),) + ((0, 0),) * (w.ndim - 1)
    blocks = jnp.pad(w, padding).reshape(-1, BLOCK, *w.shape[1:])
    scales = jnp.max(jnp.abs(blocks), axis=1)
    if kind == "int4":
        scales = scales / 7
        codes = jnp.round(blocks * _inverse(scales)[:, None]) + 8
    else:
        scaled = jnp.clip(blocks * _inverse(scales)[:, None], -1, 1)
        codes = sum((scaled > bound).astype(jnp.uint8) for bound in _NF4_BOUNDS)
    codes = codes.astype(jnp.uint8).reshape(-1, *w.shape[1:])[: size + size % 2]
    return codes[0::2] << 4 | codes[1::2], scales


def _inverse(scales):
    return 1 / jnp.maximum(scales, np.finfo(np.float32).tiny)  # a block of zeros stays zeros


def _dequantize(values, scales, after, *, kind, inputs, dtype):
    # Never true, but XLA does not know that (it does know that no square is negative).
    never = after.reshape(-1)[0].astype(jnp.float32) > jnp.inf
    values = values ^ never.astype(values.dtype)
    out = values.shape[1:]
    if kind == "int8":
        w = values.astype(jnp.float32) * scales
    else:
        shift = np.array([4, 0], np.uint8).reshape(1, 2, *(1 for _ in out))
        codes = ((values[:, None] >> shift) & 15).reshape(-1, *out)
        size = codes.shape[0] - math.prod(inputs) % 2  # of this device
        levels = _nf4(codes) if kind == "nf4" else codes.astype(jnp.float32) - 8
        levels = jnp.pad(levels, ((0, -len(levels) % BLOCK),) + ((0, 0),) * len(out))
        w = (levels.reshape(-1, BLOCK, *out) * scales[:, None]).reshape(-1, *out)[:size]
    return w.astype(dtype).reshape(-1, *inputs[1:], *out)


def _nf4(codes):
    """The table's entries, by selects bit for bit: TPUs have no fast gather."""

    def choose(levels, bit):
        if not bit:
            return jnp.float32(levels[0])
        half = len(levels) // 2
        low, high = choose(levels[:half], bit >> 1), choose(levels[half:], bit >> 1)
        return jnp.where(codes & bit > 0, high, low)

    return choose(NF4_CODE, 8)
