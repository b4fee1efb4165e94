"""Paragraph- and sentence-wise deduplication over the whole corpus (§2.1).

A paragraph is a line. It goes when an earlier document has it, if it is long enough to be
prose: headings, lines of code and verse are too short. Of sentences a run goes,
`sentence_window` of them after each other that an earlier document has in the same order: to
cut every repeated sentence by itself would tear holes into texts. What is no prose, a table, a
formula or a fenced block of code, goes as a whole, together with what is before it, or not at
all (lines.py). Repetition inside a document is left alone; it is the heuristic filters' business.

What is left of a line stays, however short, but for what says nothing by itself: rules, and the
number of a list's item. A short rest goes only if an earlier document has it, too, in a line that
is repeated.

Both rules judge the documents as they come in. All that goes from a document stands in an
earlier one; were it cut there too, it would stand in one that is earlier still: so something
stays, however the rules cut. (What a document that is dropped as a whole had first goes with
it; that is at most what `max_loss` leaves.)

Spans are compared by 64-bit hashes of the letters and digits of their sentences; spacing,
punctuation and case do not count. Of the 7·10^10 sentences of 10^12 tokens about 130 pairs
share a hash by chance, which is harmless. Each worker judges a range of the hashes: hashes
move, texts do not, and texts without a repeated span are read once only.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from baichuan_jax.data.prepare import lines, text
from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.engine import Block, Engine, Key, as_json, of_json, partitions
from baichuan_jax.data.prepare.groups import by_key

REASON = "only repeated text"
SEEN = np.dtype([("hash", "<u8"), ("shard", "<u4"), ("row", "<u4")])
# A hash that `documents` have, one of them in this row; whether that is the first of them.
REPEATED = np.dtype([("hash", "<u8"), ("row", "<u4"), ("documents", "<u4"), ("first", "?")])

_FLUSH = 1 << 21  # spans held before they move on: 32 MB
_MULTIPLIER = np.uint64(0xC2B2AE3D27D4EB4F)  # xxHash's second prime of 64 bits
_WIDE = 0x2E80  # code points from here on take three bytes or more in UTF-8, and are mostly Han


@dataclasses.dataclass
class SpansConfig:
    """What counts as a repetition, and what of it is cut.

    Lengths in bytes are about those of UTF-8, spaces and ASCII punctuation left out, so that
    they mean as much text in Chinese as in English.
    """

    paragraphs: bool = True
    sentences: bool = True
    code: bool = False  # whether documents of the language 'code' take part
    min_characters: int = 12  # letters and digits of a paragraph that is compared at all
    paragraph_bytes: int = 100  # of a paragraph that may go
    sentence_window: int = 3  # sentences that are compared, and go, together
    window_bytes: int = 150  # of all of these
    max_loss: float = 0.7  # a document that would lose more of its letters and digits is dropped
    largest: int = 20  # paragraphs that the report shows

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong."""
        if self.sentence_window < 1:
            raise ValueError(
                f"config.spans.sentence_window={self.sentence_window} must be 1 or more."
            )
        for name in ("min_characters", "paragraph_bytes", "window_bytes", "largest"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"config.spans.{name}={value} must be 0 or more.")
        if not 0 <= self.max_loss <= 1:
            raise ValueError(f"config.spans.max_loss={self.max_loss} must be in [0, 1].")


def run(corpus: Corpus, stage: str, engine: Engine, config: SpansConfig) -> dict[str, Any]:
    """Cuts paragraphs and sentences that an earlier document, by its id, has.

    It writes `text` (where something was cut); `reason`; and `repeated_share` (float32; null
    where the document takes no part): of what is left of a document's letters and digits, the
    part in spans that stay in other documents, too, because they are too short to be cut.

    Args:
      corpus: the documents as this stage finds them.
      stage: whose attributes are written.
      engine: does the work.
      config: see there.

    Returns:
      For the report: characters in all, repeated, and cut; and the paragraphs that most
      documents have, with their number.
    """
    shards = corpus.num_shards()
    results = engine.run(
        stage,
        range(shards),
        functools.partial(_find, corpus, config, partitions(shards, 8)),
        functools.partial(_judge, shards),
        functools.partial(_write, corpus, stage, config),
    )
    found = [of_json(block) for _, block in results]
    largest = [example for part in found for example in part.pop("largest")]
    largest.sort(key=operator.itemgetter("documents"), reverse=True)
    totals = {name: sum(part[name] for part in found) for name in (found[0] if found else {})}
    return {**totals, "largest": largest[: config.largest]}


@dataclasses.dataclass(frozen=True)
class Units:
    """What is compared: paragraphs and windows of sentences, each a range of sentences.

    Shapes: S sentences, U units, paragraphs first.
    """

    lines: lines.Lines
    first: np.ndarray  # int64 [U], in the sentences
    last: np.ndarray  # int64 [U], exclusive
    hashes: np.ndarray  # uint64 [U]
    long: np.ndarray  # bool [U]: may be cut
    paragraphs: int  # how many of the units are paragraphs

    def covered(self, chosen: np.ndarray) -> np.ndarray:
        """bool [S]: the sentences inside any of the chosen units (bool [U])."""
        size = len(self.lines.row) + 1
        begin = np.bincount(self.first[chosen], minlength=size)
        end = np.bincount(self.last[chosen], minlength=size)
        return np.cumsum(begin - end)[:-1] > 0


