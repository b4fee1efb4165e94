"""A conversation in the terminal: what `python -m experiments.chat` runs.

Replies go to standard output as they come, notices to standard error. Where the input is not
a terminal, each of its lines is a message, and nothing but the replies is printed there.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from baichuan_jax.chat import chat_prompt, prompt_budget
from baichuan_jax.inference.engine import Engine
from baichuan_jax.inference.load import LanguageModel
from baichuan_jax.inference.request import Output, Request
from baichuan_jax.inference.sampling import Sampling

with contextlib.suppress(ImportError):  # not on Windows
    import readline

    # Several pasted lines are one message.
    readline.parse_and_bind("set enable-bracketed-paste on")

_HELP = """\
/clear       forgets the conversation, but not the system message
/save FILE   writes the conversation as JSON
/help        shows this
/exit        leaves, as does Ctrl-D; Ctrl-C stops a reply
A line that ends with \\ goes on in the next one; a space before / makes it no command."""

# A model can say what a terminal obeys: control characters are shown, not sent.
_SHOWN = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_SHOWN |= {0x7F: 0x2421} | {code: 0xFFFD for code in range(0x80, 0xA0)}


def converse(
    model: LanguageModel,
    *,
    system: str = "",
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Talks until the end of the input or `/exit`.

    Args:
      system: the system message; none where empty.
      sampling, max_new_tokens: of each reply; None: the model's own. The seed grows by one with
        each reply.

    Raises:
      ValueError: the model has no chat format, the system message does not fit or is not of its
        format, or a field of `sampling` is wrong; known before the first message.
    """
    if model.format is None:
        raise ValueError(
            f"{model.name} is no chat model: its tokenizer lacks the role tokens. Continue a text"
            " with experiments.generate instead."
        )
    sampling = model.chat_defaults.sampling if sampling is None else sampling
    sampling.check(model.tokenizer.vocab_size)
    if max_new_tokens is None:
        max_new_tokens = model.chat_defaults.max_new_tokens
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    conversation = _Conversation(model, system, sampling, max_new_tokens)
    conversation.prompt("")  # what is wrong with the system message shows here
    if sys.stdin.isatty():
        _tell(f"{model.name}, Baichuan {model.format.version} format. /help shows the commands.")
    while (line := _read()) is not None:
        command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", line.rstrip(), re.DOTALL)
        if command and command[1] == "exit":
            return
        if command:
            conversation.obey(command[1], command[2] or "")
        elif line.strip():
            conversation.answer(line)


def show(engine: Engine, request: Request, before: str = "") -> Output:
    """Prints the text of a request as it comes; Ctrl-C ends it ('cancelled'), twice the program.

    Args:
      before: is printed first, if the request is a sound one.

    Raises:
      ValueError: names the field of the request that is wrong.
    """
    output, shown = engine.submit(request), 0
    print(before, end="", flush=True)
    with _interrupts() as interrupted:
        while output.finish_reason is None:
            engine.step()
            if output.finish_reason is None and interrupted():
                engine.cancel(output)
            text, shown = output.text[shown:], len(output.text)
            sys.stdout.write(text.translate(_SHOWN) if sys.stdout.isatty() else text)
            sys.stdout.flush()
    print(flush=True)
    return output


class _Conversation:
    def __init__(self, model: LanguageModel, system: str, sampling: Sampling, max_new_tokens: int):
        self._model, self._sampling, self._max_new_tokens = model, sampling, max_new_tokens
        self._head = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._head)
        self._replies = 0

    def prompt(self, text: str):
        model = self._model
        budget = prompt_budget(model.max_length, self._max_new_tokens)
        messages = [*self._messages, {"role": "user", "content": text}]
        return chat_prompt(messages, model.tokenizer, model.format, budget)

    def answer(self, text: str) -> None:
        model = self._model
        try:
            prompt = self.prompt(text)
        except ValueError as error:
            _tell(f"Not sent: {error}")
            return
        if prompt.dropped_rounds:
            _tell(
                f"The model no longer sees the oldest {_count(prompt.dropped_rounds, 'round')} of"
                " this conversation: its context is full. /clear starts anew."
            )
        request = Request(
            prompt=prompt.ids,
            max_new_tokens=model.limit(len(prompt.ids), self._max_new_tokens),
            sampling=dataclasses.replace(self._sampling, seed=self._sampling.seed + self._replies),
            continues=False,
        )
        began = time.monotonic()
        output = show(model.engine, request)
        seconds = time.monotonic() - began
        self._replies += 1
        self._messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": output.text},
        ]
        tokens = _count(len(output.tokens), "token")
        if output.finish_reason == "cancelled":
            _tell("Stopped.")
        if output.finish_reason == "length":
            _tell(f"The reply was cut after {tokens}: --max_new_tokens, or the context's end.")
        if sys.stdout.isatty():
            _tell(f"{tokens}, {len(output.tokens) / max(seconds, 1e-9):.1f} tokens/s")

    def obey(self, command: str, argument: str) -> None:
        if command == "help":
            _tell(_HELP)
        elif command == "clear":
            self._messages = list(self._head)
            _tell("The conversation is forgotten.")
        elif command == "save" and argument:
            text = json.dumps(self._messages, ensure_ascii=False, indent=2)
            try:
                pathlib.Path(argument).expanduser().write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                _tell(f"Not saved: {error}")
            else:
                _tell(f"{_count(len(self._messages), 'message')} saved in {argument}.")
        elif command == "save":
            _tell("/save needs the name of a file: /save talk.json")
        else:
            _tell(f"There is no command /{command}.\n{_HELP}")


def _read() -> str | None:
    """The next message, or None at the end of the input."""
    interactive = sys.stdin.isatty()
    lines: list[str] = []
    while True:
        try:
            line = input((". " if lines else "> ") if interactive else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        except (KeyboardInterrupt, UnicodeDecodeError) as error:
            if not interactive:
                raise
            lines = []
            stopped = isinstance(error, KeyboardInterrupt)
            _tell("\nCtrl-D or /exit leaves." if stopped else f"Not sent: {error}")
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Notes a first Ctrl-C instead of raising it inside the engine, whose cache it would lose."""
    noted = False

    def note(*_) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    if threading.current_thread() is not threading.main_thread():  # signals are the main one's
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(text: str) -> None:
    sys.stdout.flush()
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
