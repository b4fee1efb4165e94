"""Cross-entropy and max-z loss that never hold the logits of all tokens (§2.5, §2.7).

With a vocabulary of 125,696, full float32 logits of 32k tokens take 16 GB. Here a
chunk of tokens at a time has logits, and the gradients of hidden states and head are
computed in the same pass, so that nothing is kept for or recomputed by the backward
pass. Over `tensor` each device holds a slice of the vocabulary: the paper's tensor
splitting of the cross-entropy.

Legend: B batch, T time, C time steps of a chunk, D model, V vocabulary (the slice of a
device inside the kernel).
"""

import functools

import jax
import jax.numpy as jnp
from jax import P

from baichuan_jax.config import BATCH_AXES, TENSOR_AXIS
from baichuan_jax.model.transformer import place


def next_token_loss(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    vocab_size: int,
    max_z_weight: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Sum over the masked tokens of cross-entropy + max_z_weight · z², z the largest logit (Eq. 1).

    Args:
      hidden_BTD: states after the final norm, in the compute dtype.
      head_VD: the head as `Transformer.output_table` gives it, in the same dtype. Where it is
        marked as reduced over the axes of the batch, its gradient is left for others to reduce.
      targets_BT: int32 ids of the tokens to predict.
      mask_BT: bool, which of them count; the others touch neither loss nor gradient.
      vocab_size: rows of the head beyond it are padding and are never predicted.
      chunk: tokens whose logits exist at one time on a device.

    Returns:
      The float32 sum of the loss in nats; the number of tokens that count; and sums over
      them of `cross_entropy` (nats), `max_z` (the weighted term) and `correct` (argmax
      hits). Only the loss can be differentiated.
    """
    hidden_BTD = place(hidden_BTD, P(BATCH_AXES, None, None))
    settings = (vocab_size, max_z_weight, chunk)
    loss, sums = _chunked_loss(settings, hidden_BTD, head_VD, targets_BT, mask_BT)
    count = jnp.sum(mask_BT, dtype=jnp.float32)
    return loss, count, jax.lax.stop_gradient(sums)


def _on_mesh(kernel, settings, *arguments):
    """Runs the kernel on each device's tokens and slice of the vocabulary."""
    vocab_size, max_z_weight, chunk = settings
    options = {"vocab_size": vocab_size, "max_z_weight": max_z_weight, "chunk": chunk}
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arguments, tensor=(), batch=(), **options)
    later = jax.typeof(arguments[1]).sharding.spec.reduced
    if kernel is _sums_and_gradients:
        options["reduce"] = tuple(axis for axis in BATCH_AXES if axis not in later)
    gradients = (P(BATCH_AXES, None, None), P(TENSOR_AXIS, None, unreduced=later))
    return jax.shard_map(
        functools.partial(kernel, tensor=(TENSOR_AXIS,), batch=BATCH_AXES, **options),
        out_specs=(P(), P(), *(() if kernel is _sums else gradients)),
        check_vma=False,
    )(*arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(settings, hidden_BTD, head_VD, targets_BT, mask_BT):
    return _on_mesh(_sums, settings, hidden_BTD, head_VD, targets_BT, mask_BT)


def _chunked_loss_forward(settings, hidden_BTD, head_VD, targets_BT, mask_BT):
    loss, sums, d_hidden, d_head = _on_mesh(
        _sums_and_gradients, settings, hidden_BTD, head_VD, targets_BT, mask_BT
    )
    # The empty array carries the head's dtype; a dtype itself is no residual.
    return (loss, sums), (d_hidden, d_head, jnp.zeros((), head_VD.dtype))


def _chunked_loss_backward(settings, residuals, cotangents):
    d_hidden, d_head, like_head = residuals
    d_loss = cotangents[0]
    d_hidden = (d_loss * d_hidden).astype(d_hidden.dtype)
    # What has yet to be reduced is only multiplied with what is the same on those devices.
    d_loss = place(d_loss, P(reduced=jax.typeof(d_head).sharding.spec.unreduced))
    return d_hidden, (d_loss * d_head).astype(like_head.dtype), None, None


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward)


