"""Scores -> how often each document is trained on in an epoch (§2.1: sampling by scores).

A document's weight is a product of factors, each of which may be switched off; what no stage has
written counts as 1:

    quality       by the tenth of its language that its score is in
    cluster size  text that many sites repeat is more often worth reading than text that nobody
                  does, up to a size beyond which it is boilerplate (as in FineWeb-2, whose
                  weights also rise for clusters of middle size and are 1 for the largest)
    uniqueness    the part of the document that others do not have

Weights are relative inside a set (a source in a language): they are scaled so that a set keeps
its bytes times `epochs`, and the scale takes into account that no document counts more than
`max_repeats` times. Systematic resampling turns a weight into a whole number of copies less than
1 away from it. How the sets are mixed, and which sources are raised because their values are
good (§4), is another matter: see `set_weights`.

Weights are rounded to powers of 2^(1/32). So a set's weights are a short histogram, which adds up
to the same over any division of the documents, and one look at the corpus is enough to scale them.
"""

import collections
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from baichuan_jax.data import sources
from baichuan_jax.data.packing import set_name
from baichuan_jax.data.prepare import quality
from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.engine import Block, Engine, Key, as_json, of_json

SCORES = ("quality", "quality_decile", "cluster_size", "copies", "repeated_share")
_STEPS = 32  # of weights, in an octave
_LEAST = 0.1  # of the factor for uniqueness: somebody has to keep what everybody repeats
_SHARDS = 256  # whose histograms of quality are added up at one time

Levels = dict[int, tuple[int, int]]  # of weights -> documents, bytes


