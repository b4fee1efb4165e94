"""One look at all attribute tables: how the scores are spread, and documents to show.

Texts are long, so this reads none of them but those that are shown, and edits are looked for in
some shards only. What is kept in memory is histograms and a few documents a reason.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

from baichuan_jax.data.prepare.corpus import OVERRIDES, Corpus, ids, row_of, shard_of
from baichuan_jax.data.prepare.groups import by_key
from baichuan_jax.data.prepare.text import mix

EXAMPLES = 10  # a reason, and a stage that edits
OTHER = "other"  # languages that are not told apart
_EDIT_SHARDS = 32  # in which edits are looked for
# A score's bin is the upper half of its float32: sign, exponent, 7 bits of the mantissa. Such
# bins need no range beforehand, and are at most 0.8% of a score wide.
_BINS = 1 << 16


@dataclasses.dataclass
class Scores:
    """The histogram of one score.

    Attributes:
      counts: int64 [groups + 1, bins]: documents by language, and at last those of all
        languages that the score's own stage dropped (which are counted with theirs too).
    """

    counts: np.ndarray

    def add(self, values: np.ndarray, groups: np.ndarray, dropped: np.ndarray) -> None:
        """Counts float32 [N] of int [N] languages, of which bool [N] are dropped."""
        finite = np.isfinite(values)
        bins, groups = _bins(values[finite]), groups[finite]
        languages = len(self.counts) - 1
        flat = np.bincount(groups * _BINS + bins, minlength=languages * _BINS)
        self.counts[:-1] += flat.reshape(languages, _BINS)
        self.counts[-1] += np.bincount(bins[dropped[finite]], minlength=_BINS)

    def quantile(self, share: float) -> float:
        """The score below which that share of all documents lies, to about 1%."""
        return float(_edges()[self._bin(share)])

    def histogram(self, outside: float, most: int) -> tuple[np.ndarray, np.ndarray]:
        """A histogram of up to `most` bars, without that share of the documents on each side.

        No bar is narrower than a bin, so that many documents of one score stand in one bar,
        or two.

        Returns:
          float64 [groups + 1, bars] documents, and the bars' edges.
        """
        first, last = self._bin(outside), self._bin(1 - outside)
        low, high = _edges()[first], _edges()[last + 1]
        widest = np.diff(_edges()[[first, first + 1, last, last + 1]])[::2].max()
        edges = np.linspace(low, high, 1 + max(1, min(most, int((high - low) / widest))))
        return self.between(edges), edges

    def between(self, edges: np.ndarray) -> np.ndarray:
        """float64 [groups + 1, len(edges) - 1]: documents between the edges."""
        below = np.cumsum(self.counts, axis=1)
        return np.diff([np.interp(edges, _edges()[1:], row) for row in below])

    def _bin(self, share: float) -> int:
        below = np.cumsum(self.counts[:-1].sum(axis=0))
        return int(np.searchsorted(below, max(share * below[-1], 1)))


@dataclasses.dataclass
class Survey:
    """What there is to show.

    Attributes:
      languages: what the groups of histograms are, `OTHER` at last.
      scores: by stage and column.
      dropped: ids of some documents by stage and reason, spread over the corpus by a hash.
      edited: ids of some kept documents that a stage changed the text of.
    """

    languages: list[str]
    scores: dict[tuple[str, str], Scores] = dataclasses.field(default_factory=dict)
    dropped: dict[tuple[str, str], list[int]] = dataclasses.field(default_factory=dict)
    edited: dict[str, list[int]] = dataclasses.field(default_factory=dict)


def survey(corpus: Corpus, languages: Sequence[str], seed: int = 0) -> Survey:
    """Reads the attributes of all stages once, shard by shard.

    Args:
      corpus: with all stages that are to be looked at.
      languages: those to tell apart in histograms.
      seed: which documents are shown depends on it, and on their ids.
    """
    found = Survey([*languages, OTHER])
    shards = np.arange(corpus.num_shards())
    searched = shards[np.argsort(_order(shards, seed))[:_EDIT_SHARDS]]
    for shard in shards.tolist():
        skipped = () if shard in searched else ("text",)
        tables = {
            stage: _read(corpus.attribute_path(stage, shard), skipped) for stage in corpus.stages
        }
        groups = _groups(corpus, shard, tables, languages)
        every = ids(shard, np.arange(len(groups)))
        order = _order(every, seed)
        for stage, table in tables.items():
            dropped = _is_valid(table, "reason")
            if dropped.any():
                reasons = table["reason"].combine_chunks()
                for reason in pc.unique(reasons.drop_null()).to_pylist():
                    rows = np.flatnonzero(pc.equal(reasons, reason).fill_null(False))
                    _choose(found.dropped, (stage, reason), every[rows], order[rows], seed)
            if (edited := np.flatnonzero(_is_valid(table, "text") & ~dropped)).size:
                _choose(found.edited, stage, every[edited], order[edited], seed)
            for name in table.column_names:
                there = _is_valid(table, name)
                if pa.types.is_floating(table.schema.field(name).type) and there.any():
                    values = table[name].drop_null().to_numpy().astype(np.float32)
                    empty = np.zeros((len(found.languages) + 1, _BINS), np.int64)
                    scores = found.scores.setdefault((stage, name), Scores(empty))
                    scores.add(values, groups[there], dropped[there])
    return found


def documents(corpus: Corpus, wanted: Sequence[int]) -> dict[int, dict[str, str]]:
    """Some documents by their ids: text, source and origin, after the corpus's stages.

    Documents that are dropped are found as well, with the text they had when they were.
    """
    found: dict[int, dict[str, str]] = {}
    wanted = np.unique(np.array(wanted, np.uint64))
    for shard, here in by_key(shard_of(wanted), wanted):
        rows = row_of(here).astype(np.int64)
        table = _take(corpus.document_path(shard), rows, ("text", "source", "origin"))
        texts = table["text"]
        for stage in corpus.stages:
            changed = _take(corpus.attribute_path(stage, shard), rows, ("text",))
            if changed.num_columns:
                texts = pc.coalesce(changed["text"], texts)
        table = table.set_column(0, "text", texts)
        found |= dict(zip(here.tolist(), table.to_pylist(), strict=True))
    return found


def _order(numbers: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [N]: hashes, whose order spreads what is chosen over the corpus."""
    return mix(numbers.astype(np.uint64) + mix(np.array([seed + 1], np.uint64)))


