"""A language model that says what it is told to, with the interface of the real one."""

import types

from baichuan_jax import chat
from baichuan_jax.inference.request import Output
from baichuan_jax.inference.sampling import Sampling
from baichuan_jax.inference.text import TextStream

DEFAULTS = types.SimpleNamespace(sampling=Sampling(temperature=0.5, seed=7), max_new_tokens=20)


class Engine:
    """Answers the requests with `replies`, one after the other, a few tokens a visit.

    A reply that does not fit ends with 'length'. `on_step` is called with the number of the
    visit, from 1.
    """

    def __init__(self, tokenizer, max_length, replies, on_step=None, tokens_per_step=1):
        self.max_length, self.vocab_size = max_length, tokenizer.vocab_size
        self.requests, self.cancelled, self.steps, self.most_running = [], [], 0, 0
        self._tokenizer, self._on_step, self._tokens = tokenizer, on_step, tokens_per_step
        self._replies, self._running = list(replies), []

    @property
    def busy(self):
        return bool(self._running)

    def submit(self, request):
        total = len(request.prompt) + request.max_new_tokens
        if total > self.max_length:
            raise ValueError(f"max_new_tokens={request.max_new_tokens} is too much.")
        assert request.prompt
        request.sampling.check(self.vocab_size)
        self.requests.append(request)
        output = Output(request)
        output.stream = TextStream(self._tokenizer, request.stop, request.continues)
        self._running.append((output, self._tokenizer.encode(self._replies.pop(0))))
        self.most_running = max(self.most_running, len(self._running))
        return output

    def cancel(self, output):
        self.cancelled.append(output)
        self._finish(output, "cancelled")

    def step(self):
        self.steps += 1
        if self._on_step:
            self._on_step(self.steps)
        changed = []
        for output, ids in list(self._running):
            for _ in range(self._tokens):
                if output.finish_reason is None:
                    self._extend(output, ids)
            changed.append(output)
        return changed

    def _extend(self, output, ids):
        if len(output.tokens) == len(ids):
            return self._finish(output, "stop")
        output.tokens.append(ids[len(output.tokens)])
        output.logprobs.append(-0.5)
        output.stream.add(output.tokens[-1])
        if output.stream.stopped:
            self._finish(output, "stop")
        elif len(output.tokens) == output.request.max_new_tokens:
            self._finish(output, "length")

    def _finish(self, output, reason):
        output.stream.finish()
        output.finish_reason = reason
        self._running = [(one, ids) for one, ids in self._running if one is not output]


def model(tokenizer, replies, *, version=2, max_length=400, **engine):
    """version: of the chat format; 0: none."""
    format = chat.chat_format(tokenizer, version) if version else None
    return types.SimpleNamespace(
        engine=Engine(tokenizer, max_length, replies, **engine),
        tokenizer=tokenizer,
        max_length=max_length,
        format=format,
        name="parrot",
        defaults=DEFAULTS,
        chat_defaults=DEFAULTS,
        limit=lambda tokens, new: max(1, min(new, max_length - tokens)),
    )
