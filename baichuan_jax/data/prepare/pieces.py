"""What lines and sentences are made of: their characters by class, their words, their text.

The rules of clean.py and sentences.py are about these counts.

Shapes: C characters of all texts of a batch, P pieces.
"""

import dataclasses
import functools
import unicodedata

import numpy as np
import pyarrow as pa

from baichuan_jax.data.prepare import text

# Classes of characters; all but BLANK are visible.
BLANK, LETTER, OTHER_LETTER, HAN, FUNCTION, DIGIT, STOP, PUNCTUATION, SYMBOL, GARBLED = range(10)

# The commonest characters of modern and classical Chinese grammar, and of Japanese.
FUNCTION_CHARACTERS = (
    "的了在是不有我这他们你和就也都着之其而以于者曰为无何此乃则所与無這們為於與來"
    "のにはをたがでてとしれもなさ"
)
_STOPS = "，、。；：？！"
_PUNCTUATION = ".,;:!?'\"()-“”‘’（）《》〈〉「」『』【】〔〕—…·～–‧"
# Characters that UTF-8 read as GBK is full of: what 锟斤拷, ，, 。 and 的 look like then.
_MISREAD_AS_GBK = "锟锛銆鐨"


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Lines or sentences of a batch, and what is in each."""

    spans: text.Spans
    classes: np.ndarray  # int64 [P, classes]: characters of each class
    visible: np.ndarray  # int64 [P]: characters
    words: np.ndarray  # int64 [P]: what is between spaces
    starts: np.ndarray  # int64 [P]: of what is visible, in the codes
    ends: np.ndarray  # int64 [P]

    @classmethod
    def of(cls, joined: text.Joined, spans: text.Spans) -> "Pieces":
        """Counts in one pass; the spans tile the texts, as those of `text` do."""
        kinds = _class_table().take(joined.codes)
        size, number = GARBLED + 1, len(spans.starts)
        cells = np.repeat(np.arange(number) * size, spans.ends - spans.starts)
        cells += kinds
        classes = np.bincount(cells, minlength=number * size).reshape(number, size)
        padded = np.zeros(len(kinds) + 2, bool)
        np.not_equal(kinds, BLANK, out=padded[1:-1])
        visible, begins, finishes = padded[1:-1], ~padded[:-2], ~padded[2:]
        begins[spans.starts] = finishes[spans.ends - 1] = True  # no word passes a piece's ends
        begins, finishes = np.flatnonzero(begins & visible), np.flatnonzero(finishes & visible)
        first = np.searchsorted(begins, np.append(spans.starts, len(kinds)))
        words = np.diff(first)
        return cls(
            spans,
            classes,
            classes.sum(1) - classes[:, BLANK],
            words,
            np.where(words > 0, np.append(begins, 0)[first[:-1]], spans.starts),
            np.where(words > 0, np.append(0, finishes + 1)[first[1:]], spans.starts),
        )


def strings(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> pa.StringArray:
    """Stretches of codes, uint32 [C], as an array of strings; starts and ends are int64."""
    sizes = ends - starts
    offsets = np.append(0, np.cumsum(sizes))
    chosen = codes[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)]
    utf8_sizes = 1 + sum((chosen >= limit).astype(np.int32) for limit in (0x80, 0x800, 0x10000))
    utf8_offsets = np.append(0, np.cumsum(utf8_sizes))[offsets].astype(np.int32)
    content = chosen.tobytes().decode("utf-32-le").encode()
    buffers = [None, pa.py_buffer(utf8_offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.string(), len(starts), buffers)


def totals(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sums of values[offsets[n] : offsets[n + 1]] along the first axis, int64; 0 of nothing."""
    sums = np.zeros((len(offsets) - 1, *values.shape[1:]), np.int64)
    filled = offsets[:-1] < offsets[1:]
    if filled.any():
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled], axis=0, dtype=np.int64)
    return sums


def characters(string: str) -> np.ndarray:
    """Code points, uint32."""
    return np.frombuffer(string.encode("utf-32-le"), np.uint32)


@functools.cache
def _class_table() -> np.ndarray:
    """uint8 [0x110000]: the class of each character."""
    kinds = text.fold(np.arange(0x110000, dtype=np.uint32)) >> text.CLASS_SHIFT
    table = np.array([SYMBOL, OTHER_LETTER, HAN], np.uint8)[kinds]
    table[0xE0000:] = GARBLED  # tags, and private use
    for code in np.flatnonzero(kinds[:0x30000] != text.HAN).tolist():
        category = unicodedata.category(chr(code))
        if category in ("Zs", "Zl", "Zp", "Cf") or chr(code) in "\t" + text.NEWLINES:
            table[code] = BLANK
        elif category in ("Cc", "Co", "Cs", "Cn"):
            table[code] = GARBLED
        elif category == "Nd":
            table[code] = DIGIT
    table[np.r_[0x41:0x5B, 0x61:0x7B]] = LETTER
    table[0x3041:0x3097] = table[0x30A1:0x30FB] = HAN  # kana
    for string, kind in (
        ("_", SYMBOL), (_PUNCTUATION, PUNCTUATION), (_STOPS, STOP),
        (FUNCTION_CHARACTERS, FUNCTION), (_MISREAD_AS_GBK + "\ufffd", GARBLED),
    ):  # fmt: skip
        table[characters(string)] = kind
    return table
