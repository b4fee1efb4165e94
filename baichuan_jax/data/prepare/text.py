"""Texts as one array of code points, and what is cut out of it: tokens, n-grams, sentences.

All stages of the data system (§2.1) see text in this way. A batch of texts is one array.
One table folds it: NFKC width and case, and the class of each character. One running sum
over it then gives the hash of every token, sentence or n-gram by a subtraction and a
multiplication, so nothing here loops over characters or tokens in Python.

Chinese needs no segmenter: a token is one Han character, or one run of other letters,
digits and `_`.

Hashes are the same on every machine; only characters that are newer than a Python's
Unicode tables (`unicodedata.unidata_version`) may fold differently in another Python.

Shapes: C characters of all texts of a batch, N texts, K tokens, M n-grams, S spans.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from baichuan_jax.data.prepare import traditional

# A folded character: its code point in the low 24 bits, its class above them.
CODE_MASK = (1 << 24) - 1
CLASS_SHIFT = 24
SEPARATOR, WORD, HAN = range(3)  # space and punctuation; letters, digits, `_`; Han

_CODES = 0x110000
_HAN_RANGES = [
    (0x3005, 0x3005), (0x3007, 0x3007), (0x3021, 0x3029),  # 々, 〇, Suzhou numerals
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFD),
]  # fmt: skip
# Ranges whose characters fold to themselves; no use to ask for each.
_PLAIN_RANGES = [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xD800, 0xF8FF)]
_LOOKED_UP = [(0, 0x1FFFF), (0x2F800, 0x2FA1F)]

NEWLINES = "\n\r\v\f\x85\u2028\u2029"  # what ends a line, for all stages
# What the characters do to sentences.
_NEWLINE, _SPACE, _BLANK = 1, 2, 3  # either of the first two is blank
_CLOSES, _ENDS_BEFORE_SPACE, _ENDS = 4, 5, 6
_ROLES = {
    _NEWLINE: NEWLINES,
    _CLOSES: "\"')]}”’»›」』）】》〉〕］｝〗〙＂＇",
    _ENDS_BEFORE_SPACE: ".!?",
    _ENDS: "。！？；…｡⋯",
}

# Odd numbers whose bits look like chance; the second is 2^64 over the root of x^4 = x + 1.
_TOKEN_MULTIPLIER = 0x9E6D62D06F6A3B1D
_NGRAM_MULTIPLIER = 0xD1B54A32D192ED03

_BATCH = 1 << 18  # characters that stay in a processor's cache with all that is made of them
_COMMON = 2 * _BATCH


@dataclasses.dataclass(frozen=True)
class Joined:
    """Texts after each other; text n is codes[starts[n] : starts[n + 1]]."""

    codes: np.ndarray  # uint32 [C]
    starts: np.ndarray  # int64 [N + 1]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens in the order of the text; those of text n are rows[n] to rows[n + 1]."""

    hashes: np.ndarray  # uint64 [K]
    starts: np.ndarray  # int64 [K], in the codes
    ends: np.ndarray  # int64 [K]
    rows: np.ndarray  # int64 [N + 1]


@dataclasses.dataclass(frozen=True)
class Spans:
    """Stretches that tile the texts: white space and newlines belong to what is before them.

    The hash sees folded letters, digits and Han only, so neither spacing nor punctuation
    nor case changes it; `sizes` counts the characters it saw (0: the span has no content).
    """

    starts: np.ndarray  # int64 [S], in the codes
    ends: np.ndarray  # int64 [S]
    hashes: np.ndarray  # uint64 [S]
    sizes: np.ndarray  # int64 [S]
    rows: np.ndarray  # int64 [N + 1]


def join(texts: pa.StringArray | pa.ChunkedArray | Sequence[str]) -> Joined:
    """The code points of all texts; a null counts as an empty text.

    Raises:
      ValueError: a text has a lone surrogate, which is no character.
    """
    if isinstance(texts, pa.ChunkedArray | pa.Array):
        array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
        whole = str(_utf8(array.fill_null("") if array.null_count else array), "utf-8")
    else:
        whole = "".join(texts)
    starts = np.concatenate([[0], np.cumsum(_lengths(texts))])
    return Joined(np.frombuffer(whole.encode("utf-32-le"), np.uint32), starts)


