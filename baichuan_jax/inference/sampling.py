"""From logits to tokens, each row by its own settings.

The order is Hugging Face's: penalties and biases, temperature, top-k, top-p. A row's token
depends on its own logits, settings, seed and number, and on no other row.

Legend: N rows (slots), V vocabulary (padded).
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from baichuan_jax.config import BATCH_AXES
from baichuan_jax.model.transformer import place

TOP_LOGPROBS = 20  # alternatives that can be had with each token
_FEW = 64  # a larger top-k sorts the whole vocabulary

_ROWS = P(BATCH_AXES, None)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn; the defaults take the likeliest.

    Attributes:
      temperature: what logits are divided by; 0 takes the likeliest token.
      top_k: draw among the k likeliest only, ties with the k-th included; 0: among all.
      top_p: draw among the likeliest that together have this probability.
      repetition_penalty: divides positive and multiplies negative logits of tokens that the
        prompt or the output has (Hugging Face's rule).
      presence_penalty, frequency_penalty: taken off the logits of tokens that the output has,
        once, or each time it has them (OpenAI's rule).
      logit_bias: what is added to the logits of single ids.
      seed: the same seed draws the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def check(self, vocab_size: int) -> None:
        """Refuses what has no meaning.

        Raises:
          ValueError: names the field, its value and what would be right.
        """
        ranges = {
            "temperature": (0, 100),
            "top_p": (0, 1),
            "repetition_penalty": (0.01, 100),
            "presence_penalty": (-100, 100),
            "frequency_penalty": (-100, 100),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} must be a number from {low} to {high}.")
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}={value!r} must be a whole number.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be positive, or 0 for all tokens.")
        if self.top_p == 0:
            raise ValueError("top_p=0 leaves no token: it must be above 0.")
        if len(self.logit_bias) > 300:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries; 300 are allowed.")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias names id {token}: ids are 0 to {vocab_size - 1}.")
            if not _is_number(bias) or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias[{token}]={bias!r} must be from -100 to 100.")

    @property
    def changes_logits(self) -> bool:
        """Whether the row's `History` matters."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties) or bool(self.logit_bias)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """`Sampling` of all rows as arrays [N]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seed: jax.Array  # uint32

    @classmethod
    def of(cls, rows: list[Sampling]) -> "Settings":
        def column(name, dtype=np.float32):
            return np.array([getattr(row, name) for row in rows], dtype)

        floats = [field.name for field in dataclasses.fields(cls)]
        floats = {name: column(name) for name in floats if name not in ("top_k", "seed")}
        top_k = np.array([min(row.top_k, np.iinfo(np.int32).max) for row in rows], np.int32)
        seed = np.array([row.seed % 2**32 for row in rows], np.uint32)
        return cls(top_k=top_k, seed=seed, **floats)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What penalties look at, [N, V] each; only looked at in rows that have some."""

    in_prompt: jax.Array  # bool
    counts: jax.Array  # int32: how often the output has the token
    bias: jax.Array  # float32

    @classmethod
    def empty(cls, rows: int, vocabulary: int) -> "History":
        shape = (rows, vocabulary)
        arrays = (jnp.zeros(shape, dtype) for dtype in (jnp.bool, jnp.int32, jnp.float32))
        return cls(*(place(x, _ROWS) for x in arrays))


@jax.jit
def begin(history: History, row: jax.Array, in_prompt_V: jax.Array, bias_V: jax.Array) -> History:
    """The history with one row begun anew."""
    here = (jnp.arange(history.counts.shape[0]) == row)[:, None]
    return History(
        in_prompt=jnp.where(here, in_prompt_V, history.in_prompt),
        counts=jnp.where(here, 0, history.counts),
        bias=jnp.where(here, bias_V, history.bias),
    )


def penalize(logits_NV: jax.Array, history: History, settings: Settings) -> jax.Array:
    """Logits after penalties and biases."""
    seen = history.in_prompt | (history.counts > 0)
    penalty = settings.repetition_penalty[:, None]
    z = jnp.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty)
    z = jnp.where(seen, z, logits_NV)
    z -= settings.frequency_penalty[:, None] * history.counts
    z -= settings.presence_penalty[:, None] * (history.counts > 0)
    return z + history.bias


def sample(
    logits_NV: jax.Array, history: History, settings: Settings, number_N: jax.Array
) -> jax.Array:
    """The next token of each row, int32 [N].

    Args:
      logits_NV: float32, the model's own; -inf for what is no token.
      number_N: how many tokens the row has drawn before, for its random numbers.
    """
    z_NV = penalize(logits_NV, history, settings)
    greedy_N = jnp.argmax(z_NV, axis=-1).astype(jnp.int32)
    drawn_N = settings.temperature > 0

    def draw(z_NV):
        z_NV -= jnp.max(z_NV, axis=-1, keepdims=True)  # or a small temperature would overflow
        z_NV /= jnp.where(drawn_N, jnp.maximum(settings.temperature, 1e-6), 1.0)[:, None]
        filtered = (settings.top_k > 0) | (settings.top_p < 1)
        few = (settings.top_k > 0) & (settings.top_k <= min(_FEW, z_NV.shape[-1]))
        sort_all = jnp.any(drawn_N & filtered & ~few)
        floor_N = jax.lax.cond(sort_all, _floor, lambda *x: _floor(*x, few=_FEW), z_NV, settings)
        keep = z_NV >= jnp.where(filtered, floor_N, -jnp.inf)[:, None]
        noise = jax.vmap(_noise, (0, 0, None))(settings.seed, number_N, z_NV.shape[-1])
        noisy = jnp.where(keep, z_NV, -jnp.inf) + place(noise, _ROWS)
        return jnp.where(drawn_N, jnp.argmax(noisy, axis=-1).astype(jnp.int32), greedy_N)

    return jax.lax.cond(jnp.any(drawn_N), draw, lambda _: greedy_N, z_NV)


def _noise(seed: jax.Array, number: jax.Array, size: int) -> jax.Array:
    """Gumbel noise: the largest of noisy logits is a draw from their softmax."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), number), (size,))


