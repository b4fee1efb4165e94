"""The Baichuan 2 transformer (paper §2.2–2.5): the architecture and nothing else.

Pre-norm blocks of attention and SwiGLU, RMSNorm, RoPE or ALiBi, no bias anywhere,
and NormHead. Modules are plain pytrees: `jax.jit`, `jax.grad` and `jax.lax.scan`
work on them as they are.

Beside each weight stands the `PartitionSpec` it is computed with: which dimension
is split over `tensor`. How it is stored between uses is `parallel.zero`'s affair;
`use` brings it from there, and its transpose takes the gradient back.

Legend: B batch, T time, D model, F feed-forward, H heads, K head width, V vocabulary
(padded), L layers.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.ad_checkpoint import checkpoint_name

from baichuan_jax.config import BATCH_AXES, TENSOR_AXIS, ModelConfig, saved_names
from baichuan_jax.model import cpu
from baichuan_jax.model.attention import Packed, attention
from baichuan_jax.model.position import alibi_slopes, rope, rotate
from baichuan_jax.model.quantized import Quantized

_ACTIVATION = P(BATCH_AXES, None, None)

# The same where a product begins that is split over `tensor`, whose gradient has to be summed
# over it, and where one ends, which has to be summed itself.
_GATHERED = P(BATCH_AXES, None, None, reduced={TENSOR_AXIS})
_PARTIAL = P(BATCH_AXES, None, None, unreduced={TENSOR_AXIS})

# The name of what a weight's `bring` gathers and wants kept for the backward pass.
WEIGHTS = "weights"


def place(x: jax.Array, spec: P) -> jax.Array:
    """Reshards onto `spec` under a mesh; without a mesh there is nothing to do."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.reshard(x, spec)


def einsum(equation: str, x: jax.Array, w: jax.Array, spec: P) -> jax.Array:
    """A contraction whose result is laid out as `spec` on the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jnp.einsum(equation, x, w)
    if mesh.abstract_device.platform == "cpu":
        return cpu.projection(equation, x, w, spec)
    return jnp.einsum(equation, x, w, out_sharding=spec)


def weight(key: jax.Array, shape: tuple[int, ...], spec: P, scale: float) -> nnx.Param:
    """A float32 matrix from N(0, scale²), computed with as `spec` says."""
    return nnx.Param(scale * jax.random.normal(key, shape, jnp.float32), spec=spec)


def use(param: nnx.Param | Quantized, x: jax.Array) -> jax.Array:
    """The weight as it meets `x`, in x's dtype: cast first, then gathered."""
    if isinstance(param, Quantized):
        return param.dequantize(x.dtype, after=x)
    if bring := param.get_metadata().get("bring"):  # see `parallel.zero`
        return bring(param[...], x.dtype)
    return place(param[...].astype(x.dtype), param.spec)


def between(x_BTD: jax.Array) -> P:
    """How activations lie between matrix products: in time over `tensor`, where it divides."""
    mesh = jax.sharding.get_abstract_mesh()
    over = not mesh.empty and x_BTD.shape[1] % mesh.shape[TENSOR_AXIS] == 0
    return P(BATCH_AXES, TENSOR_AXIS if over else None, None)


class Memory(Protocol):
    """Keys and values of one layer that outlive a call, for decoding (`inference.cache`)."""

    def attend(
        self,
        q_BTHK: jax.Array,
        k_BTHK: jax.Array,
        v_BTHK: jax.Array,
        positions_BT: jax.Array,
        slopes_H: jax.Array | None,
    ) -> tuple[jax.Array, "Memory"]:
        """Takes in the keys and values, then attends to all there are at earlier positions."""


class RMSNorm(nnx.Module):
    """x / rms(x) · gain, with float32 statistics."""

    def __init__(self, size: int, epsilon: float):
        self.gain = nnx.Param(jnp.ones(size, jnp.float32), spec=P(None))
        self.epsilon = epsilon

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * use(self.gain, x)).astype(x_BTD.dtype)