def _choose(chosen: dict, key, candidates: np.ndarray, order: np.ndarray, seed: int) -> None:
    """Keeps those that come first among the candidates and what has been chosen before."""
    if len(candidates) > EXAMPLES:
        candidates = candidates[np.argpartition(order, EXAMPLES)[:EXAMPLES]]
    both = np.array([*chosen.get(key, []), *candidates.tolist()], np.uint64)
    chosen[key] = both[np.argsort(_order(both, seed))[:EXAMPLES]].tolist()


def _groups(
    corpus: Corpus, shard: int, tables: dict[str, pa.Table], languages: Sequence[str]
) -> np.ndarray:
    """int64 [rows]: the place of each document's last known language among `languages`."""
    with corpus.document_path(shard).open("rb") as file:
        language = pq.read_table(file, columns=["language"])["language"]
    for table in tables.values():
        if "language" in table.column_names:
            language = pc.coalesce(table["language"], language)
    places = pc.index_in(language, value_set=pa.array(languages, pa.string()))
    return places.fill_null(len(languages)).to_numpy().astype(np.int64)


def _read(path: epath.Path, skipped: Sequence[str]) -> pa.Table:
    """The columns that are looked at: scores, and what changes a document."""
    with path.open("rb") as file, pq.ParquetFile(file) as parquet:
        names = [
            field.name
            for field in parquet.schema_arrow
            if field.name in ("reason", *OVERRIDES) or pa.types.is_floating(field.type)
        ]
        return parquet.read([name for name in names if name not in skipped])


def _is_valid(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.zeros(len(table), bool)
    return pc.is_valid(table[name]).to_numpy()


def _take(path: epath.Path, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Sorted rows of a file, of which only the row groups that have any are read."""
    with path.open("rb") as file, pq.ParquetFile(file) as parquet:
        names = [name for name in columns if name in parquet.schema_arrow.names]
        return pa.concat_tables(_groups_of(parquet, rows, names))


def _groups_of(parquet: pq.ParquetFile, rows: np.ndarray, names: list[str]) -> Iterator[pa.Table]:
    start = 0
    for number in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(number).num_rows
        inside = rows[(rows >= start) & (rows < start + size)] - start
        if len(inside):
            yield parquet.read_row_group(number, names).take(pa.array(inside))
        start += size


def _bins(values: np.ndarray) -> np.ndarray:
    """int64 [N]: the bins of float32 [N]; the order of bins is the order of values."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> 16).astype(np.int64)


@functools.cache
def _edges() -> np.ndarray:
    """float64 [bins + 1]: bin n holds the values from edge n up to edge n + 1."""
    ordered = np.minimum(np.arange(_BINS + 1) << 16, 0xFFFFFFFF)
    bits = np.where(ordered >> 31, ordered & 0x7FFFFFFF, ~ordered & 0xFFFFFFFF)
    with np.errstate(invalid="ignore"):  # the bins of NaN
        edges = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    largest = float(np.finfo(np.float32).max)
    below, above = np.flatnonzero(np.isfinite(edges))[[0, -1]]
    edges[:below], edges[above + 1 :] = -largest, largest
    return edges
