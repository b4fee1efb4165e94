"""Texts as lines of sentences, and what goes with some of them when they are cut out.

What a newline is, and where sentences end, is text.py's business.

Shapes: C characters of all texts of a batch, S sentences, L lines.
"""

import dataclasses
import functools

import numpy as np

from baichuan_jax.data.prepare import text

_INDENT = 16  # spaces and tabs that may stand before a fence or a table


@dataclasses.dataclass(frozen=True)
class Lines:
    """The sentences of some texts, and which line each stands in."""

    sentences: text.Spans
    opens: np.ndarray  # bool [S]: the sentence is the first of its line
    row: np.ndarray  # int64 [S]: the text each sentence stands in
    line: np.ndarray  # int64 [S]: the line it stands in
    firsts: np.ndarray  # int64 [L + 1]: the first sentence of each line; S at last


def lines(joined: text.Joined) -> Lines:
    """Finds the lines and sentences of texts. Empty lines belong to the line before them."""
    sentences = text.sentences(joined)
    opens = text.is_newline(joined.codes[sentences.starts - 1])
    counts = np.diff(sentences.rows)
    opens[sentences.rows[:-1][counts > 0]] = True
    return Lines(
        sentences=sentences,
        opens=opens,
        row=np.repeat(np.arange(len(counts)), counts),
        line=np.cumsum(opens) - 1,
        firsts=np.append(np.flatnonzero(opens), len(opens)),
    )


def heads(joined: text.Joined, lines: Lines) -> np.ndarray:
    """uint32 [3, L]: the first three characters of each line, after spaces and tabs."""
    codes = np.append(joined.codes, np.zeros(_INDENT + 3, np.uint32))
    place = lines.sentences.starts[lines.firsts[:-1]]
    for _ in range(_INDENT):
        place = place + ((codes[place] == ord(" ")) | (codes[place] == ord("\t")))
    return np.stack([codes[place], codes[place + 1], codes[place + 2]])


def fences(heads: np.ndarray) -> np.ndarray:
    """bool [L]: the line begins or ends a fenced block."""
    first, second, third = heads
    return ((first == ord("`")) | (first == ord("~"))) & (first == second) & (second == third)


def tables(heads: np.ndarray) -> np.ndarray:
    """bool [L]: the line is of a table, in Markdown or as a grid."""
    first, second, _ = heads
    return (first == ord("|")) | ((first == ord("+")) & (second == ord("-")))


def inside(turns: np.ndarray, lines: Lines) -> np.ndarray:
    """Which lines have a block open when they end, those that begin one included.

    Args:
      turns: bool [L]: a block begins here, or ends if one is open.
      lines: no block passes the end of a text.

    Returns:
      bool [L].
    """
    row = lines.row[lines.firsts[:-1]]
    count = np.cumsum(turns)
    count -= (count - turns)[np.searchsorted(row, row)]  # of the line's own text
    return count % 2 == 1


def rounded(
    drop: np.ndarray, joined: text.Joined, lines: Lines, copied: np.ndarray, enough: int
) -> np.ndarray:
    """The sentences to cut, bool [S], changed so that no shreds are left.

    With what is cut of a line goes the number or letter that the line begins with, and what is
    left with fewer than `enough` letters and digits, but only if it is `copied` (bool [S]) from
    elsewhere, too; and rules and stray punctuation in between. So nothing goes that says
    anything and stands nowhere else. A table, a fenced block or a `$$` formula stays, unless
    all of it and the sentence before it go.
    """
    if not len(drop):
        return drop
    drop = _with_separators(_with_stubs(drop, lines, copied, enough), lines)
    return _whole_blocks(drop, joined, lines)