def _chunks(x, chunk: int):
    """[B, T, …] to [chunks, B, C, …], padded with zeros: tokens that do not count."""
    B, T = x.shape[:2]
    size = min(T, max(1, chunk // B))
    x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)


def _chunk_terms(head_VD, hidden_BCD, targets_BC, mask_BC, tensor, vocab_size, max_z_weight):
    """Sums of one chunk, and what its gradient is made of."""
    V = head_VD.shape[0]
    first = jax.lax.axis_index(tensor) * V if tensor else 0
    ids_V = first + jnp.arange(V)
    z_BCV = jnp.einsum("bcd,vd->bcv", hidden_BCD, head_VD, preferred_element_type=jnp.float32)
    z_BCV = jnp.where(ids_V < vocab_size, z_BCV, -1e30)
    top_BC = jax.lax.pmax(z_BCV.max(-1), tensor)
    e_BCV = jnp.exp(z_BCV - top_BC[..., None])
    is_target_BCV = ids_V == targets_BC[..., None]
    total_BC, target_BC = jax.lax.psum(
        (e_BCV.sum(-1), jnp.sum(jnp.where(is_target_BCV, z_BCV, 0.0), -1)), tensor
    )
    mask_BC = mask_BC.astype(jnp.float32)
    sums = {
        "cross_entropy": jnp.sum(mask_BC * (top_BC + jnp.log(total_BC) - target_BC)),
        "max_z": jnp.sum(mask_BC * max_z_weight * top_BC**2),
        "correct": jnp.sum(mask_BC * (target_BC == top_BC)),
    }
    return sums, (z_BCV, e_BCV, is_target_BCV, top_BC, total_BC, mask_BC)


def _zero_sums():
    return dict.fromkeys(("cross_entropy", "max_z", "correct"), jnp.zeros((), jnp.float32))


def _total(sums, batch):
    sums = jax.lax.psum(sums, batch)
    return sums["cross_entropy"] + sums["max_z"], sums


def _sums(hidden, head_VD, targets, mask, *, tensor, batch, vocab_size, max_z_weight, chunk):
    """The forward pass alone, for evaluation."""

    def body(sums, inputs):
        terms, _ = _chunk_terms(head_VD, *inputs, tensor, vocab_size, max_z_weight)
        return jax.tree.map(jnp.add, sums, terms), None

    inputs = tuple(_chunks(x, chunk) for x in (hidden, targets, mask))
    return _total(jax.lax.scan(body, _zero_sums(), inputs)[0], batch)


def _sums_and_gradients(
    hidden_BTD, head_VD, targets, mask, *, tensor, batch, reduce=(), vocab_size, max_z_weight, chunk
):
    """The same sums with the gradients of their total by hidden states and head.

    That by the head is summed over the axes `reduce`.
    """
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def body(carry, inputs):
        sums, d_head_VD = carry
        hidden_BCD = inputs[0]
        terms, parts = _chunk_terms(head_VD, *inputs, tensor, vocab_size, max_z_weight)
        z_BCV, e_BCV, is_target_BCV, top_BC, total_BC, mask_BC = parts
        is_top_BCV = z_BCV == top_BC[..., None]
        ties_BC = jax.lax.psum(is_top_BCV.sum(-1, dtype=jnp.float32), tensor)
        d_top_BC = 2 * max_z_weight * top_BC / ties_BC  # as autodiff shares it among equal maxima
        d_z_BCV = e_BCV / total_BC[..., None] - is_target_BCV + is_top_BCV * d_top_BC[..., None]
        d_z_BCV = (mask_BC[..., None] * d_z_BCV).astype(hidden_BCD.dtype)
        d_hidden_BCD = jax.lax.psum(multiply("bcv,vd->bcd", d_z_BCV, head_VD), tensor)
        d_head_VD += multiply("bcv,bcd->vd", d_z_BCV, hidden_BCD)
        sums = jax.tree.map(jnp.add, sums, terms)
        return (sums, d_head_VD), d_hidden_BCD.astype(hidden_BCD.dtype)

    inputs = tuple(_chunks(x, chunk) for x in (hidden_BTD, targets, mask))
    start = (_zero_sums(), jnp.zeros(head_VD.shape, jnp.float32))
    (sums, d_head_VD), d_hidden = jax.lax.scan(body, start, inputs)
    loss, sums = _total(sums, batch)
    B, T, D = hidden_BTD.shape
    d_hidden_BTD = jnp.moveaxis(d_hidden, 0, 1).reshape(B, -1, D)[:, :T]
    return loss, sums, d_hidden_BTD, jax.lax.psum(d_head_VD, reduce)
