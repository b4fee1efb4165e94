"""Cross-entropy and max-z loss that never hold the logits of all tokens (§2.5, §2.7).

With a vocabulary of 125,696, full float32 logits of 32k tokens take 16 GB. Here a
chunk of tokens at a time has logits, and the gradients of hidden states and head are
computed in the same pass, so that nothing is kept for or recomputed by the backward
pass. Over `tensor` each device holds a slice of the vocabulary: the paper's tensor
splitting of the cross-entropy.

Legend: N tokens on a device, C tokens of a chunk, B batch, T time, D model, V
vocabulary (the slice of a device inside the kernel).
"""

import functools

import jax
import jax.numpy as jnp
from jax import P

from baichuan_jax.config import BATCH_AXES, TENSOR_AXIS
from baichuan_jax.model.transformer import norm_head, place


def next_token_loss(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    vocab_size: int,
    use_norm_head: bool,
    max_z_weight: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Sum over the masked tokens of cross-entropy + max_z_weight · z², z the largest logit (Eq. 1).

    Args:
      hidden_BTD: states after the final norm, in the compute dtype.
      head_VD: the stored float32 head; normalised here when `use_norm_head`.
      targets_BT: int32 ids of the tokens to predict.
      mask_BT: bool, which of them count; the others touch neither loss nor gradient.
      vocab_size: rows of the head beyond it are padding and are never predicted.
      chunk: tokens whose logits exist at one time on a device.

    Returns:
      The float32 sum of the loss in nats; the number of tokens that count; and sums over
      them of `cross_entropy` (nats), `max_z` (the weighted term) and `correct` (argmax
      hits). Only the loss can be differentiated.
    """
    if use_norm_head:
        head_VD = norm_head(head_VD)
    head_VD = place(head_VD.astype(hidden_BTD.dtype), P(TENSOR_AXIS, None))
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
    gradients = (P(BATCH_AXES, None, None), P(TENSOR_AXIS, None))
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
    return d_hidden, (d_loss * d_head).astype(like_head.dtype), None, None


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward)


def _chunks(x, chunk: int):
    """[B, T, …] to [chunks, C, …], padded with zeros: a token that does not count."""
    x = x.reshape(-1, *x.shape[2:])
    size = min(chunk, x.shape[0])
    padding = -x.shape[0] % size
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])


def _chunk_terms(head_VD, hidden_CD, targets_C, mask_C, tensor, vocab_size, max_z_weight):
    """Sums of one chunk, and what its gradient is made of."""
    V = head_VD.shape[0]
    first = jax.lax.axis_index(tensor) * V if tensor else 0
    ids_V = first + jnp.arange(V)
    z_CV = jnp.einsum("cd,vd->cv", hidden_CD, head_VD, preferred_element_type=jnp.float32)
    z_CV = jnp.where(ids_V < vocab_size, z_CV, -1e30)
    top_C = jax.lax.pmax(z_CV.max(-1), tensor)
    e_CV = jnp.exp(z_CV - top_C[:, None])
    is_target_CV = ids_V == targets_C[:, None]
    total_C, target_C = jax.lax.psum(
        (e_CV.sum(-1), jnp.sum(jnp.where(is_target_CV, z_CV, 0.0), -1)), tensor
    )
    mask_C = mask_C.astype(jnp.float32)
    sums = {
        "cross_entropy": jnp.sum(mask_C * (top_C + jnp.log(total_C) - target_C)),
        "max_z": jnp.sum(mask_C * max_z_weight * top_C**2),
        "correct": jnp.sum(mask_C * (target_C == top_C)),
    }
    return sums, (z_CV, e_CV, is_target_CV, top_C, total_C, mask_C)


def _total(sums, batch):
    sums = jax.lax.psum(sums, batch)
    return sums["cross_entropy"] + sums["max_z"], sums


def _sums(hidden, head_VD, targets, mask, *, tensor, batch, vocab_size, max_z_weight, chunk):
    """The forward pass alone, for evaluation."""

    def body(sums, inputs):
        terms, _ = _chunk_terms(head_VD, *inputs, tensor, vocab_size, max_z_weight)
        return jax.tree.map(jnp.add, sums, terms), None

    zero = dict.fromkeys(("cross_entropy", "max_z", "correct"), jnp.zeros((), jnp.float32))
    inputs = tuple(_chunks(x, chunk) for x in (hidden, targets, mask))
    return _total(jax.lax.scan(body, zero, inputs)[0], batch)


def _sums_and_gradients(
    hidden_BTD, head_VD, targets, mask, *, tensor, batch, vocab_size, max_z_weight, chunk
):
    """The same sums with the gradients of their total by hidden states and head."""

    def body(carry, inputs):
        sums, d_head_VD = carry
        hidden_CD = inputs[0]
        terms, parts = _chunk_terms(head_VD, *inputs, tensor, vocab_size, max_z_weight)
        z_CV, e_CV, is_target_CV, top_C, total_C, mask_C = parts
        is_top_CV = z_CV == top_C[:, None]
        ties_C = jax.lax.psum(is_top_CV.sum(-1, dtype=jnp.float32), tensor)
        d_top_C = 2 * max_z_weight * top_C / ties_C  # as autodiff shares it among equal maxima
        d_z_CV = e_CV / total_C[:, None] - is_target_CV + is_top_CV * d_top_C[:, None]
        d_z_CV = (mask_C[:, None] * d_z_CV).astype(hidden_CD.dtype)
        d_hidden_CD = jax.lax.psum(
            jnp.einsum("cv,vd->cd", d_z_CV, head_VD, preferred_element_type=jnp.float32), tensor
        )
        d_head_VD += jnp.einsum("cv,cd->vd", d_z_CV, hidden_CD, preferred_element_type=jnp.float32)
        sums = jax.tree.map(jnp.add, sums, terms)
        return (sums, d_head_VD), d_hidden_CD.astype(hidden_CD.dtype)

    zero = dict.fromkeys(("cross_entropy", "max_z", "correct"), jnp.zeros((), jnp.float32))
    inputs = tuple(_chunks(x, chunk) for x in (hidden_BTD, targets, mask))
    start = (zero, jnp.zeros(head_VD.shape, jnp.float32))
    (sums, d_head_VD), d_hidden = jax.lax.scan(body, start, inputs)
    loss, sums = _total(sums, batch)
    d_hidden = d_hidden.reshape(-1, hidden_BTD.shape[-1])
    d_hidden = d_hidden[: targets.size].reshape(hidden_BTD.shape)
    return loss, sums, d_hidden, jax.lax.psum(d_head_VD, batch)