@dataclasses.dataclass
class MixtureConfig:
    """Which documents and which sets are trained on more often than others."""

    quality: str = "0.5,0.6,0.7,0.8,0.9,1,1.2,1.4,1.7,2"  # tenths, the worst first; '': off
    # SIZE=FACTOR,… for clusters of that size and more; '': off
    cluster_size: str = "1=1,2=1.5,4=2,8=2.5,128=2,512=1.5,1024=1"
    uniqueness: float = 1.0  # the power of 1 - repeated_share; 0: off
    max_repeats: int = 4  # of a document in an epoch; a fifth time teaches little
    epochs: float = 1.0  # each set's expected bytes, as a multiple of those it has
    epoch: int = 0  # another number draws other documents
    alpha: float = 1.0  # a set's share of the mix goes with its tokens to this power
    source_weights: str = ""  # NAME=FACTOR,… of that share; a NAME is a source or a set

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong."""
        _tenths(self.quality)
        _table(self.cluster_size)
        _of_names(self.source_weights)
        if not 1 <= self.max_repeats <= 255:
            raise ValueError(
                f"config.mixture.max_repeats={self.max_repeats} must be between 1 and 255."
            )
        if not 0 < self.epochs <= self.max_repeats:
            raise ValueError(
                f"config.mixture.epochs={self.epochs} must be above 0 and at most"
                f" config.mixture.max_repeats={self.max_repeats}."
            )
        for name in ("uniqueness", "alpha"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"config.mixture.{name}={value} must be 0 or more.")


def run(
    corpus: Corpus, stage: str, engine: Engine, config: MixtureConfig, seed: int = 0
) -> dict[str, Any]:
    """Writes `weight` (float32) and `count` (uint8) of every document that is kept.

    Args:
      seed: with `config.epoch` and a set's name it decides the draw.

    Returns:
      'sets': by name, `documents`, `kept` (with a count of 1 or more), `repeated` (2 or more),
      `bytes` of UTF-8, `effective_bytes` (each document as often as it counts), `scale`;
      'counts': documents by count, from 0; 'weights': [[weight, documents], …], by octave
      halves.

    Raises:
      ValueError: a field of the config is wrong.
    """
    config.check()
    shards = range(corpus.num_shards())
    columns = available(corpus, SCORES)
    tenths = {}
    if config.quality and "quality" in columns and "quality_decile" not in columns:
        parts = engine.run("scores", shards, functools.partial(_scores, corpus), _add_scores)
        tenths = quality.total(_of_json(block) for _, block in parts)
    weigh = functools.partial(_weigh, corpus, columns, config, tenths)
    weighed = [
        of_json(block)
        for _, block in engine.run("weights", shards, functools.partial(_levels, weigh))
    ]
    totals: dict[str, Levels] = {}
    for of_shard in weighed:
        for name, levels in of_shard.items():
            total = totals.setdefault(name, {})
            for level, documents, size in levels:
                before = total.get(level, (0, 0))
                total[level] = (before[0] + documents, before[1] + size)
    scales = {name: _scale(levels, config) for name, levels in totals.items()}
    starts, below = [], {name: _offset(seed, config.epoch, name) for name in totals}
    for of_shard in weighed:
        starts.append({name: below[name] for name in of_shard})
        for name, levels in of_shard.items():
            level, documents, _ = np.array(levels).T
            weights = _final(level, scales[name], config)
            below[name] = below[name] + float(weights @ documents)
    draw = functools.partial(_draw, weigh, corpus, stage, config, scales)
    drawn = [of_json(block) for _, block in engine.run("counts", [*enumerate(starts)], draw)]
    return _told(totals, scales, drawn, config)


def available(corpus: Corpus, columns: Sequence[str]) -> list[str]:
    """Those of the columns that a stage of the corpus has written."""
    found = set()
    for stage in corpus.stages if corpus.num_shards() else ():
        with corpus.attribute_path(stage, 0).open("rb") as file:
            found |= set(pq.read_schema(file).names)
    return [name for name in columns if name in found]


def factors(scores: Mapping[str, np.ndarray], size: int, config: MixtureConfig) -> np.ndarray:
    """The weights of N documents before they are scaled, float64 [N].

    Args:
      scores: `quality_decile` (uint8), `cluster_size`, `copies`, `repeated_share` (numbers, NaN
        where unknown), each [N]; any may be missing.
      size: N.
    """
    weights = np.ones(size)
    if config.quality and "quality_decile" in scores:
        tenths = np.ones(256)  # also for `quality.UNSCORED`
        tenths[:10] = _tenths(config.quality)
        weights *= tenths[scores["quality_decile"]]
    if config.cluster_size and ("cluster_size" in scores or "copies" in scores):
        # Exact copies went before clusters were counted: those of this one are known.
        sizes = [_or_one(scores[name]) for name in ("cluster_size", "copies") if name in scores]
        sizes = np.sum(sizes, axis=0) - (len(sizes) - 1)
        bounds, values = _table(config.cluster_size)
        place = np.searchsorted(bounds, sizes, side="right") - 1
        weights *= np.where(place >= 0, values[place], 1.0)
    if config.uniqueness and "repeated_share" in scores:
        unique = 1 - np.nan_to_num(scores["repeated_share"])
        weights *= np.maximum(unique, _LEAST) ** config.uniqueness
    return weights


def scale(weights: np.ndarray, sizes: np.ndarray, total: float, most: float) -> float:
    """s such that the sum of min(s * weights, most) * sizes is `total`, at most most * sum(sizes).

    Args:
      weights, sizes: float [N], positive.
    """
    order = np.argsort(-weights, kind="stable")
    weights, sizes = weights[order].astype(float), sizes[order].astype(float)
    above = np.concatenate([[0.0], np.cumsum(sizes)[:-1]])  # if so many are at the limit
    rest = np.cumsum((weights * sizes)[::-1])[::-1]
    candidates = (total - most * above) / rest
    fits = np.flatnonzero(candidates * weights <= most * (1 + 1e-9))
    return float(candidates[fits[0]]) if len(fits) else most / float(weights[-1])


def counts(weights: np.ndarray, start: float) -> np.ndarray:
    """Systematic resampling: int64 [N], each less than 1 away from its weight.

    Args:
      weights: float64 [N], of neighbours in a set.
      start: a number between 0 and 1, drawn for the set, plus the weights of all before them.
    """
    edges = np.floor(start + np.concatenate([[0.0], np.cumsum(weights)]))
    return np.diff(edges).astype(np.int64)


def check_sources(config: MixtureConfig, known: Iterable[str]) -> None:
    """Raises a ValueError if `source_weights` names neither a source nor a set of one.

    Which sets a source has comes out late; the names of the sources are known before any work.
    """
    known, named = tuple(known), _of_names(config.source_weights)
    of_none = [n for n in named if not any(n == s or n.startswith(f"{s}.") for s in known)]
    _refuse(f"config.mixture.source_weights={config.source_weights}", of_none, known)


def set_weights(
    tokens: Mapping[str, int],
    source_of: Mapping[str, str],
    config: MixtureConfig,
    factors: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The sets' weights in the mix, in tokens: tokens ** alpha * factors, with the tokens' sum.

    Args:
      tokens: of each set, with repeats.
      source_of: the source of each set.
      factors: how many times more often sources of good values are seen; others have 1. See
        `safety.factors`.

    Raises:
      ValueError: `config.source_weights` names neither a set nor a source, or leaves nothing;
        `factors` names no source.
    """
    factors, given = factors or {}, _of_names(config.source_weights)
    known = {*tokens, *source_of.values()}
    _refuse(f"config.mixture.source_weights={config.source_weights}", set(given) - known, known)
    _refuse("config.safety.positive", set(factors) - set(source_of.values()), source_of.values())
    weights = {
        name: size**config.alpha
        * given.get(name, given.get(source_of[name], 1.0))
        * factors.get(source_of[name], 1.0)
        for name, size in tokens.items()
    }
    if not sum(weights.values()):
        raise ValueError(
            f"config.mixture.source_weights={config.source_weights} leaves nothing to train on."
        )
    ratio = sum(tokens.values()) / sum(weights.values())
    return {name: ratio * weight for name, weight in weights.items()}