def _floor(z_NV: jax.Array, settings: Settings, few: int = 0) -> jax.Array:
    """The smallest logit that top-k and top-p leave in, of rows that need the `few` largest."""
    V = z_NV.shape[-1]
    sorted_NK, _ = jax.lax.top_k(z_NV, min(few or V, V))
    rank_K = jnp.arange(sorted_NK.shape[-1])
    k_N1 = jnp.where(settings.top_k > 0, settings.top_k, V)[:, None]
    sorted_NK = jnp.where(rank_K < k_N1, sorted_NK, -jnp.inf)
    p_NK = jax.nn.softmax(sorted_NK, axis=-1)
    before_NK = jnp.cumsum(p_NK, axis=-1) - p_NK  # probability of all likelier tokens
    kept = (before_NK < settings.top_p[:, None]) & (sorted_NK > -jnp.inf)
    return jnp.min(jnp.where(kept, sorted_NK, jnp.inf), axis=-1)


def logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of one token of each row: of logits [..., V] and ids [...]."""
    is_token = jnp.arange(logits.shape[-1]) == tokens[..., None]
    chosen = jnp.max(jnp.where(is_token, logits, -jnp.inf), axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def top_logprobs(
    logits: jax.Array, vocab_size: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Ids and log-probabilities of the likeliest, [..., TOP_LOGPROBS]; zeros if not `wanted`.

    Ids from `vocab_size` on have their share of the probability, but are not told.
    """
    shape = (*logits.shape[:-1], TOP_LOGPROBS)
    spec = P(BATCH_AXES, *[None] * (logits.ndim - 1))

    def largest(z):
        told = jnp.where(jnp.arange(z.shape[-1]) < vocab_size, z, -jnp.inf)
        values, ids = jax.lax.top_k(told, min(TOP_LOGPROBS, z.shape[-1]))
        values -= jax.nn.logsumexp(z, axis=-1, keepdims=True)
        pad = [(0, 0)] * (z.ndim - 1) + [(0, TOP_LOGPROBS - ids.shape[-1])]
        return jnp.pad(ids, pad), jnp.pad(values, pad, constant_values=-jnp.inf)

    def none(_):
        return tuple(place(jnp.zeros(shape, dtype), spec) for dtype in (jnp.int32, jnp.float32))

    return jax.lax.cond(wanted, largest, none, logits)
