"""Texts as lines of sentences, and what goes with some of them when they are cut out.

Shapes: S sentences of all texts of a batch, L lines.
"""

import dataclasses

import numpy as np

from baichuan_jax.data.prepare import text

_NEWLINES = np.array([ord(c) for c in "\n\r\v\f\x85\u2028\u2029"], np.uint32)
_INDENT = 16  # spaces and tabs that may stand before a fence or a table


@dataclasses.dataclass(frozen=True)
class Lines:
    """The sentences of some texts, and which line each stands in."""

    sentences: text.Spans
    row: np.ndarray  # int64 [S]: the text each sentence stands in
    line: np.ndarray  # int64 [S]: the line it stands in
    firsts: np.ndarray  # int64 [L + 1]: the first sentence of each line; S at last


def lines(joined: text.Joined) -> Lines:
    """Finds the lines and sentences of texts. Empty lines belong to the line before them."""
    sentences = text.sentences(joined)
    opens = np.isin(joined.codes[sentences.starts - 1], _NEWLINES)
    counts = np.diff(sentences.rows)
    opens[sentences.rows[:-1][counts > 0]] = True
    return Lines(
        sentences=sentences,
        row=np.repeat(np.arange(len(counts)), counts),
        line=np.cumsum(opens) - 1,
        firsts=np.append(np.flatnonzero(opens), len(opens)),
    )


def rounded(drop: np.ndarray, joined: text.Joined, lines: Lines, enough: int) -> np.ndarray:
    """The sentences to cut, bool [S], changed so that no shreds are left.

    What would be left of a line and has fewer than `enough` letters and digits goes too, and so
    do rules and stray punctuation in between. A table, a fenced block or a `$$` formula stays,
    unless all of it and the sentence before it go.
    """
    if not len(drop):
        return drop
    drop = _with_separators(_with_stubs(drop, lines, enough), lines)
    return _whole_blocks(drop, joined, lines)


def cut(joined: text.Joined, lines: Lines, drop: np.ndarray) -> list[str | None]:
    """The texts without the sentences; the newline after a line that is not all gone stays."""
    spans = lines.sentences
    last = lines.firsts[1:] - 1
    part = drop[last] & (np.add.reduceat(~drop, lines.firsts[:-1]) > 0) if len(last) else last
    starts = spans.ends[last[part]] if len(last) else last
    while len(newline := np.flatnonzero(np.isin(joined.codes[starts - 1], _NEWLINES))):
        starts[newline] -= 1
    starts = np.setdiff1d(starts, np.append(spans.starts, len(joined.codes)))
    order = np.argsort(np.append(spans.starts, starts), kind="stable")
    starts = np.append(spans.starts, starts)[order]
    drop = np.append(drop, np.zeros(len(starts) - len(drop), bool))[order]
    pieces = dataclasses.replace(
        spans,
        starts=starts,
        ends=np.append(starts[1:], len(joined.codes))[: len(starts)],
        rows=np.searchsorted(starts, joined.starts),
    )
    return text.without(joined, pieces, drop)


def _with_stubs(drop: np.ndarray, lines: Lines, enough: int) -> np.ndarray:
    left = np.add.reduceat(lines.sentences.sizes * ~drop, lines.firsts[:-1])
    stub = np.logical_or.reduceat(drop, lines.firsts[:-1]) & (left < enough)
    return drop | stub[lines.line]


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
    codes = np.append(joined.codes, np.zeros(_INDENT + 3, np.uint32))
    starts = place = lines.sentences.starts[lines.firsts[:-1]]
    for _ in range(_INDENT):
        place = place + ((codes[place] == ord(" ")) | (codes[place] == ord("\t")))
    mark = codes[place]
    fence = (mark == ord("`")) | (mark == ord("~"))
    fence &= (codes[place + 1] == mark) & (codes[place + 2] == mark)
    table = (mark == ord("|")) | ((mark == ord("+")) & (codes[place + 1] == ord("-")))
    table |= (mark == ord("$")) & (codes[place + 1] == ord("$"))  # a formula in one line
    dollars = np.flatnonzero((codes[1:] == ord("$")) & (codes[:-1] == ord("$")))
    dollars = np.bincount(np.searchsorted(starts, dollars, "right") - 1, minlength=len(starts))
    turns = fence | (dollars % 2 == 1)  # a block begins or ends
    row = lines.row[lines.firsts[:-1]]
    count = np.cumsum(turns)
    count -= (count - turns)[np.searchsorted(row, row)]  # of the line's own text
    kind = np.where(turns | (count % 2 == 1), 2, table)
    begins = (kind[1:] != kind[:-1]) | (row[1:] != row[:-1]) | (turns & (count % 2 == 1))[1:]
    begins = np.append(True, begins)
    block = (np.cumsum(begins) - 1)[lines.line]
    full = lines.sentences.sizes > 0
    whole = (np.bincount(block, full & ~drop) == 0) & (np.bincount(block, full) > 0)
    opens = lines.firsts[:-1][begins]
    before = np.append(-1, np.maximum.accumulate(np.where(full, np.arange(len(full)), -1)))[opens]
    whole &= drop[before] | (before < lines.sentences.rows[lines.row[opens]])
    return np.where(kind[lines.line] > 0, whole[block], drop)
