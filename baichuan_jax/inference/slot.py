"""A place in the engine's batch, and what its part of the cache holds."""

import numpy as np

from baichuan_jax.inference.request import Output, Request


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements two arrays share from the first one on."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if different.size else size


def pairs(request: Request, ids: np.ndarray, values: np.ndarray) -> list[tuple[int, float]]:
    """As many of the likeliest tokens, with log-probabilities, as the request wants."""
    count = request.top_logprobs
    return list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))


class Slot:
    """A place in the batch. `ids[:held]` are the tokens whose keys its part of the cache holds."""

    def __init__(self, index: int, max_length: int):
        self.index = index
        self.output: Output | None = None
        self.prompt: np.ndarray | None = None
        self.ids = np.zeros(max_length, np.int32)
        self.held = 0
        self.biased = False  # its row of the history has a bias
        self.last_used = 0

    @property
    def reading(self) -> bool:
        """Whether the prompt is not yet in the cache (but for its last token)."""
        return self.output is not None and self.held < len(self.prompt) - 1

    @property
    def decoding(self) -> bool:
        return self.output is not None and not self.reading

    def needs(self, steps: int) -> int:
        """Indices of the cache that are filled after the prompt, or `steps` more tokens."""
        if self.output is None:
            return 0
        left = self.output.request.max_new_tokens - len(self.output.tokens)
        return len(self.prompt) if self.reading else self.held + min(steps, left)

    def common(self, prompt: np.ndarray) -> int:
        """How many tokens of the prompt the cache holds here, from the first one on."""
        return common_length(self.ids[: self.held], prompt)

    def take_scores(self, count: int, logprobs_C, top_ids, top_values) -> None:
        """Keeps the scores of prompt tokens held + 1 … held + count, as far as wanted."""
        output = self.output
        first = max(1, output.request.score_from) - (self.held + 1)
        for c in range(max(0, first), count):
            output.prompt_logprobs.append(float(logprobs_C[c]))
            output.prompt_top.append(pairs(output.request, top_ids[c], top_values[c]))
