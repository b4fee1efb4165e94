"""Token ids in, safe text out, as a model says them.

Safe means final: no cut character, and no part of what may become a stop string.
"""

import codecs
from collections.abc import Sequence

from baichuan_jax.tokenizer import Tokenizer


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    return "\ufffd" * (error.end - error.start), error.end


# Python's "replace" gives one U+FFFD for all bytes of a cut character, SentencePiece one for each.
_ERRORS = "baichuan_jax.replace_each_byte"
codecs.register_error(_ERRORS, _replace_each_byte)


class TextStream:
    """The text of tokens that come one by one.

    The pieces that `add` and `finish` return are, together, `tokenizer.decode(tokens,
    continues)` up to the stop string. A token costs the same however many came before.

    Attributes:
      stopped: a stop string was completed; it and all after it is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), continues: bool = True):
        """Starts an empty text.

        Args:
          stop: strings that end the text. The first that is complete does; of several that end
            with the same character, the longest.
          continues: as of `Tokenizer.decode`.

        Raises:
          ValueError: a stop string is empty, or `stop` is one string instead of several.
        """
        if isinstance(stop, str):
            raise ValueError(f"stop={stop!r} must be a sequence of strings, as ({stop!r},).")
        for i, string in enumerate(stop):
            if not (isinstance(string, str) and string):
                raise ValueError(f"stop[{i}]={string!r} must be a string that is not empty.")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = [_Matcher(string) for string in stop]
        self._starts = not continues
        self._decoder = codecs.getincrementaldecoder("utf-8")(_ERRORS)
        self._held = ""  # the longest end of the text that begins a stop string
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All safe text so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that became safe by it, often ''.

        Raises:
          ValueError: the id is not in the vocabulary.
        """
        data = self._tokenizer.id_bytes(token)
        if self._starts and data:
            self._starts = False
            if data[0] == 0x20:  # `decode` knows whether it is a dummy prefix
                data = self._tokenizer.decode([token]).encode()
        # Bytes on the two sides of a special token are not of one character.
        return self._release(self._decoder.decode(data, final=not data))

    def finish(self) -> str:
        """The rest of the text: no more tokens come."""
        rest = self._release(self._decoder.decode(b"", final=True))
        return rest + self._release("", last=True)

    def _release(self, new: str, last: bool = False) -> str:
        if self.stopped:
            return ""
        start = len(self._held)
        text = self._held + new
        for end in range(start, len(text)):
            lengths = [matcher.add(text[end]) for matcher in self._stops]
            if found := max(lengths, default=0):
                self.stopped = True
                return self._give(text[: end + 1 - found], "")
        held = 0 if last else max((matcher.length for matcher in self._stops), default=0)
        return self._give(text[: len(text) - held], text[len(text) - held :])

    def _give(self, safe: str, held: str) -> str:
        self._held = held
        if safe:
            self._parts.append(safe)
        return safe


class _Matcher:
    """Knuth, Morris and Pratt: how much of a string the last characters of a text are."""

    def __init__(self, string: str):
        self._string = string
        self._shorter = [0] * len(string)  # the longest proper border of each beginning
        self.length = 0
        for i in range(1, len(string)):
            self._shorter[i] = self._extend(self._shorter[i - 1], string[i])

    def add(self, character: str) -> int:
        """Takes the next character; the string's length if it is complete, or else 0."""
        self.length = self._extend(self.length, character)
        return self.length if self.length == len(self._string) else 0

    def _extend(self, length: int, character: str) -> int:
        while length and self._string[length] != character:
            length = self._shorter[length - 1]
        return length + (self._string[length] == character)