def cut(joined: text.Joined, lines: Lines, drop: np.ndarray) -> list[str | None]:
    """The texts without the sentences; the newline after a line that is not all gone stays."""
    spans = lines.sentences
    if not drop.any():
        return [None] * (len(spans.rows) - 1)
    last = lines.firsts[1:] - 1
    part = drop[last] & np.logical_or.reduceat(~drop, lines.firsts[:-1])
    others = np.flatnonzero(~text.is_newline(joined.codes))
    newlines = others[np.searchsorted(others, spans.ends[last[part]]) - 1] + 1
    newlines = np.setdiff1d(newlines, np.append(spans.starts, len(joined.codes)))
    places = np.searchsorted(spans.starts, newlines)
    starts = np.insert(spans.starts, places, newlines)
    pieces = dataclasses.replace(
        spans,
        starts=starts,
        ends=np.append(starts[1:], len(joined.codes)),
        rows=np.searchsorted(starts, joined.starts),
    )
    return text.without(joined, pieces, np.insert(drop, places, False))


def _with_stubs(drop: np.ndarray, lines: Lines, copied: np.ndarray, enough: int) -> np.ndarray:
    sizes, firsts = lines.sentences.sizes, lines.firsts[:-1]
    left = np.add.reduceat(sizes * ~drop, firsts)
    small = np.logical_or.reduceat(drop, firsts) & (left < enough)
    own = ~drop & ~copied & small[lines.line] & (sizes > 0)
    labels = np.flatnonzero(own & lines.opens)
    own[labels[np.isin(lines.sentences.hashes[labels], _labels())]] = False
    small &= ~np.logical_or.reduceat(own, firsts)
    return drop | small[lines.line]


@functools.cache
def _labels() -> np.ndarray:
    """The hashes of what items of lists are called: numbers of up to three digits, letters."""
    named = [*map(str, range(1000)), *"abcdefghijklmnopqrstuvwxyz"]
    return text.sentences(text.join(named)).hashes


def _with_separators(drop: np.ndarray, lines: Lines) -> np.ndarray:
    """Sentences without a letter, such as rules, go with what is beside them.

    In a line that has letters, that is the next sentence of the line or else the last one. A
    line without any goes if its neighbours in the text do.
    """
    sizes = lines.sentences.sizes
    full, empty = np.flatnonzero(sizes), np.flatnonzero(sizes == 0)
    if not len(full) or not len(empty):
        return drop
    place = np.searchsorted(full, empty)
    after, before = full[np.minimum(place, len(full) - 1)], full[np.maximum(place - 1, 0)]
    has_after = lines.row[after] == lines.row[empty]
    has_before = lines.row[before] == lines.row[empty]
    both = (drop[after] | ~has_after) & (drop[before] | ~has_before) & (has_after | has_before)
    beside = np.where(lines.line[before] == lines.line[empty], drop[before], both)
    drop = drop.copy()
    drop[empty] = np.where(lines.line[after] == lines.line[empty], drop[after], beside)
    return drop


def _whole_blocks(drop: np.ndarray, joined: text.Joined, lines: Lines) -> np.ndarray:
    codes, firsts = joined.codes, lines.firsts[:-1]
    starts, row, head = lines.sentences.starts[firsts], lines.row[firsts], heads(joined, lines)
    formula = (head[0] == ord("$")) & (head[1] == ord("$"))  # in one line
    dollars = np.flatnonzero((codes[1:] == ord("$")) & (codes[:-1] == ord("$")))
    dollars = np.bincount(np.searchsorted(starts, dollars, "right") - 1, minlength=len(starts))
    turns = fences(head) | (dollars % 2 == 1)  # a block begins or ends
    opened = inside(turns, lines)
    kind = np.where(turns | opened, 2, tables(head) | formula)
    begins = (kind[1:] != kind[:-1]) | (row[1:] != row[:-1]) | (turns & opened)[1:]
    begins = np.append(True, begins)
    block = (np.cumsum(begins) - 1)[lines.line]
    full = lines.sentences.sizes > 0
    whole = (np.bincount(block, full & ~drop) == 0) & (np.bincount(block, full) > 0)
    opens = firsts[begins]
    before = np.append(-1, np.maximum.accumulate(np.where(full, np.arange(len(full)), -1)))[opens]
    whole &= drop[before] | (before < lines.sentences.rows[lines.row[opens]])
    return np.where(kind[lines.line] > 0, whole[block], drop)