class Attention(nnx.Module):
    """Multi-head attention. Q, K and V are split over `tensor` by heads, each for itself."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        D, H, K = config.hidden_size, config.num_heads, config.head_size
        key_qkv, key_out = jax.random.split(key)
        scale = config.initializer_range
        self.qkv = weight(key_qkv, (D, 3, H, K), P(None, None, TENSOR_AXIS, None), scale)
        self.out = weight(key_out, (H, K, D), P(TENSOR_AXIS, None, None), scale)
        self.rope = rope(config) if config.position == "rope" else None

    def __call__(self, x_BTD, positions_BT, segments_BT, memory: Memory | None = None):
        """Attends within `x_BTD`, or to `memory` and `x_BTD`. Returns the memory with both, too."""
        by_head = P(BATCH_AXES, None, None, TENSOR_AXIS, None)
        rows = between(x_BTD)
        x_BTD = place(x_BTD, _GATHERED)
        qkv = einsum("btd,dchk->btchk", x_BTD, use(self.qkv, x_BTD), by_head)
        qkv = checkpoint_name(qkv, "qkv")
        q, k, v = (x[:, :, 0] for x in jnp.split(qkv, 3, axis=2))
        slopes = None
        if self.rope:
            q = rotate(q, positions_BT, self.rope)
            k = rotate(k, positions_BT, self.rope)
        else:
            slopes = jnp.asarray(alibi_slopes(q.shape[2]))
        if memory is None:
            y = attention(q, k, v, positions_BT, Packed(segments_BT), slopes)
        else:
            y, memory = memory.attend(q, k, v, positions_BT, slopes)
        y = place(einsum("bthk,hkd->btd", y, use(self.out, y), _PARTIAL), rows)
        return checkpoint_name(y, "attention_out"), memory


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)); gate and up are one matrix product."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        D, F = config.hidden_size, config.intermediate_size
        key_in, key_out = jax.random.split(key)
        scale = config.initializer_range
        self.gate_up = weight(key_in, (D, 2, F), P(None, None, TENSOR_AXIS), scale)
        self.down = weight(key_out, (F, D), P(TENSOR_AXIS, None), scale)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        split = P(BATCH_AXES, None, None, TENSOR_AXIS)
        rows = between(x_BTD)
        x_BTD = place(x_BTD, _GATHERED)
        h = einsum("btd,dcf->btcf", x_BTD, use(self.gate_up, x_BTD), split)
        h = checkpoint_name(h, "gate_up")
        gate, up = (x[:, :, 0] for x in jnp.split(h, 2, axis=2))
        h = jax.nn.silu(gate) * up
        return place(einsum("btf,fd->btd", h, use(self.down, h), _PARTIAL), rows)


class Block(nnx.Module):
    """One pre-norm layer; the same one trains and decodes."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        key_attention, key_mlp = jax.random.split(key)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(key_attention, config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = SwiGLU(key_mlp, config)

    def __call__(self, x_BTD, positions_BT, segments_BT, memory=None):
        y, memory = self.attention(self.attention_norm(x_BTD), positions_BT, segments_BT, memory)
        x_BTD = x_BTD + y
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), memory