def batches(
    texts: pa.StringArray | pa.ChunkedArray | Sequence[str], characters: int = _BATCH
) -> Iterator[slice]:
    """Slices of the texts of about so many characters, to stay in the processor's cache.

    A slice has at least one text, whole; only a text that is longer passes the limit. What is
    made of a text takes some 50 bytes a character at a time.
    """
    ends = np.cumsum(_lengths(texts))
    start = 0
    while start < len(ends):
        limit = characters + (ends[start - 1] if start else 0)
        stop = max(start + 1, int(np.searchsorted(ends, limit, "right")))
        yield slice(start, stop)
        start = stop


def fold(codes: np.ndarray, simplify: bool = False) -> np.ndarray:
    """Folds width and case: uint32 [C] of code points → uint32 [C].

    A folded character holds its code point (`& CODE_MASK`) and its class (`>> CLASS_SHIFT`:
    SEPARATOR, WORD or HAN). NFKC is followed where it makes one character of one: 'Ａ' and 'a'
    become 'a', '①' becomes '1', but 'ﬁ' stays.

    Args:
      codes: Code points.
      simplify: Also folds traditional to simplified Han, by single characters.
    """
    return _fold_table(simplify).take(codes)  # twice as fast as indexing


def tokens(joined: Joined, simplify: bool = False) -> Tokens:
    """One Han character, or one run of other letters, digits and `_`, is a token."""
    folded = fold(joined.codes, simplify)
    content, han = folded > CODE_MASK, folded >= HAN << CLASS_SHIFT
    word = content ^ han
    # Cuts the texts where words begin and end, around each Han character, and into texts.
    cut = np.zeros(len(folded) + 1, bool)
    cut[1:-1] = word[1:] != word[:-1]
    cut[:-1] |= han
    cut[1:] |= han
    cut[joined.starts] = True
    bounds = np.flatnonzero(cut)
    kept = np.flatnonzero(content.take(bounds[:-1]))  # what is not separators
    starts, ends = bounds.take(kept), bounds.take(kept + 1)
    hashes = _range_hashes(folded, _TOKEN_MULTIPLIER, starts, ends)
    return Tokens(hashes, starts, ends, np.searchsorted(starts, joined.starts))


