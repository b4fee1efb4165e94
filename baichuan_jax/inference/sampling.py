"""Text from a model: prompts in, sampled continuations out, with a key-value cache.

The prompts are read in one pass and all new tokens are sampled inside one compiled
loop.

Legend: B prompts, P prompt slots, S cache slots, L layers, H heads, K head width,
D model, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from baichuan_jax.config import BATCH_AXES, TENSOR_AXIS
from baichuan_jax.model.transformer import Cache, Transformer, place

_PROMPT_MULTIPLE = 64  # prompts of nearby lengths share one compiled program


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    dtype: jnp.dtype = jnp.bfloat16,
) -> list[list[int]]:
    """Continues each prompt until `eos_id` or `max_new_tokens`.

    A prompt's continuation depends neither on the other prompts nor on padding.

    Args:
      prompts: token ids, at least one each.
      temperature: 0 takes the likeliest token.
      top_k: sample among the k likeliest tokens only; 0: among all.
      seed: of the sampling; row i draws from `fold_in(seed, i)`.

    Returns:
      The new ids of each prompt, without `eos_id`.

    Raises:
      ValueError: for an empty prompt, which predicts nothing.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("A prompt must hold at least one token.")
    mesh = jax.sharding.get_abstract_mesh()
    rows = 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    size = -(-len(prompts) // rows) * rows
    width = -(-max(map(len, prompts)) // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    tokens_BP = np.zeros((size, width), np.int32)
    lengths_B = np.ones(size, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, : len(prompt)] = prompt
        lengths_B[row] = len(prompt)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(size))
    new_BN = _generate(
        model,
        tokens_BP,
        lengths_B,
        keys_B,
        jnp.float32(temperature),
        settings=(max_new_tokens, eos_id, top_k, jnp.dtype(dtype)),
    )
    result = []
    for row in np.asarray(new_BN)[: len(prompts)].tolist():
        result.append(row[: row.index(eos_id)] if eos_id in row else row)
    return result


def empty_cache(model: Transformer, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache of `slots` tokens for each of `rows`, heads split over `tensor`."""
    L, _, _, H, K = model.layers.attention.qkv.shape
    stack = P(None, BATCH_AXES, None, TENSOR_AXIS, None)
    zeros = place(jnp.zeros((L, rows, slots, H, K), dtype), stack)
    where = place(jnp.zeros((rows, slots), jnp.int32), P(BATCH_AXES, None))
    return Cache(zeros, zeros, where, where, jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames="settings")
def _generate(model, tokens_BP, lengths_B, keys_B, temperature, *, settings):
    max_new_tokens, eos_id, top_k, dtype = settings
    B, width = tokens_BP.shape
    rows = P(BATCH_AXES, None)
    tokens_BP, lengths_B = place(tokens_BP, rows), place(lengths_B, P(BATCH_AXES))
    slots = place(jnp.broadcast_to(jnp.arange(width), (B, width)), rows)
    segments_BP = (slots < lengths_B[:, None]).astype(jnp.int32)
    cache = empty_cache(model, B, width + max_new_tokens, dtype)
    hidden_BPD, cache = model.decode(tokens_BP, slots, segments_BP, cache)
    is_last_BP = slots == lengths_B[:, None] - 1
    last_BD = jnp.sum(hidden_BPD * is_last_BP[..., None].astype(dtype), axis=1)

    def sample(hidden_BD, step):
        logits_BV = place(model.logits(hidden_BD[:, None])[:, 0], rows)
        if top_k:
            threshold = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
            logits_BV = jnp.where(logits_BV < threshold, -jnp.inf, logits_BV)
        greedy = jnp.argmax(logits_BV, axis=-1)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        scaled = logits_BV / jnp.maximum(temperature, 1e-6)
        noise = place(jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[1:]))(keys), rows)
        drawn = jnp.argmax(scaled + noise, axis=-1)
        return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)

    def unfinished(carry):
        step, _, done_B, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done_B)

    def extend(carry):
        step, token_B, done_B, new_BN, cache = carry
        token_B = jnp.where(done_B, eos_id, token_B)
        new_BN = jax.lax.dynamic_update_slice_in_dim(new_BN, token_B[:, None], step, 1)
        ones_B1 = jnp.ones_like(token_B)[:, None]
        position_B1 = (lengths_B + step)[:, None]
        hidden_B1D, cache = model.decode(token_B[:, None], position_B1, ones_B1, cache)
        done_B = done_B | (token_B == eos_id)
        return step + 1, sample(hidden_B1D[:, 0], step + 1), done_B, new_BN, cache

    new_BN = place(jnp.full((B, max_new_tokens), eos_id, jnp.int32), rows)
    start = (jnp.int32(0), sample(last_BD, 0), lengths_B < 0, new_BN, cache)
    return jax.lax.while_loop(unfinished, extend, start)[3]
