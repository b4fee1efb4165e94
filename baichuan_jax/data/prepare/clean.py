"""Heuristic filters (§2.1): documents that are no text worth reading, and lines that are no text.

A rule is a field of `CharacterRules`, `WordRules` or `CodeRules`: `min_x` and `max_x` bound the
feature x of a document. Languages without spaces are measured in characters (and Chinese verse
is short), those with in words, code in lines. The first rule that a document breaks gives the
reason. Lines left over from a page's frame (copyright, cookies, navigation) are cut out before,
and the rules look at the rest.

Shapes: C characters of all texts of a batch, N documents, L lines, K tokens.
"""

import dataclasses
import functools
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from baichuan_jax.data.prepare import boilerplate, language, text
from baichuan_jax.data.prepare import pieces as of
from baichuan_jax.data.prepare.pieces import Pieces, characters, strings, totals

UNSPACED = ("zh", "ja")


def _rule(limit: float, reason: str):
    return dataclasses.field(default=limit, metadata={"reason": reason})


@dataclasses.dataclass
class AllRules:
    """Every document. Shares are of its visible characters unless another whole is named."""

    max_cut: float = _rule(0.5, "boilerplate: most lines")  # of the content
    min_visible: int = _rule(1, "empty")
    max_garbled: float = _rule(0.03, "garbled")  # what a wrong encoding leaves
    max_digits: float = _rule(0.4, "symbols: mostly digits")


@dataclasses.dataclass
class CharacterRules:
    """Chinese and Japanese, in characters."""

    min_characters: int = _rule(16, "length: too short")  # no tune of verse has fewer
    max_symbols: float = _rule(0.35, "symbols: too many")
    max_blobs: float = _rule(0.5, "symbols: data")  # lines of base64 and the like
    max_duplicate_lines: float = _rule(0.5, "repetition: duplicate lines")  # of the content
    max_duplicate_ngrams: float = _rule(0.5, "repetition: n-grams")  # of runs of ten tokens
    max_top_ngram: float = _rule(0.4, "repetition: one phrase")  # of the tokens
    # Stops, and the commonest characters of modern and classical grammar, for each Han or kana.
    min_grammar: float = _rule(0.03, "words: no sentences")


@dataclasses.dataclass
class WordRules:
    """English and other languages whose commonest words we know, in words."""

    min_words: int = _rule(30, "length: too short")
    max_blobs: float = _rule(0.5, "symbols: data")
    min_word_length: float = _rule(2.5, "words: too short")  # mean
    max_word_length: float = _rule(14.0, "words: too long")
    max_symbols: float = _rule(0.35, "symbols: too many")
    max_bullets: float = _rule(0.95, "lines: bullets")  # of the lines
    max_ellipses: float = _rule(0.25, "lines: ellipses")  # of the lines: cut off by '...'
    max_listed: float = _rule(0.8, "lines: a list")  # of the lines: short, and end in no stop
    min_stop_words: float = _rule(0.07, "words: no sentences")  # of the tokens; English only
    max_duplicate_lines: float = _rule(0.5, "repetition: duplicate lines")
    max_duplicate_ngrams: float = _rule(0.4, "repetition: n-grams")
    max_top_ngram: float = _rule(0.2, "repetition: one phrase")
    max_placeholder: float = _rule(0.005, "boilerplate: lorem ipsum")  # of the tokens


@dataclasses.dataclass
class CodeRules:
    """Source code, in lines."""

    min_characters: int = _rule(20, "length: too short")
    max_longest_line: int = _rule(4_000, "code: long lines")
    max_mean_line: float = _rule(150.0, "code: long lines")
    min_letters: float = _rule(0.25, "code: few letters")
    max_blobs: float = _rule(0.3, "code: data")
    max_generated: bool = _rule(False, "code: generated")  # what its head says


@dataclasses.dataclass
class CleanConfig:
    """Limits of the heuristic filters, by kind of text."""

    all: AllRules = dataclasses.field(default_factory=AllRules)
    characters: CharacterRules = dataclasses.field(default_factory=CharacterRules)
    words: WordRules = dataclasses.field(default_factory=WordRules)
    code: CodeRules = dataclasses.field(default_factory=CodeRules)
    cut_lines: bool = True  # of boilerplate, in prose

    def check(self) -> None:
        """Raises a ValueError that names a limit that is no such thing.

        Counts and lengths are 0 or more; shares, those with a default below 1, in [0, 1].
        """
        for kind in ("all", "characters", "words", "code"):
            rules = getattr(self, kind)
            for field in dataclasses.fields(rules):
                value = getattr(rules, field.name)
                share = isinstance(field.default, float) and field.default < 1
                if not 0 <= value <= (1 if share else math.inf):
                    raise ValueError(
                        f"config.clean.{kind}.{field.name}={value} must be"
                        f" {'a share, in [0, 1]' if share else '0 or more'}."
                    )