def units(joined: text.Joined, config: SpansConfig) -> Units:
    """The paragraphs and windows of sentences of some texts that are long enough to count."""
    found = lines.lines(joined)
    sentences, row, line = found.sentences, found.row, found.line
    full = np.flatnonzero(sentences.sizes)  # the others are rules, fences, stray punctuation
    hashes, wide = sentences.hashes[full], np.append(0, np.cumsum(joined.codes >= _WIDE))
    in_bytes = (sentences.sizes + 2 * (wide[sentences.ends] - wide[sentences.starts]))[full]
    first, last, joint, long, paragraphs = [], [], [], [], 0
    if config.paragraphs and len(full):
        begin = np.flatnonzero(np.append(True, np.diff(line[full])))
        place = np.arange(len(full)) - np.repeat(begin, np.diff(begin, append=len(full)))
        powers = np.full(place.max() + 1, _MULTIPLIER)
        powers[0] = 1
        sums = np.add.reduceat(hashes * np.cumprod(powers)[place], begin)
        counted = np.add.reduceat(sentences.sizes[full], begin) >= config.min_characters
        paragraph = line[full[begin]][counted]
        first, last, joint = (
            [found.firsts[paragraph]],
            [found.firsts[paragraph + 1]],
            [sums[counted]],
        )
        long = [np.add.reduceat(in_bytes, begin)[counted] >= config.paragraph_bytes]
        paragraphs = len(paragraph)
    if config.sentences and len(full) >= config.sentence_window:
        windows = np.lib.stride_tricks.sliding_window_view
        size = config.sentence_window
        enough = windows(in_bytes, size).sum(1) >= config.window_bytes
        begin = np.flatnonzero(enough & (row[full[: len(enough)]] == row[full[size - 1 :]]))
        sums = np.zeros(len(begin), np.uint64)
        for place in reversed(range(size)):
            sums = sums * _MULTIPLIER + hashes[begin + place]
        first, last = [*first, full[begin]], [*last, full[begin + size - 1] + 1]
        joint, long = [*joint, sums], [*long, np.ones(len(begin), bool)]
    none = np.zeros(0, np.int64)
    return Units(
        lines=found,
        first=np.concatenate([none, *first]),
        last=np.concatenate([none, *last]),
        hashes=text.mix(np.concatenate([none.astype(np.uint64), *joint])),
        long=np.concatenate([none.astype(bool), *long]),
        paragraphs=paragraphs,
    )


def seen(hashes: np.ndarray, rows: np.ndarray, shard: int) -> np.ndarray:
    """uint64 [U] and uint32 [U] of a shard, in the order of the rows → SEEN, by hash."""
    order = np.argsort(hashes, kind="stable")
    hashes, rows = hashes[order], rows[order]
    new = np.ones(len(order), bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
    found = np.empty(np.count_nonzero(new), SEEN)
    found["hash"], found["shard"], found["row"] = hashes[new], shard, rows[new]
    return found


def repeated(found: np.ndarray, shards: int) -> list[np.ndarray]:
    """What each shard is to know of a range of hashes: SEEN, in any order → REPEATED a shard."""
    found = found[np.argsort(found["hash"], kind="stable")]
    hashes = found["hash"]
    starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)])
    sizes = np.diff(starts, append=len(found))
    found = found[np.repeat(sizes > 1, sizes)]
    sizes = sizes[sizes > 1]
    known = np.empty(len(found), REPEATED)
    known["hash"], known["row"] = found["hash"], found["row"]
    known["documents"] = np.repeat(sizes, sizes)
    if len(sizes):
        documents = found["shard"].astype(np.uint64) << np.uint64(32) | found["row"]
        first = np.minimum.reduceat(documents, np.cumsum(sizes) - sizes)
        known["first"] = documents == np.repeat(first, sizes)
    parts = dict(by_key(found["shard"], known))
    return [parts.get(shard, known[:0]) for shard in range(shards)]


@dataclasses.dataclass(frozen=True)
class Edited:
    """What `edit` makes of N texts."""

    texts: list[str | None]  # null: nothing is cut
    lost: np.ndarray  # float64 [N]: the share of letters and digits that is cut
    repeated: np.ndarray  # float32 [N]: of what is left, the share that other texts keep, too
    characters: np.ndarray  # int64 [2], of any kind: repeated, cut
    largest: list[dict[str, Any]]  # frequent paragraphs that are here first


