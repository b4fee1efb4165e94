"""The two compiled programs of the engine: one reads prompts, the other decodes.

Legend: N rows of the decoding batch, R prompts that are read, C tokens of a chunk, I decoded
tokens, V vocabulary, J `TOP_LOGPROBS`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import P

from baichuan_jax.config import BATCH_AXES
from baichuan_jax.inference.cache import NOWHERE, Cache, Rows, put_slots, take_slots
from baichuan_jax.inference.sampling import (
    TOP_LOGPROBS,
    History,
    Settings,
    logprobs,
    sample,
    top_logprobs,
)
from baichuan_jax.model.transformer import Transformer, place

_ROWS = P(BATCH_AXES)


@functools.partial(jax.jit, static_argnames="score", donate_argnames="cache")
def read(
    model: Transformer,
    cache: Cache,
    table_3RC: jax.Array,
    slots_R: jax.Array,
    vocab_size: jax.Array,
    wants_top: jax.Array,
    *,
    score: bool,
):
    """Reads a chunk of each of R prompts, as many in each part of the batch, into the cache.

    Args:
      table_3RC: int32 tokens, their positions (NOWHERE for padding) and the tokens that follow.
      slots_R: int32 slot of each row, counted within its part.
      vocab_size: only ids below it are told.
      wants_top: whether to tell the likeliest tokens, too.
      score: whether to score the tokens that follow.

    Returns:
      The cache, and the scores: log-probabilities [R, C], ids and log-probabilities of the
      likeliest [R, C, J]; empty without `score`.
    """
    tokens, positions, targets = (place(x, P(BATCH_AXES, None)) for x in table_3RC)
    slots_R = place(slots_R, _ROWS)
    rows = [Rows(layer, slots_R) for layer in cache]
    hidden_RCD, rows = model.extend(tokens, positions, rows)
    cache = tuple(row.layer for row in rows)
    if not score:
        return cache, ()
    logits_RCV = place(model.logits(hidden_RCD), P(BATCH_AXES, None, None))
    return cache, (logprobs(logits_RCV, targets), *top_logprobs(logits_RCV, vocab_size, wants_top))


@functools.partial(jax.jit, static_argnames="steps", donate_argnames=("cache", "history"))
def decode(
    model: Transformer,
    cache: Cache,
    history: History,
    settings: Settings,
    table_5N: jax.Array,
    slots_N: jax.Array | None,
    eos_id: jax.Array,
    vocab_size: jax.Array,
    wants_top: jax.Array,
    *,
    steps: int,
):
    """Decodes up to `steps` tokens of each row; ends early where no row goes on.

    Args:
      settings: of the rows.
      table_5N: int32, for each row: the token to go on from; its position, NOWHERE in idle
        rows; how many tokens may come; how many have come; whether the end of text ends it.
      slots_N: int32, the slot of each row, all different; None: row n is slot n.
      eos_id: the end-of-text token.
      vocab_size: only ids below it are drawn and told.
      wants_top: whether to tell the likeliest tokens, too.

    Returns:
      The cache, the history, and for each step and row: the token [I, N], its
      log-probability [I, N], ids and log-probabilities of the likeliest [I, N, J]. Of a row
      only what comes up to its end means something.
    """
    everything = (cache, history)
    if slots_N is not None:  # copied once for all steps
        cache, history = take_slots(everything, slots_N)
    token_N, start_N, remaining_N, number_N, stops_N = (place(x, _ROWS) for x in table_5N)
    settings = jax.tree.map(lambda x: place(x, _ROWS), settings)
    N = token_N.shape[0]
    idle_N = start_N == NOWHERE

    def goes_on(carry):
        step, _, live_N, *_ = carry
        return (step < steps) & jnp.any(live_N)

    def body(carry):
        step, token_N, live_N, cache, history, new = carry
        position_N = jnp.where(live_N, start_N + step, NOWHERE)
        rows = [Rows(layer) for layer in cache]
        hidden_N1D, rows = model.extend(token_N[:, None], position_N[:, None], rows)
        logits_NV = place(model.logits(hidden_N1D)[:, 0], P(BATCH_AXES, None))
        known = jnp.arange(logits_NV.shape[-1]) < vocab_size
        allowed_NV = jnp.where(known, logits_NV, -jnp.inf)
        token_N = sample(allowed_NV, history, settings, number_N + step)
        values = (
            token_N,
            logprobs(logits_NV, token_N),
            *top_logprobs(logits_NV, vocab_size, wants_top),
        )
        new = tuple(
            jax.lax.dynamic_update_index_in_dim(all_steps, value, step, 0)
            for all_steps, value in zip(new, values, strict=True)
        )
        is_new_NV = (jnp.arange(logits_NV.shape[-1]) == token_N[:, None]) & live_N[:, None]
        history = History(history.in_prompt, history.counts + is_new_NV, history.bias)
        ends_N = ((token_N == eos_id) & (stops_N > 0)) | (step + 1 >= remaining_N)
        cache = tuple(row.layer for row in rows)
        return step + 1, token_N, live_N & ~ends_N, cache, history, new

    def zeros(shape, dtype):
        spec = P(None, BATCH_AXES, *[None] * (len(shape) - 2))
        return place(jnp.zeros(shape, dtype), spec)

    shapes = [((steps, N), jnp.int32), ((steps, N), jnp.float32)]
    shapes += [((steps, N, TOP_LOGPROBS), dtype) for dtype in (jnp.int32, jnp.float32)]
    new = tuple(zeros(*shape) for shape in shapes)
    carry = (jnp.int32(0), token_N, ~idle_N & (remaining_N > 0), cache, history, new)
    _, _, _, cache, history, new = jax.lax.while_loop(goes_on, body, carry)
    if slots_N is not None:
        cache, history = put_slots(everything, (cache, history), slots_N)
    return cache, history, new