_ENDS = ".!?:;,\"')。！？：；，、…”’）」』》"
_BULLETS = "*-+•●○■□▪‣◦·►–"
_CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_LARGE_BATCH = 1 << 21  # characters; the regular expressions are compiled anew for each
_SHORT_LINE = 30  # visible characters
# From where on it can be asked: for shares of lines, for grammar (Han, kana), for a top n-gram.
_ENOUGH_LINES, _ENOUGH_HAN, _ENOUGH_TOKENS = 5, 200, 50


def clean(documents: pa.Table, config: CleanConfig) -> pa.Table:
    """Drops documents and cuts lines by rules; a local stage.

    Args:
      documents: with `text` and `language` (as the stage `language` leaves it).

    Returns:
      One row a document: `reason` (or null), `text` (null: unchanged), `cut_lines` (uint32), and
      in float32 `symbol_share`, `garbled_share`, `duplicate_line_share`, `duplicate_ngram_share`:
      the features that the rules see.
    """
    texts = pc.fill_null(documents["text"], "").combine_chunks()
    languages = np.array(pc.fill_null(documents["language"], language.UNKNOWN).to_pylist(), object)
    results = []
    for large in list(text.batches(texts, _LARGE_BATCH)) or [slice(0, 0)]:
        of_batch = texts[large], languages[large]
        parts = list(text.batches(of_batch[0])) or [slice(0, 0)]
        batches = [_Batch.of(*(values[part] for values in of_batch)) for part in parts]
        cuts = _boilerplate(batches) if config.cut_lines else [None] * len(batches)
        generated = _generated(*of_batch)
        results += [
            _judge(batch, cut, generated[part], config)
            for batch, cut, part in zip(batches, cuts, parts, strict=True)
        ]
    return pa.concat_tables(results)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Texts, and what is in them."""

    languages: np.ndarray  # object [N]
    joined: text.Joined
    tokens: text.Tokens
    lines: Pieces

    @classmethod
    def of(cls, texts: pa.StringArray, languages: np.ndarray) -> "_Batch":
        joined = text.join(texts)
        tokens = text.tokens(joined)
        return cls(languages, joined, tokens, Pieces.of(joined, _lines(joined, tokens)))


def _lines(joined: text.Joined, tokens: text.Tokens) -> text.Spans:
    """The lines of `text.paragraphs`, but with hashes of the tokens that are there already."""
    starts, size = text.line_starts(joined), len(joined.codes)
    ends = np.append(starts[1:], size)[: len(starts)]
    first = np.searchsorted(tokens.starts, np.append(starts, size))

    def sums(values):
        running = np.append(np.zeros(1, values.dtype), np.cumsum(values, dtype=values.dtype))
        return running[first[1:]] - running[first[:-1]]

    # sum of hash · (1 + place in the line) modulo 2^64: other words, or another order, differ.
    places = np.arange(1, len(tokens.hashes) + 1, dtype=np.uint64)
    hashes = sums(tokens.hashes * places) - sums(tokens.hashes) * first[:-1].astype(np.uint64)
    sizes = sums(tokens.ends - tokens.starts)
    return text.Spans(starts, ends, hashes, sizes, np.searchsorted(starts, joined.starts))


def _boilerplate(batches: list[_Batch]) -> list[np.ndarray]:
    """Which lines are what is left of a page's frame, bool [L] for each batch."""
    cuts, short, found = [], [], []
    for batch in batches:
        lines = batch.lines
        prose = np.repeat(batch.languages != language.CODE, np.diff(lines.spans.rows))
        few = (lines.visible <= boilerplate.LONGEST_LINE) & (lines.spans.sizes > 0)
        short.append(np.flatnonzero(few & prose))
        chosen = lines.starts[short[-1]], lines.ends[short[-1]]
        found.append(strings(batch.joined.codes, *chosen))
        cuts.append(np.zeros(len(few), bool))
    matches = np.asarray(pc.match_substring_regex(pa.concat_arrays(found), boilerplate.LINE))
    bounds = np.cumsum([len(places) for places in short])[:-1]
    for cut, places, matched in zip(cuts, short, np.split(matches, bounds), strict=True):
        cut[places] = matched
    return cuts


