"""Attention on NVIDIA GPUs: cuDNN's flash kernels, with ALiBi in extra columns (`columns`).

JAX's public interface to cuDNN takes documents only as a dense mask. XLA's custom call underneath
takes them as offsets, and its primitives are private to JAX: they stand here and nowhere else, as
read in jax 0.10.2 and 0.12.0. The interface has a mask type ALIBI, too, which XLA ignores; it is
not used. Offsets count elements of Q and O alike, so that all heads have to have one width.

Whether cuDNN takes a shape is known on a device alone, and so is whether it is right: see `check`.

Legend: B batch, T tokens, N = B·T, H heads, K head width, M documents.
"""

import inspect

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from baichuan_jax.model.kernels import blockwise
from baichuan_jax.model.kernels.blockwise import SAVED
from baichuan_jax.model.kernels.columns import COLUMNS, with_alibi

_VERSIONS = ((0, 10), (0, 11), (0, 12))  # of JAX, whose interface this file knows
_HOPPER = ("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "GB200", "B300", "GB300")
_WIDEST = 256  # columns of a head

# Documents of a row, on average over a device's rows; cuDNN's statistics take space for so many.
DOCUMENTS = 32

# XLA does not tell cuDNN how many tokens there are in all, so that its backward pass takes room for
# a float32 dQ of T tokens for each of these documents. Heads go a few at a time, within so much.
SPACE = 1 << 30


def unfit(device_kind: str, dtype: str, head_size: int, biased: bool) -> str:
    """Why cuDNN cannot attend there to packed rows, with ALiBi or without; empty: it can."""
    if jax.__version_info__[:2] not in _VERSIONS:
        return f"cuDNN's interface of jax {jax.__version__} has not been read"
    if not any(name in device_kind.split() for name in _HOPPER):
        return f"cuDNN packs documents on Hopper or later, not on {device_kind}"
    if dtype != "bfloat16":
        return f"cuDNN attends in bfloat16, not in {dtype}"
    widest = _WIDEST - COLUMNS * biased
    if head_size % 8 or head_size > widest:
        return f"heads of {head_size}: cuDNN takes multiples of 8 up to {widest}"
    return ""


def attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    slopes_H: jax.Array | None,
) -> jax.Array:
    """`model.attention.attention` among tokens in order; in blocks where there are too many.

    That is, of documents, or of tokens on a device, whose places cuDNN counts in 32 bits.
    """
    B, T, H, K = q_BTHK.shape
    if B * T * H * (K + COLUMNS) >= 2**31:
        return blockwise.attention(q_BTHK, k_BTHK, v_BTHK, positions_BT, segments_BT, slopes_H)
    return _attend(q_BTHK, k_BTHK, v_BTHK, positions_BT, segments_BT, slopes_H)


@jax.custom_vjp
def _attend(q, k, v, positions_BT, segments_BT, slopes_H):
    return _forward(q, k, v, positions_BT, segments_BT, slopes_H)[0]


# The choice between cuDNN and blocks is made inside each of these two, so that either leaves the
# same to the backward pass, under the same names.


def _forward(q, k, v, *where):
    out, lse_BHT = jax.lax.cond(_few(where[1]), _cudnn_forward, blockwise.forward, q, k, v, *where)
    out, lse_BHT = checkpoint_name(out, SAVED), checkpoint_name(lse_BHT, SAVED)
    return out, (q, k, v, *where, out, lse_BHT)


def _backward(residuals, d_out):
    few = _few(residuals[4])
    gradients = jax.lax.cond(few, _cudnn_backward, blockwise.backward, *residuals, d_out)
    return *gradients, None, None, None


_attend.defvjp(_forward, _backward)


def _few(segments_BT):
    return _starts(segments_BT).sum() <= DOCUMENTS * segments_BT.shape[0]


def _starts(segments_BT):
    """Where a document begins."""
    before_BT = jnp.pad(segments_BT, [(0, 0), (1, 0)])[:, :-1]
    return (segments_BT != before_BT) & (segments_BT > 0)


def _documents(segments_BT):
    """Offsets [B, DOCUMENTS + 1] and lengths [B, DOCUMENTS] of all rows' documents, in tokens.

    The rows are one after the other here, and so are their documents: cuDNN reads both arrays flat,
    as many as there are. Also the document and the place in it of each token.
    """
    B, T = segments_BT.shape
    room = B * DOCUMENTS
    starts_N = _starts(segments_BT).reshape(-1)
    offsets = jnp.nonzero(starts_N, size=room, fill_value=B * T)[0].astype(jnp.int32)
    offsets = jnp.pad(offsets, (0, B), constant_values=B * T)
    document_N = jnp.cumsum(starts_N) - 1
    real_N = segments_BT.reshape(-1) > 0
    lengths = jnp.zeros(room, jnp.int32).at[document_N].add(real_N.astype(jnp.int32))
    place_N = jnp.arange(B * T) - offsets[document_N]
    shape = B, DOCUMENTS
    return offsets.reshape(B, DOCUMENTS + 1), lengths.reshape(shape), document_N, place_N


