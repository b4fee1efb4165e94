"""Causal attention: one function, and behind it the fastest kernel that is right (§2.7).

Who may see whom follows from positions and segments alone: a token attends to the tokens of its own
segment at its own or an earlier position. Packed documents and padding (segment 0) are cases of
this one rule; a key-value cache is another. No kernel ever holds the logits or the mask whole.

`choose` picks the kernel: splash on a TPU, cuDNN on an NVIDIA GPU, blocks in XLA elsewhere and
wherever a kernel's conditions fail. It says so once, with the reason. A kernel is used only after
it has agreed with the blockwise form on the device in hand (`kernels.check`).

Legend: B batch, T queries, S keys, H heads, K head width.
"""

import dataclasses
import functools
import os

import jax
from absl import logging

from baichuan_jax.model.kernels import blockwise, cached, check, cudnn, splash

# Names one kernel for all: for measurements, and for a kernel that does not even compile.
VARIABLE = "BAICHUAN_ATTENTION"

_KERNELS = {
    "splash": splash.attention,
    "cudnn": cudnn.attention,
    "blockwise": blockwise.attention,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Keys are the queries' own tokens, in rows of documents that lie whole and in order.

    Attributes:
      segments_BT: int32 documents of a row, 0 for padding.
    """

    segments_BT: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cached:
    """Keys and values are a cache [B, H, S, K] that holds those of position j at index j.

    What lies at indices above a query's position is not seen, so it need not be cleared.

    Attributes:
      k_scales_BHS, v_scales_BHS: float32, what int8 keys and values are multiplied with.
    """

    k_scales_BHS: jax.Array | None = None
    v_scales_BHS: jax.Array | None = None


def attention(
    q_BTHK: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions_BT: jax.Array,
    keys: Packed | Cached,
    slopes_H: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention over the keys that each query may see.

    Logits are q·k/√K in float32, plus `slope · (key position - query position)` with ALiBi.
    Segment 0 sees nothing, is seen by nobody and yields zeros.

    Args:
      q_BTHK: queries in a float dtype.
      k, v: keys and values in the same dtype, [B, T, H, K] where they are packed, else see Cached.
      positions_BT: int32 positions of the queries within their documents.
      keys: what the keys are.
      slopes_H: float32 ALiBi slopes, or None for none.

    Returns:
      [B, T, H, K] in the dtype of the queries.
    """
    if isinstance(keys, Cached):
        return cached.attention(
            q_BTHK, k, v, positions_BT, slopes_H, keys.k_scales_BHS, keys.v_scales_BHS
        )
    mesh = jax.sharding.get_abstract_mesh()
    device = jax.devices()[0] if mesh.empty else mesh.abstract_device
    kind = device.platform, device.device_kind, q_BTHK.dtype.name, q_BTHK.shape[-1]
    name = choose(*kind, slopes_H is not None)
    kernel = _KERNELS[name]
    if mesh.empty:
        return kernel(q_BTHK, k, v, positions_BT, keys.segments_BT, slopes_H)
    heads = jax.typeof(q_BTHK).sharding.spec
    if slopes_H is not None:
        slopes_H = jax.reshard(slopes_H, jax.P(heads[2]))
    kernel = jax.shard_map(kernel, out_specs=heads, check_vma=False)
    return kernel(q_BTHK, k, v, positions_BT, keys.segments_BT, slopes_H)


@functools.cache
def choose(platform: str, device_kind: str, dtype: str, head_size: int, biased: bool) -> str:
    """The kernel for packed rows on such a device, by name; logs it and why, once.

    With ALiBi if `biased`, else without.

    Raises:
      ValueError: the environment variable BAICHUAN_ATTENTION names no kernel.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked and asked not in _KERNELS:
        raise ValueError(f"{VARIABLE}={asked}: should be one of {', '.join(_KERNELS)}, or unset")
    name, why = _by_platform(platform, device_kind, dtype, head_size, biased)
    if asked:
        name, why = asked, f"{VARIABLE} says so"
    if name != "blockwise" and not check.here(device_kind):
        why += "; not tried, for none is here"
    elif name != "blockwise":
        problem = check.problem(_KERNELS[name], device_kind, dtype, head_size, biased)
        if problem:
            logging.warning("Attention: %s is not used. %s", name, problem)
            name, why = "blockwise", f"{name} failed its test"
    where = f"{device_kind}, {dtype}, heads of {head_size}{' with ALiBi' if biased else ''}"
    logging.info("Attention on %s: %s (%s)", where, name, why)
    return name


def _by_platform(platform, device_kind, dtype, head_size, biased) -> tuple[str, str]:
    if platform == "tpu" and dtype == "bfloat16":
        return "splash", "a TPU"
    if platform == "tpu":
        return "blockwise", f"splash is for bfloat16, not for {dtype}"
    if platform == "gpu":
        reason = cudnn.unfit(device_kind, dtype, head_size, biased)
        return ("blockwise", reason) if reason else ("cudnn", "an NVIDIA GPU")
    return "blockwise", f"no other kernel for {platform}"