def _generated(texts: pa.StringArray, languages: np.ndarray) -> np.ndarray:
    """Whether the head of a file of code says that a program wrote it, bool [N]."""
    generated = languages == language.CODE
    if generated.any():
        heads = pc.utf8_slice_codeunits(texts.filter(pa.array(generated)), 0, boilerplate.HEAD)
        generated[generated] = pc.match_substring_regex(heads, boilerplate.GENERATED)
    return generated


def _judge(
    batch: _Batch, cut: np.ndarray | None, generated: np.ndarray, config: CleanConfig
) -> pa.Table:
    joined, lines, languages = batch.joined, batch.lines, batch.languages
    cut = np.zeros(len(lines.visible), bool) if cut is None else cut
    features = _line_features(joined.codes, lines, cut) | _token_features(batch.tokens, languages)
    features["garbled"] += _misread(joined) / np.maximum(features["visible"], 1)
    features["generated"] = generated
    reasons = np.full(len(languages), None)
    for rules, where in (
        (config.all, np.ones(len(languages), bool)),
        (config.characters, np.isin(languages, UNSPACED)),
        (config.words, np.isin(languages, list(language.WORDS))),
        (config.code, languages == language.CODE),
    ):
        _apply(rules, features, where, reasons)
    edited = text.without(joined, lines.spans, cut) if cut.any() else [None] * len(languages)
    shares = ("symbols", "garbled", "duplicate_lines", "duplicate_ngrams")
    return pa.table(
        {
            "reason": pa.array(reasons, pa.string()),
            "text": pa.array(edited, pa.string()),
            "cut_lines": pa.array(totals(cut, lines.spans.rows), pa.uint32()),
            **{
                f"{name.removesuffix('s')}_share": pa.array(features[name], pa.float32())
                for name in shares
            },
        }
    )


def _apply(rules, features: dict[str, np.ndarray], where: np.ndarray, reasons: np.ndarray) -> None:
    """Writes the reasons of the documents that break a rule and have no reason so far."""
    for field in dataclasses.fields(rules):
        bound, name = field.name.split("_", 1)
        limit, feature = getattr(rules, field.name), features[name]
        broken = feature < limit if bound == "min" else feature > limit
        reasons[broken & where & np.equal(reasons, None)] = field.metadata["reason"]


def _line_features(codes: np.ndarray, lines: Pieces, cut: np.ndarray) -> dict[str, np.ndarray]:
    """Features of the lines that are not cut, float or int64 [N] each."""
    spans, rows = lines.spans, lines.spans.rows
    first, last, last_but_one = (
        codes[np.clip(place, 0, len(codes) - 1)] if len(codes) else place
        for place in (lines.starts, lines.ends - 1, lines.ends - 2)
    )
    classes = totals(lines.classes * ~cut[:, None], rows)
    visible = classes.sum(1) - classes[:, of.BLANK]
    content = totals(spans.sizes, rows)
    filled = ~cut & (spans.sizes > 0)
    num_lines = totals(filled, rows)
    plain = lines.classes[:, of.LETTER] + lines.classes[:, of.DIGIT]
    blobs = (lines.visible >= 60 * lines.words) & (lines.visible >= 60)
    blobs &= ~cut & (plain >= 0.85 * lines.visible)
    ellipsis = (last == ord("…")) | ((last == ord(".")) & (last_but_one == ord(".")))
    ended = np.isin(last, characters(_ENDS), kind="table")
    eastern = classes[:, of.HAN] + classes[:, of.FUNCTION]
    grammar = classes[:, of.FUNCTION] + classes[:, of.STOP]
    letters = classes[:, of.LETTER] + classes[:, of.OTHER_LETTER]
    words = totals(lines.words * ~cut, rows)

    def share(part, whole):
        return part / np.maximum(whole, 1)

    def of_lines(mask):
        return share(totals(mask & filled, rows), num_lines) * (num_lines >= _ENOUGH_LINES)

    return {
        "visible": visible,
        "cut": share(totals(spans.sizes * cut, rows), content),
        "garbled": share(classes[:, of.GARBLED], visible),
        "digits": share(classes[:, of.DIGIT], visible),
        "symbols": share(classes[:, of.SYMBOL], visible),
        "letters": share(letters, visible),
        "characters": letters + eastern + classes[:, of.DIGIT],
        "grammar": np.where(eastern < _ENOUGH_HAN, 1.0, share(grammar, eastern)),
        "words": words,
        "word_length": share(visible, words),
        "blobs": share(totals(lines.visible * blobs, rows), visible),
        "bullets": of_lines(np.isin(first, characters(_BULLETS), kind="table")),
        "ellipses": of_lines(ellipsis),
        "listed": of_lines((lines.visible < _SHORT_LINE) & ~ended),
        "duplicate_lines": share(totals(spans.sizes * (_repeated(spans) & ~cut), rows), content),
        "longest_line": np.maximum.reduceat(np.append(lines.visible, 0), rows[:-1])
        * (num_lines > 0),
        "mean_line": share(visible, num_lines),
    }