def _scores(corpus: Corpus, shard: int) -> Iterator[tuple[Key, Block]]:
    table = corpus.read(shard, "quality", "language")
    found = quality.histograms(_numbers(table["quality"]), table["language"].to_pylist())
    yield (shard // _SHARDS,), as_json({name: row.tolist() for name, row in found.items()})


def _add_scores(key: Key, blocks: list[Block]) -> Iterator[tuple[Key, Block]]:
    total = quality.total(_of_json(block) for block in blocks)
    yield key, as_json({name: row.tolist() for name, row in total.items()})


def _of_json(block: Block) -> dict[str, np.ndarray]:
    return {name: np.array(row, np.int64) for name, row in of_json(block).items()}


def _weigh(
    corpus: Corpus,
    columns: Sequence[str],
    config: MixtureConfig,
    tenths: Mapping[str, np.ndarray],
    shard: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Of the documents of a shard: rows, levels of their weights, sizes, and rows by set."""
    table = corpus.read(shard, "text", "source", "language", *columns)
    scores = {name: _numbers(table[name]) for name in columns}
    if tenths:
        languages = table["language"].to_pylist()
        scores["quality_decile"] = quality.deciles(scores["quality"], languages, tenths)
    elif "quality_decile" in scores:
        known = np.where(np.isnan(scores["quality_decile"]), 255, scores["quality_decile"])
        scores["quality_decile"] = known.astype(np.uint8)
    weights = np.maximum(factors(scores, len(table), config), 2.0**-20)
    levels = np.rint(_STEPS * np.log2(weights)).astype(np.int64)
    sizes = pc.binary_length(table["text"]).to_numpy().astype(np.int64)
    return table["row"].to_numpy(), levels, sizes, rows_of_sets(table)


def rows_of_sets(table: pa.Table) -> dict[str, np.ndarray]:
    """The places of a table's documents by set, in the order of the sets' names."""
    pairs = pc.binary_join_element_wise(table["source"], table["language"], "\n")
    encoded = pc.dictionary_encode(pairs).combine_chunks()
    codes = encoded.indices.to_numpy()
    names = [set_name(*pair.split("\n")) for pair in encoded.dictionary.to_pylist()]
    return {name: np.flatnonzero(codes == names.index(name)) for name in sorted(names)}


def _levels(weigh: Any, shard: int) -> Iterator[tuple[Key, Block]]:
    _, levels, sizes, sets = weigh(shard)
    found = {}
    for name, rows in sets.items():
        values, places = np.unique(levels[rows], return_inverse=True)
        documents = np.bincount(places)
        bytes_ = np.bincount(places, sizes[rows]).astype(np.int64)
        found[name] = np.stack([values, documents, bytes_], axis=1).tolist()
    yield (shard,), as_json(found)


def _draw(
    weigh: Any,
    corpus: Corpus,
    stage: str,
    config: MixtureConfig,
    scales: Mapping[str, float],
    item: tuple[int, Mapping[str, float]],
) -> Iterator[tuple[Key, Block]]:
    shard, starts = item
    numbers, levels, sizes, sets = weigh(shard)
    weights, drawn = np.zeros(len(levels)), np.zeros(len(levels), np.int64)
    found = {}
    for name, rows in sets.items():
        weights[rows] = _final(levels[rows], scales[name], config)
        # Rounding of large sums could give one too many.
        drawn[rows] = np.minimum(counts(weights[rows], starts[name]), config.max_repeats)
        found[name] = [
            np.bincount(drawn[rows], minlength=config.max_repeats + 1).tolist(),
            int(drawn[rows] @ sizes[rows]),
        ]
    attributes = {"weight": weights.astype(np.float32), "count": drawn.astype(np.uint8)}
    corpus.write(stage, shard, numbers, pa.table(attributes))
    yield (shard,), as_json(found)


def _scale(levels: Levels, config: MixtureConfig) -> float:
    weights = _of_level(np.array(list(levels)))
    # A set of empty documents still has a weight for each.
    sizes = np.array([max(size, 1) for _, size in levels.values()])
    return scale(weights, sizes, config.epochs * sizes.sum(), config.max_repeats)


def _of_level(level: np.ndarray) -> np.ndarray:
    return 2.0 ** (level / _STEPS)


def _final(level: np.ndarray, scale: float, config: MixtureConfig) -> np.ndarray:
    return np.minimum(scale * _of_level(level), config.max_repeats)


def _offset(seed: int, epoch: int, name: str) -> float:
    key = f"{seed}/{epoch}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest()) / 2**48


def _told(
    totals: Mapping[str, Levels],
    scales: Mapping[str, float],
    drawn: list[dict],
    config: MixtureConfig,
) -> dict[str, Any]:
    sets, every = {}, np.zeros(config.max_repeats + 1, np.int64)
    octaves: collections.Counter[float] = collections.Counter()
    for name, levels in sorted(totals.items()):
        mine = [of_shard[name] for of_shard in drawn if name in of_shard]
        by_count = np.sum([counts for counts, _ in mine], axis=0)
        sets[name] = {
            "documents": int(by_count.sum()),
            "kept": int(by_count[1:].sum()),
            "repeated": int(by_count[2:].sum()),
            "bytes": sum(size for _, size in levels.values()),
            "effective_bytes": sum(size for _, size in mine),
            "scale": scales[name],
        }
        every += by_count
        for level, (documents, _) in levels.items():
            weight = float(_final(np.array(level), scales[name], config))
            octaves[2 ** (round(2 * math.log2(weight)) / 2)] += documents
    weights = [[weight, octaves[weight]] for weight in sorted(octaves)]
    return {"sets": sets, "counts": every.tolist(), "weights": weights}


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).to_numpy()  # nulls become NaN


def _or_one(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), 1.0, values)


def _tenths(string: str) -> list[float]:
    values = [_number(part) for part in sources.split(string)]
    if len(values) not in (0, 10) or not all(value > 0 for value in values):
        raise ValueError(
            f"config.mixture.quality={string} should be ten factors above 0, that of the worst"
            " tenth first, or nothing."
        )
    return values


def _table(string: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [part.partition("=") for part in sources.split(string)]
    bounds, values = ([_number(pair[end]) for pair in pairs] for end in (0, 2))
    if bounds != sorted(set(bounds)) or not all(value > 0 for value in (*bounds, *values)):
        raise ValueError(
            f"config.mixture.cluster_size={string} should be SIZE=FACTOR,… with sizes that rise"
            " and factors above 0."
        )
    return np.array(bounds), np.array(values)


def _of_names(string: str) -> dict[str, float]:
    pairs = [part.rpartition("=") for part in sources.split(string)]
    found = {name: _number(factor) for name, _, factor in pairs}
    if not all(name and value >= 0 for name, value in found.items()):
        raise ValueError(
            f"config.mixture.source_weights={string} should be NAME=FACTOR,… with factors of 0 or"
            " more."
        )
    return found


def _number(string: str) -> float:
    """NaN for what is no finite number; so no comparison with it holds."""
    try:
        value = float(string)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _refuse(field: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(unknown):
        raise ValueError(
            f"{field} names {', '.join(unknown)}; there are {', '.join(sorted(set(known)))}."
        )
