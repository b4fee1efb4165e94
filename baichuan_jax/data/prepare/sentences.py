"""Sentence-wise quality filter (§2.1): cuts out what no reader would miss.

Rules find sentences that are mostly ornaments, leaders or exclamation marks, rows of links,
invitations to read on elsewhere, and lists of keywords. With a classifier (linear.py), those that
it scores low go, too. Code, formulas, tables, headings and indented blocks stay as they are, so
that manuals keep theirs.

Shapes: C characters of all texts of a batch, N documents, S sentences.
"""

import collections
import dataclasses
import functools
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils import epath

from baichuan_jax.data.prepare import language, linear, lines, text
from baichuan_jax.data.prepare.pieces import (
    FUNCTION_CHARACTERS,
    Pieces,
    characters,
    strings,
    totals,
)


@dataclasses.dataclass
class SentencesConfig:
    """When a sentence goes, and when its document does."""

    # Of visible characters:
    max_ornaments: float = 0.5  # ★ ◆ ✿ and emoji
    max_leaders: float = 0.5  # dots, as of a table of contents
    max_exclaimed: float = 0.2  # ! ?
    min_keywords: int = 8  # short items after each other: a list,
    max_keyword_share: float = 0.4  # of keywords where one word is in so many of the items
    classifier: str = ""  # a file that Linear.save wrote; empty: rules only
    min_score: float = 0.1  # by the classifier
    scored_from: int = 20  # letters, digits and Han: shorter sentences are not scored
    max_removed: float = 0.5  # of a document's content; if more would go, all of it does

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong, the classifier included."""
        shares = ("max_ornaments", "max_leaders", "max_exclaimed", "max_keyword_share")
        for name in (*shares, "min_score", "max_removed"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"config.sentences.{name}={value} must be in [0, 1].")
        for name, least in (("min_keywords", 1), ("scored_from", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"config.sentences.{name}={value} must be {least} or more.")
        if self.classifier:
            try:
                _classifier(self.classifier)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"config.sentences.classifier={self.classifier} must be a file that"
                    f" Linear.save wrote: {error}"
                ) from None


def sentences(documents: pa.Table, config: SentencesConfig) -> pa.Table:
    """Cuts sentences out of documents, and drops those with little left; a local stage.

    Args:
      documents: with `text` and `language`.

    Returns:
      One row a document: `reason` ("low-quality sentences", or null), `text` (null: unchanged),
      `removed_sentences` (uint32), `removed_share` (float32, of the content).

    Raises:
      FileNotFoundError, ValueError: there is no such classifier, or it is damaged.
    """
    texts = pc.fill_null(documents["text"], "").combine_chunks()
    languages = np.array(pc.fill_null(documents["language"], language.UNKNOWN).to_pylist(), object)
    parts = list(text.batches(texts, _BATCH)) or [slice(0, 0)]
    return pa.concat_tables(_sentences(texts[part], languages[part], config) for part in parts)


def _sentences(texts: pa.StringArray, languages: np.ndarray, config: SentencesConfig) -> pa.Table:
    joined = text.join(texts)
    found = lines.lines(joined)
    spans = found.sentences
    if not len(spans.starts):
        return _table(
            [None] * len(texts), [None] * len(texts), np.zeros(len(texts)), np.zeros(len(texts))
        )
    pieces = Pieces.of(joined, spans)
    signs = _sign_table()[joined.codes]
    free = (languages != language.CODE)[found.row] & (pieces.visible > 0)
    free &= ~_in_markup(joined, signs, pieces, found)
    bad = free & _low_quality(joined.codes, signs, pieces, free, found.opens, config)
    if config.classifier:
        scores = _classifier(config.classifier).score_spans(joined, spans, languages.tolist())
        bad |= free & (spans.sizes >= config.scored_from) & (scores < config.min_score)
    removed = totals(spans.sizes * bad, spans.rows)
    share = removed / np.maximum(totals(spans.sizes, spans.rows), 1)
    reasons = np.where(share > config.max_removed, "low-quality sentences", None)
    edited = lines.cut(joined, found, bad)
    return _table(reasons, edited, totals(bad, spans.rows), share)


def _table(reasons, texts, removed: np.ndarray, share: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "reason": pa.array(reasons, pa.string()),
            "text": pa.array(texts, pa.string()),
            "removed_sentences": pa.array(removed, pa.uint32()),
            "removed_share": pa.array(share, pa.float32()),
        }
    )


def _classifier(path: str) -> linear.Linear:
    return linear.load(epath.Path(path).expanduser())


_BATCH = 1 << 19  # characters; the regular expressions are compiled anew for each
# A short sentence that is all of this is an invitation to read on.
_MORE = (
    r"(?i)^[\[(（【>»\s-]*(?:(?:read|see|view|show|load|learn|discover|find out) more"
    r"|continue reading|read (?:on|the (?:rest|full (?:story|article|post)))"
    r"|click here(?: (?:to|for) \w[\w ]*)?|(?:请?点击)?(?:这里|此处)?(?:阅读|查看|展开|浏览|了解)"
    r"(?:全文|原文|更多|详情|全部)(?:内容|信息|精彩|资讯|新闻)?|更多(?:详情|内容|精彩|资讯|新闻)"
    r"|未完待续)(?: here| now| about this)?[\s.…>»›→\])）】!！。]*$"
)
# Four items at least between | · » and the like.
_LINK = r"\pL[^|｜·»›•\[\]()]{0,28}\pL"
_BETWEEN_LINKS = "[|·»›•｜]"
_LINKS = rf"^{_LINK}(?:(?:\s[|·»›•]\s|\s?｜\s?){_LINK}){{3,}}$"
_URLS = r"^(?:\pL{0,10}[:：]?\s?https?://[!-~]+[\s,;、，；]*){3,}$"
_SHORT = 160  # visible characters, of what the patterns are asked of
_ITEM = re.compile(r"[,，;|｜]")
_WORD = re.compile(r"(?<!\d)[^\W\d_㐀-鿿]{2,}|(?=([㐀-鿿]{2}))")  # or any two Han in a row
_GRAMMAR = frozenset(language.WORDS["en"].split())

# What is counted of a sentence's characters, and where a line starts that is no prose.
_ORNAMENT, _LEADER, _EXCLAIMED, _SEPARATES, _MARKUP, _BAR, _STOP = (1 << i for i in range(7))
_SIGNS = {
    _LEADER: ".…·⋯",
    _EXCLAIMED: "!?！？",
    _SEPARATES: ",，;|｜",
    _MARKUP: "`$\\{}<=_",
    _BAR: "|",
    _STOP: ".!?。！？…；",
}
_NO_PROSE = "#+.:"  # headings, additions, reST's directives and fields; tables beside


@functools.cache
def _sign_table() -> np.ndarray:
    table = np.zeros(0x110000, np.uint8)
    table[[*range(0x25A0, 0x27C0), *range(0x1F300, 0x1FB00), ord("※")]] = _ORNAMENT
    table[ord("□")] = 0  # a character that is lost, in old texts
    for sign, listed in _SIGNS.items():
        table[characters(listed)] |= sign
    return table


def _count(signs: np.ndarray, spans: text.Spans, sign: int) -> np.ndarray:
    """Characters of a sign in each sentence, int64 [S]."""
    return np.add.reduceat((signs & sign) > 0, spans.starts, dtype=np.int64)


def _in_markup(
    joined: text.Joined, signs: np.ndarray, pieces: Pieces, found: lines.Lines
) -> np.ndarray:
    """bool [S]: the sentence has signs of markup or code, or its line or block is no prose."""
    starts, heads = pieces.spans.starts[found.opens], lines.heads(joined, found)
    indented = (pieces.starts[found.opens] - starts >= 4) | (joined.codes[starts] == ord("\t"))
    fences = lines.fences(heads)
    no_prose = fences | lines.inside(fences, found) | lines.tables(heads) | indented
    no_prose |= np.isin(heads[0], characters(_NO_PROSE))
    return no_prose[found.line] | (_count(signs, pieces.spans, _MARKUP) > 0)


def _low_quality(
    codes: np.ndarray,
    signs: np.ndarray,
    pieces: Pieces,
    free: np.ndarray,
    opens: np.ndarray,
    config: SentencesConfig,
) -> np.ndarray:
    """bool [S], of the sentences that are free to go."""
    spans, visible = pieces.spans, pieces.visible
    bad = np.zeros(len(visible), bool)
    for sign, least, share in (
        (_ORNAMENT, 8, config.max_ornaments),
        (_LEADER, 10, config.max_leaders),
        (_EXCLAIMED, 4, config.max_exclaimed),
    ):
        times = _count(signs, spans, sign)
        bad |= (times >= least) & (times > share * visible)

    short = np.flatnonzero(free & (visible <= _SHORT) & (spans.sizes > 0))
    found = strings(codes, pieces.starts[short], pieces.ends[short])
    more = np.zeros(len(visible), bool)
    more[short] = pc.match_substring_regex(found, _MORE)
    several = np.asarray(pc.count_substring(found, "://")) >= 3
    bad[short] |= _matching(found, _URLS, several)
    # In a document with the rule of a table (--- | ---), they may be its rows.
    rules = totals((spans.sizes == 0) & (_count(signs, spans, _BAR) > 0), spans.rows)
    loose = np.repeat(rules == 0, np.diff(spans.rows))[short]
    several = np.asarray(pc.count_substring_regex(found, _BETWEEN_LINKS)) >= 3
    bad[short] |= _matching(found, _LINKS, several & loose)
    bad |= more
    # What was broken off before it goes with it.
    last, before = (codes[np.maximum(pieces.ends - i, 0)] for i in (1, 2))
    broken = (last == ord("…")) | ((last == ord(".")) & (before == ord(".")))
    bad[:-1] |= more[1:] & broken[:-1] & ~opens[1:]

    lists = _count(signs, spans, _SEPARATES) >= config.min_keywords - 1
    lists &= _count(signs, spans, _STOP) == 0  # keywords end in no stop
    lists = np.flatnonzero(free & ~bad & lists)
    found = strings(codes, pieces.starts[lists], pieces.ends[lists])
    bad[lists] = [_keywords(string, config) for string in found.to_pylist()]
    return bad


def _matching(found: pa.StringArray, pattern: str, likely: np.ndarray) -> np.ndarray:
    """bool: which strings match, of those that may; to compile a pattern takes milliseconds."""
    matching = likely.copy()
    if likely.any():
        matching[likely] = pc.match_substring_regex(found.filter(pa.array(likely)), pattern)
    return matching


def _keywords(sentence: str, config: SentencesConfig) -> bool:
    """Whether a sentence is a list of short items, many of them with the same word in it."""
    items = [item for item in _ITEM.split(sentence.lower()) if item.strip()]
    found = [[match[1] or match[0] for match in _WORD.finditer(item)] for item in items]
    words = [word for item in found for word in item]
    width = len(sentence) + len(words) - sum(map(str.isascii, words))  # a Han counts double
    if len(items) < config.min_keywords or width > 20 * len(items) or "(" in sentence:
        return False
    grammar = sum(word in _GRAMMAR for word in words)
    grammar += sum(character in FUNCTION_CHARACTERS for character in sentence)
    times = collections.Counter(word for item in found for word in set(item))
    commonest = max(times.values(), default=0)
    return grammar <= 0.05 * len(words) and commonest > config.max_keyword_share * len(items)