def edit(
    joined: text.Joined, found: Units, known: np.ndarray, rows: np.ndarray, config: SpansConfig
) -> Edited:
    """Cuts from texts what earlier documents have.

    Args:
      joined: N texts, at least one.
      found: their units.
      known: REPEATED, by row: what is known of the shard.
      rows: uint32 [N], rising: the texts' rows in the shard.
      config: see there.
    """
    sentences, row = found.lines.sentences, found.lines.row
    first_row, last_row = np.searchsorted(known["row"], [rows[0], rows[-1] + 1])
    known = known[first_row:last_row]
    keys = _pair(known["hash"], known["row"])
    order = np.argsort(keys)
    known, keys = known[order], keys[order]
    pairs = _pair(found.hashes, rows[row[found.first]])
    place = np.minimum(np.searchsorted(keys, pairs), len(keys) - 1)
    several, first = keys[place] == pairs, known["first"][place]

    again = found.covered(several)
    drop, copied = found.covered(several & ~first & found.long), found.covered(several & ~first)
    drop = lines.rounded(drop, joined, found.lines, copied, config.min_characters)
    # What may be cut stays in one document, so where it stays it is no repetition any more.
    shared = found.covered(several & ~found.long) & ~found.covered(several & found.long) & ~drop
    left, repeated, cut = (
        np.bincount(row, sentences.sizes * chosen, len(rows)) for chosen in (~drop, shared, drop)
    )
    lengths = sentences.ends - sentences.starts
    here = np.flatnonzero((several & first & found.long)[: found.paragraphs])
    documents = known["documents"][place[here]].astype(np.int64)
    largest = []
    for n in np.argsort(-documents, kind="stable")[: config.largest]:
        start = sentences.starts[found.first[here[n]]]
        end = sentences.ends[found.last[here[n]] - 1]
        example = joined.codes[start:end].tobytes().decode("utf-32-le").strip()
        largest.append({"documents": int(documents[n]), "text": example[:200]})
    return Edited(
        texts=lines.cut(joined, found.lines, drop),
        lost=cut / np.maximum(left + cut, 1),
        repeated=(repeated / np.maximum(left, 1)).astype(np.float32),
        characters=np.array([lengths[again].sum(), lengths[drop].sum()]),
        largest=largest,
    )


def _pair(hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return hashes + text.mix(rows.astype(np.uint64) + np.uint64(1))


def _texts(corpus: Corpus, config: SpansConfig, shard: int) -> tuple[np.ndarray, pa.ChunkedArray]:
    """The rows that take part, uint32, and their texts."""
    table = corpus.read(shard, "text", "language")
    if not config.code:
        table = table.filter(pc.fill_null(pc.not_equal(table["language"], "code"), True))
    return np.asarray(table["row"]), table["text"]


def _find(
    corpus: Corpus, config: SpansConfig, ranges: int, shard: int
) -> Iterator[tuple[Key, Block]]:
    rows, texts = _texts(corpus, config, shard)
    limits = [(1 << 64) * number // ranges for number in range(1, ranges)]
    hashes, owners, held = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)], 0

    def parts() -> Iterator[tuple[Key, Block]]:
        found = seen(np.concatenate(hashes), np.concatenate(owners), shard)
        bounds = np.searchsorted(found["hash"], np.array(limits, np.uint64))
        for number, part in enumerate(np.split(found, bounds)):
            yield (number,), part

    for batch in text.batches(texts):
        found = units(text.join(texts[batch]), config)
        hashes.append(found.hashes)
        owners.append(rows[batch][found.lines.row[found.first]])
        held += len(found.hashes)
        if held >= _FLUSH:
            yield from parts()
            hashes, owners, held = hashes[:1], owners[:1], 0
    yield from parts()


def _judge(shards: int, key: Key, blocks: list[Block]) -> Iterator[tuple[Key, Block]]:
    for shard, known in enumerate(repeated(np.concatenate(blocks), shards)):
        yield (shard,), known  # empty ones too: each shard is to write its table


def _write(
    corpus: Corpus, stage: str, config: SpansConfig, key: Key, blocks: list[Block]
) -> Iterable[tuple[Key, Block]]:
    (shard,) = key
    known = np.concatenate(blocks)
    known = known[np.argsort(known["row"], kind="stable")]
    all_rows, all_texts = _texts(corpus, config, shard)
    shares = np.zeros(len(all_rows), np.float32)
    edited, reasons = np.full((2, len(all_rows)), None)
    characters, largest = np.zeros(2, np.int64), []
    touched = np.flatnonzero(np.isin(all_rows, known["row"]))
    texts = all_texts.take(pa.array(touched))
    for batch in text.batches(texts):
        places, joined = touched[batch], text.join(texts[batch])
        done = edit(joined, units(joined, config), known, all_rows[places], config)
        gone = done.lost > config.max_loss
        edited[places] = np.where(gone, None, np.array(done.texts, object))
        reasons[places] = np.where(gone, REASON, None)
        shares[places] = done.repeated
        characters += done.characters
        largest += done.largest
    attributes = {
        "text": pa.array(edited, pa.string()),
        "reason": pa.array(reasons, pa.string()),
        "repeated_share": shares,
    }
    corpus.write(stage, shard, all_rows, pa.table(attributes))
    largest.sort(key=operator.itemgetter("documents"), reverse=True)
    total = pc.sum(pc.utf8_length(all_texts)).as_py() or 0
    report = {"characters": total, "repeated": int(characters[0]), "cut": int(characters[1])}
    yield key, as_json({**report, "largest": largest[: config.largest]})