def _token_features(tokens: text.Tokens, languages: np.ndarray) -> dict[str, np.ndarray]:
    """Features of the tokens, float [N] each."""
    number = np.maximum(np.diff(tokens.rows), 1)
    repeats, _ = _ngrams(tokens, 10, np.full(len(number), 2))
    # A phrase that is said less often is not looked for, nor any in a text of few tokens.
    _, top = _ngrams(tokens, 3, np.maximum(4, number // 50))
    english, stop_words = languages == "en", number.copy()
    if english.any():
        column = list(language.WORDS).index("en")
        stop_words[english] = language.word_counts(tokens)[english, column]
    lorem, ipsum = _lorem_ipsum()
    placeholder = np.append((tokens.hashes[:-1] == lorem) & (tokens.hashes[1:] == ipsum), False)
    return {
        "duplicate_ngrams": repeats / np.maximum(number - 9, 1),
        "top_ngram": np.where(number < _ENOUGH_TOKENS, 0.0, 3 * top / number),
        "stop_words": stop_words / number,
        "placeholder": totals(placeholder[: len(tokens.hashes)], tokens.rows) / number,
    }


@functools.cache
def _lorem_ipsum() -> np.ndarray:
    return text.tokens(text.join(["lorem ipsum"])).hashes


def _repeated(spans: text.Spans) -> np.ndarray:
    """bool [L]: the same line was in the text before. Short ones (`}`, a heading) do not count."""
    row = np.repeat(np.arange(len(spans.rows) - 1, dtype=np.uint64), np.diff(spans.rows))
    long = np.flatnonzero(spans.sizes >= 8)
    keys = text.mix(spans.hashes[long] + text.mix(row[long]))
    order = np.argsort(keys, kind="stable")
    repeated = np.zeros(len(row), bool)
    repeated[long[order[1:][keys[order[1:]] == keys[order[:-1]]]]] = True
    return repeated


def _ngrams(tokens: text.Tokens, n: int, least: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of n tokens in each text that are there `least` times, int64 [N], or more.

    Returns:
      How many of them repeat one before; and the count of the commonest. Both int64 [N].
    """
    hashes, rows = text.ngrams(tokens, n)
    counts = np.diff(rows)
    number = np.arange(len(counts), dtype=np.uint64)
    # Most are there once. Counting by some bits of the hash leaves few of these to be sorted.
    bits = np.uint64(max(12, (4 * len(hashes)).bit_length()))
    place = ((hashes + np.repeat(text.mix(number), counts)) >> (np.uint64(64) - bits)).view(
        np.int64
    )
    together = np.bincount(place, minlength=1)[place]
    likely = np.flatnonzero(together >= np.repeat(np.maximum(least, 2), counts))
    # The number of the text, 24 bits, before 40 of the hash: sorted, equal ones are neighbours.
    keys = np.repeat(number << np.uint64(40), counts)[likely] | (hashes[likely] >> np.uint64(24))
    keys.sort()
    firsts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    times, of = np.diff(firsts, append=len(keys)), (keys[firsts] >> np.uint64(40)).view(np.int64)
    enough = times >= least[of]
    repeats = np.bincount(of[enough], times[enough] - 1, len(counts))
    commonest = np.zeros(len(counts), np.int64)
    np.maximum.at(commonest, of[enough], times[enough])
    return repeats, commonest


def _misread(joined: text.Joined) -> np.ndarray:
    """Characters of each text that are bytes of UTF-8 read as Latin-1, such as 'Ã©', int64 [N]."""
    codes = joined.codes
    leads = np.flatnonzero((codes >= 0xC2) & (codes <= 0xF4))
    lengths = 1 + (codes[leads] >= 0xE0) + (codes[leads] >= 0xF0)
    after = codes[np.minimum(leads[:, None] + [1, 2, 3], len(codes) - 1)]
    trails = np.isin(after, _TRAILS, kind="table")
    whole = (trails | (np.arange(1, 4) > lengths[:, None])).all(1)
    row = np.searchsorted(joined.starts, leads[whole], "right") - 1
    return np.bincount(row, 1 + lengths[whole], len(joined.starts) - 1)


_TRAILS = np.concatenate([np.arange(0x80, 0xC0, dtype=np.uint32), characters(_CP1252)])