def ngrams(tokens: Tokens, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of n tokens after each other, within each text.

    A text with fewer than n tokens, but with any, gives one n-gram of all it has.

    Returns:
      hashes: uint64 [M].
      rows: int64 [N + 1]; the n-grams of text i are hashes[rows[i] : rows[i + 1]].
    """
    sums, inverses = _running_hash(tokens.hashes, _NGRAM_MULTIPLIER)
    starts, ends = tokens.rows[:-1], tokens.rows[1:]
    # Of every token with the n - 1 after it; then those that pass a text's end are left out.
    hashes = np.empty(len(tokens.hashes), np.uint64)
    hashes[: max(len(sums) - n, 0)] = sums[n:] - sums[:-n]
    whole = np.ones(len(hashes), bool)
    for back in range(1, n):
        whole[(ends - back)[ends - back >= starts]] = False
    short = (ends > starts) & (ends - starts < n)
    firsts = starts[short]
    hashes[firsts] = sums[ends[short]] - sums[firsts]
    whole[firsts] = True
    hashes *= inverses[: len(hashes)]
    counts = np.where(short, 1, np.maximum(ends - starts - n + 1, 0))
    return mix(hashes[whole]), np.concatenate([[0], np.cumsum(counts)])


def is_newline(codes: np.ndarray) -> np.ndarray:
    """bool: which of the code points end a line."""
    return _role_table().take(codes) == _NEWLINE


def line_starts(joined: Joined) -> np.ndarray:
    """int64 [L], rising: where lines start; an empty line belongs to the line before it."""
    inner = _after_newlines(is_newline(joined.codes))
    return np.union1d(inner, joined.starts[:-1][np.diff(joined.starts) > 0])


def paragraphs(joined: Joined) -> Spans:
    """The lines of the texts, as `line_starts` has them."""
    return _spans(joined, line_starts(joined))


def sentences(joined: Joined) -> Spans:
    """The sentences of the texts; a newline always ends one.

    They end at 。！？；…, and at ASCII `.!?` where white space or the end of the text follows.
    Closing quotes and brackets still belong to the sentence.
    """
    roles = _role_table().take(joined.codes)
    lines = _after_newlines(roles == _NEWLINE)
    ends = np.flatnonzero(roles >= _ENDS_BEFORE_SPACE)
    # A run of .)))!? and the like is passed as a whole, but not into the next text.
    limits = joined.starts[np.searchsorted(joined.starts, ends, "right")]
    closed = np.minimum(_skip(roles >= _CLOSES, ends + 1), limits)
    roles = np.append(roles, np.uint8(_SPACE))
    real = (roles[ends] == _ENDS) | (closed == limits) | (roles[closed] & _BLANK > 0)
    starts = _skip(roles[:-1] == _SPACE, closed[real])
    starts = starts[(starts < limits[real]) & (roles[starts] != _NEWLINE)]
    return _spans(joined, np.concatenate([lines, starts]))


def without(joined: Joined, spans: Spans, drop: np.ndarray) -> list[str | None]:
    """The texts without the spans that `drop`, bool [S], marks; None where nothing is cut."""
    sizes = spans.ends - spans.starts
    left = joined.codes[np.repeat(~drop, sizes)].tobytes().decode("utf-32-le")
    kept = np.concatenate([[0], np.cumsum(np.where(drop, 0, sizes))])[spans.rows]
    dropped = np.concatenate([[0], np.cumsum(drop)])[spans.rows]
    return [
        left[kept[n] : kept[n + 1]] if dropped[n + 1] > dropped[n] else None
        for n in range(len(spans.rows) - 1)
    ]


def mix(hashes: np.ndarray) -> np.ndarray:
    """Spreads what is in any bit of a uint64 over all of them (the finaliser of splitmix64)."""
    hashes = hashes ^ (hashes >> np.uint64(30))
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return hashes


def _range_hashes(
    values: np.ndarray, multiplier: int, starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """sum over i of values[start + i] · multiplier^i modulo 2^64, for each range; mixed."""
    sums, inverses = _running_hash(values, multiplier)
    hashes = sums.take(ends)
    hashes -= sums.take(starts)
    hashes *= inverses.take(starts)
    return mix(hashes)


def _running_hash(values: np.ndarray, multiplier: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of values[i] · multiplier^i before each place, and multiplier^-i for each place.

    A difference of two sums, by the inverse power of where it starts, is the hash of the range
    wherever it stands: an odd number has an inverse modulo 2^64.
    """
    count = len(values) + 1
    if count <= _COMMON:
        powers, inverses = _common_powers(multiplier)
    else:  # of a very long text; too large to keep
        powers, inverses = _powers(multiplier, count)
    sums = np.empty(len(values) + 1, np.uint64)
    sums[0] = 0
    np.multiply(values, powers[: len(values)], out=sums[1:])
    np.cumsum(sums[1:], out=sums[1:])
    return sums, inverses


@functools.cache
def _common_powers(multiplier: int) -> tuple[np.ndarray, np.ndarray]:
    return _powers(multiplier, _COMMON)


def _powers(multiplier: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    both = []
    for base in (multiplier, pow(multiplier, -1, 1 << 64)):
        powers = np.full(count, base, np.uint64)
        powers[0] = 1
        both.append(np.cumprod(powers, out=powers))
    return both[0], both[1]


def _spans(joined: Joined, starts: np.ndarray) -> Spans:
    """Spans that begin at `starts` and at the start of every text that is not empty."""
    size = len(joined.codes)
    cut = np.zeros(size + 1, bool)
    cut[starts] = cut[joined.starts] = True
    starts = np.flatnonzero(cut[:size])
    ends = np.append(starts[1:], size)[: len(starts)]
    folded = fold(joined.codes)
    content = np.flatnonzero(folded > CODE_MASK)  # its class is not SEPARATOR
    first, last = np.searchsorted(content, starts), np.searchsorted(content, ends)
    hashes = _range_hashes(folded.take(content), _TOKEN_MULTIPLIER, first, last)
    return Spans(starts, ends, hashes, last - first, np.searchsorted(starts, joined.starts))


def _after_newlines(newline: np.ndarray) -> np.ndarray:
    """Where lines start, but for the first line of a text."""
    return np.flatnonzero(newline[:-1] > newline[1:]) + 1


def _skip(mask: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For each place the first one from there on that `mask` does not mark; len(mask) at last."""
    mask = np.append(mask, False)
    run_ends = np.flatnonzero(mask[:-1] > mask[1:]) + 1
    run = np.searchsorted(run_ends, places, "right")
    return np.where(mask[places], np.append(run_ends, 0)[run], places)


def _lengths(texts: pa.StringArray | pa.ChunkedArray | Sequence[str]) -> np.ndarray:
    """Characters of each text, int64 [N]."""
    if isinstance(texts, pa.ChunkedArray | pa.Array):
        return pc.fill_null(pc.utf8_length(texts), 0).to_numpy().astype(np.int64)
    return np.fromiter(map(len, texts), np.int64, len(texts))


def _utf8(array: pa.Array) -> memoryview:
    """The bytes of all its texts after each other."""
    _, offsets, data = array.buffers()
    if not len(array) or data is None:
        return memoryview(b"")
    wide = pa.types.is_large_string(array.type)
    offsets = np.frombuffer(offsets, np.int64 if wide else np.int32)
    return memoryview(data)[offsets[array.offset] : offsets[array.offset + len(array)]]


@functools.cache
def _fold_table(simplify: bool) -> np.ndarray:
    """uint32 [0x110000]: for every code point the folded one and its class."""
    if simplify:
        table = _fold_table(False)
        pairs = np.frombuffer(traditional.PAIRS.encode("utf-32-le"), np.uint32)
        replaced = np.arange(_CODES, dtype=np.uint32)
        replaced[pairs[::2]] = pairs[1::2]
        # Twice: 薴 is simplified to 苧, and 苧, in another word, to 苎.
        return table[replaced[replaced[table & CODE_MASK]]]
    codes = np.arange(_CODES, dtype=np.uint32)
    kinds = np.zeros(_CODES, np.uint32)
    plain = np.zeros(_CODES, bool)
    for first, last in _PLAIN_RANGES:
        plain[first : last + 1] = True
    kinds[0xAC00:0xD7A4] = WORD  # Hangul syllables
    for first, last in _LOOKED_UP:
        for code in range(first, last + 1):
            if not plain[code]:
                codes[code], kinds[code] = _folded(chr(code))
    for first, last in _HAN_RANGES:
        kinds[first : last + 1] = HAN
    codes = codes[codes]  # what a fold leads to may fold further
    return codes | kinds[codes] << CLASS_SHIFT


def _folded(character: str) -> tuple[int, int]:
    for change in (functools.partial(unicodedata.normalize, "NFKC"), str.casefold):
        changed = change(character)
        character = changed if len(changed) == 1 else character
    # Marks belong to the letters they stand on; variation selectors say nothing.
    mark = unicodedata.category(character)[0] == "M" and not 0xFE00 <= ord(character) <= 0xFE0F
    return ord(character), WORD if character.isalnum() or character == "_" or mark else SEPARATOR


@functools.cache
def _role_table() -> np.ndarray:
    """uint8 [0x110000]: what each character does to sentences."""
    table = np.zeros(_CODES, np.uint8)
    table[[code for code in range(0x3001) if chr(code).isspace()]] = _SPACE
    for role, characters in _ROLES.items():
        table[[ord(character) for character in characters]] = role
    return table