def _rows(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return table_VD[tokens_BT]
    return table_VD.at[tokens_BT].get(out_sharding=P(BATCH_AXES, None, TENSOR_AXIS))


_look_up = jax.custom_vjp(_rows)


def _look_up_backward(residuals, gradient_BTD):
    """A token's gradients add up in float32, whatever the table's dtype."""
    table_VD, tokens_BT = residuals
    like = jax.ShapeDtypeStruct(table_VD.shape, jnp.float32, sharding=jax.typeof(table_VD).sharding)
    add_up = jax.linear_transpose(lambda table: _rows(table, tokens_BT), like)
    return add_up(gradient_BTD.astype(jnp.float32))[0].astype(table_VD.dtype), None


_look_up.defvjp(lambda table, tokens: (_rows(table, tokens), (table, tokens)), _look_up_backward)


def norm_head(head_VD: jax.Array) -> jax.Array:
    """NormHead (§2.5): each row of the head at length one. The stored weight stays raw."""
    # The maximum is inside: a root has no gradient at 0, where rows that only pad may be.
    square = jnp.sum(head_VD * head_VD, axis=-1, keepdims=True)
    return head_VD / jnp.sqrt(jnp.maximum(square, 1e-24))


def _policy(saved: Sequence[str] | None, offload: Sequence[str]) -> Callable:
    """What the backward pass finds of a layer: all that is not gathered, or what has these names.

    Gathered weights and activations are the exception, unless they are named.
    """
    if saved is None:
        return lambda primitive, *_, **__: primitive.name != "reshard"
    policies = jax.checkpoint_policies
    device = [name for name in (*saved, WEIGHTS) if name not in offload]
    if not offload:
        return policies.save_only_these_names(*device)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=device,
        names_which_can_be_offloaded=list(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )


class Transformer(nnx.Module):
    """Tokens to hidden states; `logits` or the training loss take it from there."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        V, D = config.padded_vocab_size, config.hidden_size
        key_embedding, key_layers, key_head = jax.random.split(key, 3)
        self.embedding = weight(
            key_embedding, (V, D), P(None, TENSOR_AXIS), config.initializer_range
        )
        layer_keys = jax.random.split(key_layers, config.num_layers)
        self.layers = jax.vmap(lambda layer_key: Block(layer_key, config))(layer_keys)
        self.norm = RMSNorm(D, config.norm_epsilon)
        self.head = weight(key_head, (V, D), P(TENSOR_AXIS, None), config.initializer_range)
        self.vocab_size, self.norm_head = config.vocab_size, config.norm_head

    def embed(self, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of the embedding, [B, T, D] in `dtype`."""
        rows_BTD = _look_up(use(self.embedding, jnp.zeros((), dtype)), tokens_BT)
        return place(rows_BTD, between(rows_BTD))

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        *,
        dtype: jnp.dtype = jnp.bfloat16,
        remat: str = "none",
        offload: Sequence[str] = (),
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in `dtype`.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32 positions, restarting in each document of a packed row.
          segments_BT: int32 documents of a row, 0 for padding; none sees another.
          dtype: of the computation; weights are cast to it where they are used.
          remat: see config.TrainingConfig.
          offload: those of the saved names that are kept in the host's memory.
        """

        def body(x, layer):
            x = checkpoint_name(x, "input")
            return layer(x, positions_BT, segments_BT)[0], None

        mesh = jax.sharding.get_abstract_mesh()
        if remat != "none" or mesh.size > 1:  # or there is nothing to be gathered again
            policy = _policy(saved_names(remat), offload)
            # Inside a scan nothing merges the recomputation with the forward pass, and the barrier
            # that would prevent it ties gathers to the layer that they are for.
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x = self.embed(tokens_BT, dtype)
        for layers in (self.layers,) if isinstance(self.layers, Block) else self.layers:
            num_layers = layers.mlp_norm.gain.shape[0]
            x, _ = jax.lax.scan(body, x, layers, unroll=cpu.unroll(num_layers))
        return self.norm(x)

    def extend(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, memories: Sequence[Memory]
    ) -> tuple[jax.Array, tuple[Memory, ...]]:
        """Like `__call__` for tokens that follow those in the memories, which then hold both.

        The layers are a sequence of blocks here, not a stack: a loop over a stack would copy each
        layer's weights once more for every token.
        """
        x = self.embed(tokens_BT, self.embedding[...].dtype)
        new = []
        for layer, memory in zip(self.layers, memories, strict=True):
            x, memory = layer(x, positions_BT, None, memory)
            new.append(memory)
        return self.norm(x), tuple(new)

    def output_table(self, x_BTD: jax.Array) -> jax.Array:
        """The head [V, D] as it meets hidden states: normalised, in their dtype."""
        head = self.head
        if self.norm_head:
            head = head.replace(norm_head(head[...]))
        return use(head, x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states; padding rows of the table are -inf."""
        split = None
        if not jax.sharding.get_abstract_mesh().empty:
            split = P(BATCH_AXES, None, TENSOR_AXIS)
        z = jnp.einsum(
            "btd,vd->btv",
            place(x_BTD, _ACTIVATION),
            self.output_table(x_BTD),
            preferred_element_type=jnp.float32,
            out_sharding=split,
        )
        real = jnp.arange(z.shape[-1]) < self.vocab_size
        return jnp.where(real, z, -jnp.inf)