def _with_bias(q, k, v, positions_BT, slopes_H):
    """Q, K and V as cuDNN takes them, and the scale of their logits."""
    scale = q.shape[-1] ** -0.5
    if slopes_H is not None:
        q, k = with_alibi(q, k, positions_BT, slopes_H, scale)
        v = _widen(v, q)
    return q, k, v, scale


def _widen(x, like):
    return jnp.pad(x, [(0, 0)] * 3 + [(0, like.shape[-1] - x.shape[-1])])


def _cudnn_forward(q, k, v, positions_BT, segments_BT, slopes_H):
    (B, T), K = segments_BT.shape, v.shape[-1]
    q, k, v, scale = _with_bias(q, k, v, positions_BT, slopes_H)
    operands, document_N, place_N = _operands(q, k, v, segments_BT)
    call, settings = primitive("fwd", scale)
    out, statistics_MHT = call.bind(*operands, **settings, is_training=True)
    # Of each document's statistics only its own tokens' are worth keeping.
    lse_NH = statistics_MHT[document_N, :, place_N]
    lse_BHT = lse_NH.reshape(B, T, -1).swapaxes(1, 2)
    return jnp.where(segments_BT[..., None, None] > 0, out, 0)[..., :K], lse_BHT


def _cudnn_backward(q, k, v, positions_BT, segments_BT, slopes_H, out, lse_BHT, d_out):
    """A few heads after the other: see SPACE."""
    B, T, H, K = q.shape
    one = B * DOCUMENTS * T * (K + COLUMNS) * 4
    heads = max(n for n in range(1, H + 1) if H % n == 0 and (n == 1 or n * one <= SPACE))

    def split(x, axis):
        parts = x.reshape(*x.shape[:axis], H // heads, heads, *x.shape[axis + 1 :])
        return jnp.moveaxis(parts, axis, 0)

    def gradients(part):
        (q, k, v, out, d_out), lse_BHT, slopes_H = part
        where = positions_BT, segments_BT, slopes_H
        return _gradients_of_some(q, k, v, *where, out, lse_BHT, d_out)

    slopes = None if slopes_H is None else split(slopes_H, 0)
    parts = [split(x, 2) for x in (q, k, v, out, d_out)], split(lse_BHT, 1), slopes
    return tuple(jnp.moveaxis(d, 0, 2).reshape(q.shape) for d in jax.lax.map(gradients, parts))


def _gradients_of_some(q, k, v, positions_BT, segments_BT, slopes_H, out, lse_BHT, d_out):
    (B, T), H, K = segments_BT.shape, q.shape[2], q.shape[-1]
    q, k, v, scale = _with_bias(q, k, v, positions_BT, slopes_H)
    operands, document_N, place_N = _operands(q, k, v, segments_BT)
    real_BT = segments_BT > 0
    document_N = jnp.where(real_BT.reshape(-1), document_N, B * DOCUMENTS)  # padding is left out
    statistics_MHT = jnp.zeros((B * DOCUMENTS, H, T), jnp.float32)
    lse_NH = lse_BHT.swapaxes(1, 2).reshape(B * T, H)
    statistics_MHT = statistics_MHT.at[document_N, :, place_N].set(lse_NH, mode="drop")
    call, settings = primitive("bwd", scale)
    results = (statistics_MHT, _widen(out, q), _widen(d_out, q))
    gradients = call.bind(*operands, *results, **settings)
    return tuple(jnp.where(real_BT[..., None, None], d, 0)[..., :K] for d in gradients)


def _operands(q, k, v, segments_BT):
    """What cuDNN takes in both directions; the document and the place in it of each token."""
    offsets, lengths, document_N, place_N = _documents(segments_BT)
    none = jnp.zeros(0, q.dtype)  # a bias, and pages of a cache
    at = offsets * (q.shape[2] * q.shape[3])  # in elements
    return (q, k, v, none, lengths, lengths, at, at, none, none), document_N, place_N


def primitive(direction: str, scale: float):
    """JAX's private primitive for one call of cuDNN, and its settings."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    settings = {
        "scale": scale,
        "seed": 42,  # of dropout, of which there is none
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of one
        "mask_type": private.MaskType.PADDING_CAUSAL,
        "layout": private.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    lowering = getattr(private, f"_dot_product_attention_{direction}_cuda_lowering")
    if "score_mod_jaxpr" in inspect.signature(lowering).parameters:
        settings |= {"score_mod_name": None, "score_mod_jaxpr": None}
    return getattr(private, f"_dot_product_attention_{direction}_p"), settings
