"""Answers of OpenAI's HTTP API: the engine's updates in, JSON objects out.

A stream's chunks and a whole answer come from the same `Reply`, so they cannot differ.
"""

import collections
import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from baichuan_jax.inference.calls import Call
from baichuan_jax.inference.request import Request
from baichuan_jax.inference.text import TextStream
from baichuan_jax.inference.worker import Update
from baichuan_jax.tokenizer import Tokenizer

_LEAST = -9_999.0  # JSON has no infinity


class Reply:
    """The answer to a call, as far as it has come."""

    def __init__(self, call: Call, tokenizer: Tokenizer):
        self._call = call
        self._tokenizer = tokenizer
        self._head = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if call.chat else "text_completion",
            "created": int(time.time()),
            "model": call.model,
        }
        echoes = call.echo or [None] * (len(call.requests) // call.choices)
        self._choices = [
            _Choice(request, tokenizer, echoes[i // call.choices])
            for i, request in enumerate(call.requests)
        ]

    def feed(self, index: int, update: Update) -> None:
        """Takes what is new of a choice."""
        self._choices[index].feed(update)

    def whole(self) -> dict[str, Any]:
        """The answer, when every choice has finished."""
        choices = []
        for index, choice in enumerate(self._choices):
            text, tokens = choice.take()
            said = {"text": text}
            if self._call.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(index, said, tokens, choice.finish_reason))
        return self._answer(choices) | {"usage": self.usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The first chunks of a stream."""
        if self._call.chat:
            for index in range(len(self._choices)):
                delta = {"delta": {"role": "assistant", "content": ""}}
                yield self._chunk([self._choice(index, delta, None, None)])

    def chunks(self, index: int) -> Iterator[dict[str, Any]]:
        """The chunks for what is new of a choice."""
        choice = self._choices[index]
        text, tokens = choice.take()
        finish_reason = choice.finish_reason
        if self._call.chat:
            if text or (tokens and self._call.logprobs):
                delta = {"delta": {"content": text}}
                yield self._chunk([self._choice(index, delta, tokens, None)])
            if finish_reason:
                yield self._chunk([self._choice(index, {"delta": {}}, None, finish_reason)])
        elif text or (tokens and self._call.logprobs) or finish_reason:
            yield self._chunk([self._choice(index, {"text": text}, tokens, finish_reason)])

    def closing(self) -> Iterator[dict[str, Any]]:
        """The last chunks of a stream."""
        if self._call.include_usage:
            yield self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Token counts; a prompt counts once, however many choices it has."""
        n = self._call.choices
        prompt = sum(len(request.prompt) for request in self._call.requests[::n])
        completion = sum(choice.tokens for choice in self._choices)
        cached = [choice.cached_tokens for choice in self._choices]
        # The other choices of a prompt find it cached by the first.
        reused = sum(min(cached[i : i + n]) for i in range(0, len(cached), n))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def _answer(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        answer = self._head | {"choices": choices}
        if self._call.dropped_rounds is not None:
            answer["dropped_rounds"] = self._call.dropped_rounds
        return answer

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._answer(choices)
        if self._call.chat:
            chunk["object"] = "chat.completion.chunk"
        if self._call.include_usage:
            chunk["usage"] = None
        return chunk

    def _choice(
        self,
        index: int,
        said: dict[str, Any],
        tokens: Sequence["_Token"] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        logprobs = None
        if self._call.logprobs and tokens is not None:
            logprobs = self._chat_logprobs(tokens) if self._call.chat else self._logprobs(tokens)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def _chat_logprobs(self, tokens: Sequence["_Token"]) -> dict[str, Any]:
        content = [
            self._scored(token.id, token.logprob)
            | {"top_logprobs": [self._scored(id, logprob) for id, logprob in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _scored(self, id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.id_bytes(id)
        token = _shown(id, self._tokenizer)
        return {"token": token, "logprob": _finite(logprob), "bytes": list(data)}

    def _logprobs(self, tokens: Sequence["_Token"]) -> dict[str, Any]:
        return {
            "tokens": [_shown(token.id, self._tokenizer) for token in tokens],
            "token_logprobs": [
                None if token.logprob is None else _finite(token.logprob) for token in tokens
            ],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.start for token in tokens],
        }

    def _top(self, token: "_Token") -> dict[str, float] | None:
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for id, logprob in [(token.id, token.logprob), *token.top]:
            name = _shown(id, self._tokenizer)
            if id != token.id and name in top:  # two tokens may stand for the same text
                name = f"token_id:{id}"
            top.setdefault(name, _finite(logprob))
        return top


@dataclasses.dataclass(frozen=True)
class _Token:
    id: int
    logprob: float | None  # None for the first of a prompt, which nothing predicts
    top: list[tuple[int, float]]
    start: int  # in the text of its choice, in characters


class _Choice:
    """One text and its tokens; each token is given out with the text it stands for."""

    def __init__(self, request: Request, tokenizer: Tokenizer, echo: str | None):
        self.finish_reason: str | None = None
        self.tokens = 0
        self.cached_tokens = 0
        self._request = request
        self._tokenizer = tokenizer
        self._echo = echo
        self._stream = TextStream(tokenizer, (), request.continues)
        self._placed = self._length = len(echo or "")  # characters of all tokens; of safe text
        self._text = ""
        self._waiting: collections.deque[_Token] = collections.deque()
        self._prompt_logprobs: list[float] = []
        self._prompt_top: list[list[tuple[int, float]]] = []

    def feed(self, update: Update) -> None:
        self._text += update.text
        self._length += len(update.text)
        self.tokens += len(update.tokens)
        self.cached_tokens = update.cached_tokens
        self.finish_reason = update.finish_reason
        self._prompt_logprobs += update.prompt_logprobs
        self._prompt_top += update.prompt_top
        for id, logprob, top in zip(update.tokens, update.logprobs, update.top, strict=True):
            self._waiting.append(_Token(id, logprob, top, self._placed))
            self._placed += len(self._stream.add(id))

    def take(self) -> tuple[str, list[_Token]]:
        """The text that is new since the last call, and its tokens."""
        text, tokens = self._text, []
        if self._echo is not None:
            if not self.tokens and self.finish_reason is None:
                return "", []  # the prompt is still being read
            text = self._echo + text
            tokens = list(self._prompt_tokens())
        self._text, self._echo = "", None
        while self._waiting and self._waiting[0].start < self._length:
            tokens.append(self._waiting.popleft())
        # At the end, tokens without text are left; those of a stop string are no part of it.
        if self.finish_reason and not (self._request.stop and self.finish_reason == "stop"):
            tokens += self._waiting
        return text, tokens

    def _prompt_tokens(self) -> Iterator[_Token]:
        stream, start = TextStream(self._tokenizer, (), continues=False), 0
        logprobs, tops = [None, *self._prompt_logprobs], [[], *self._prompt_top]
        if self._request.score_from is None:
            return
        for id, logprob, top in zip(self._request.prompt, logprobs, tops, strict=True):
            yield _Token(id, logprob, top, start)
            start += len(stream.add(id))


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST


def _shown(id: int, tokenizer: Tokenizer) -> str:
    """A token as a string; its bytes where they are no whole character, its id where none."""
    data = tokenizer.id_bytes(id)
    try:
        return data.decode() if data else f"token_id:{id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
