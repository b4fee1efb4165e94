"""What is asked of the engine, and what it answers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from baichuan_jax.inference.sampling import TOP_LOGPROBS, Sampling
from baichuan_jax.inference.text import TextStream


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue, and how.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: 0 only scores the prompt.
      stop: strings that end the output and are not part of its text.
      ignore_eos: go on after the end-of-text token, which then is a token like any other.
      top_logprobs: how many of the likeliest tokens to tell beside each.
      score_from: tells the log-probabilities of prompt[max(1, score_from):]; None: of none.
      continues: the text goes on with the prompt's; False: it is one of its own (a reply).
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    score_from: int | None = None
    continues: bool = True

    def check(self, vocab_size: int, max_length: int) -> None:
        """Refuses what has no meaning, or does not fit.

        Raises:
          ValueError: names the field, its value and what would be right.
        """
        prompt = np.asarray(self.prompt)
        if prompt.ndim != 1 or not prompt.size or prompt.dtype.kind not in "iu":
            raise ValueError("prompt must be a list of at least one token id.")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            bad = prompt[(prompt < 0) | (prompt >= vocab_size)][0]
            raise ValueError(f"prompt has id {bad}: ids are 0 to {vocab_size - 1}.")
        for name in ("max_new_tokens", "top_logprobs", "score_from"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole and (name, value) != ("score_from", None):
                raise ValueError(f"{name}={value!r} must be a whole number.")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must not be negative.")
        total = prompt.size + self.max_new_tokens
        if total > max_length:
            raise ValueError(
                f"prompt has {prompt.size} tokens, which with max_new_tokens="
                f"{self.max_new_tokens} are more than max_length={max_length}."
            )
        if not 0 <= self.top_logprobs <= TOP_LOGPROBS:
            raise ValueError(f"top_logprobs={self.top_logprobs} must be from 0 to {TOP_LOGPROBS}.")
        if self.score_from is not None and self.score_from < 0:
            raise ValueError(f"score_from={self.score_from} must not be negative.")
        self.sampling.check(vocab_size)


@dataclasses.dataclass(eq=False)
class Output:
    """What has become of a request so far; `Engine.step` makes it grow.

    Log-probabilities are natural and of the model's own distribution, before temperature,
    penalties, top-k and top-p.

    Attributes:
      tokens: new ids, without end of text; the last one may complete a stop string.
      logprobs: of each of them.
      top: beside each of them the (id, log-probability) of the likeliest, largest first.
      prompt_logprobs, prompt_top: the same of prompt[max(1, score_from):].
      finish_reason: None while it runs; 'stop' (end of text or stop string), 'length' or
        'cancelled'.
      cached_tokens: of the prompt, taken over from another request.
    """

    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int = 0
    stream: TextStream | None = dataclasses.field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The text that is final so far; '' without a tokenizer."""
        return self.stream.text if self.stream else ""
