"""MinHash: how much two texts share, from 160 bytes of each (§2.1).

The similarity of two texts is the Jaccard similarity of their sets of shingles, five tokens
after each other. A permutation of all shingles puts the same one first in both texts with just
that probability, so the share of 160 permutations in which the first ones agree estimates it,
to a standard deviation of 0.04 at most.

20 bands of 8 permutations make the candidates: two texts meet if all 8 first shingles of a
band agree, which at a similarity of 0.8 happens in some band with probability 0.976, at 0.5 with
0.075. A byte of each first shingle is kept to check the candidates.

Shapes: N texts, M shingles, E pairs of texts.
"""

import dataclasses

import numpy as np
import pyarrow as pa

from baichuan_jax.data.prepare import text

SHINGLE = 5  # tokens
BANDS, ROWS = 20, 8
PERMUTATIONS = BANDS * ROWS

# The kernel's block: small enough for the second-level cache, large enough that NumPy's cost of
# a call does not show.
_BLOCK_MULTIPLIERS, _BLOCK_SHINGLES = 16, 8192
_LAST = np.iinfo(np.uint32).max
_PAIRS = 1 << 14  # signatures compared at a time
_LEADERS = 1 << 6  # texts that stand for others, found at a time
_COLUMNS = 1 << 13  # signatures in columns, compared at a time: 1.3 MB


def _odd(count: int, seed: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    numbers = text.mix(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(seed))
    return (numbers >> np.uint64(64 - 8 * dtype().itemsize)).astype(dtype) | dtype(1)


_MULTIPLIERS = _odd(PERMUTATIONS // 2, 0x9E3779B97F4A7C15, np.uint32)
_KEY_MULTIPLIERS = _odd(ROWS, 0xC2B2AE3D27D4EB4F, np.uint64)
_BYTE_MULTIPLIER = np.uint32(0x9E3779B1)


@dataclasses.dataclass(frozen=True)
class Sketches:
    """What is kept of texts to find and check their near-duplicates."""

    signatures: np.ndarray  # uint8 [N, PERMUTATIONS]
    keys: np.ndarray  # uint64 [N, BANDS]
    characters: np.ndarray  # int64 [N], of the text
    empty: np.ndarray  # bool [N]: without any token; its signature and keys mean nothing


def sketch(texts: pa.StringArray | pa.ChunkedArray, simplify: bool = False) -> Sketches:
    """The sketches of N texts, made in batches that stay in the processor's cache.

    Args:
      texts: N texts; a null counts as empty.
      simplify: Whether traditional Chinese counts as the same as simplified.
    """
    batches = list(text.batches(texts)) or [slice(0, 0)]
    parts = [_sketch(texts[rows], simplify) for rows in batches]
    return Sketches(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def minima(hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first shingle of each text under each permutation.

    The permutations of the numbers below 2^32 are multiplications by an odd number modulo 2^32,
    and the same in reverse: the last is the first then, which saves half the multiplications
    (Min-Max Hash, Ji et al., ICDM 2013). As the shingles are hashes already, adding a number
    after the multiplication would not bring the estimate closer to the similarity.

    Args:
      hashes: uint64 [M], of the shingles.
      rows: int64 [N + 1]; those of text n are hashes[rows[n] : rows[n + 1]].

    Returns:
      uint32 [PERMUTATIONS, N]; 2^32 - 1 for a text without shingles.
    """
    shingles = (hashes >> np.uint64(32)).astype(np.uint32)
    filled = np.flatnonzero(np.diff(rows))  # `reduceat` knows no empty range
    firsts = rows[filled]
    half = len(_MULTIPLIERS)
    least = np.full((half, len(filled)), _LAST, np.uint32)
    most = np.zeros_like(least)
    buffer = np.empty((_BLOCK_MULTIPLIERS, _BLOCK_SHINGLES), np.uint32)
    for start in range(0, len(shingles), _BLOCK_SHINGLES):
        block = shingles[start : start + _BLOCK_SHINGLES]
        permuted = buffer[:, : len(block)]
        first = np.searchsorted(firsts, start, "right") - 1
        here = slice(first, np.searchsorted(firsts, start + len(block)))
        cuts = np.maximum(firsts[here] - start, 0)
        for number in range(0, half, _BLOCK_MULTIPLIERS):
            some = slice(number, number + _BLOCK_MULTIPLIERS)
            np.multiply(block, _MULTIPLIERS[some, None], out=permuted)
            for found, merge in ((least, np.minimum), (most, np.maximum)):
                here_found = found[some, here]
                merge(here_found, merge.reduceat(permuted, cuts, axis=1), out=here_found)
    minima = np.full((PERMUTATIONS, len(rows) - 1), _LAST, np.uint32)
    minima[:half, filled], minima[half:, filled] = least, ~most
    return minima


def band_keys(minima: np.ndarray) -> np.ndarray:
    """Hashes of each band's minima: uint32 [PERMUTATIONS, N] → uint64 [N, BANDS]."""
    keys = np.zeros((BANDS, minima.shape[1]), np.uint64)
    bands = minima.reshape(BANDS, ROWS, -1)
    for row, multiplier in enumerate(_KEY_MULTIPLIERS):
        keys += bands[:, row] * multiplier
    return text.mix(keys.T)


def signatures(minima: np.ndarray) -> np.ndarray:
    """A byte of each minimum: uint32 [PERMUTATIONS, N] → uint8 [N, PERMUTATIONS].

    It is a byte of a hash: a minimum's own high bits are mostly zero, and its low ones do not
    depend on the shingle's high ones.
    """
    return ((minima * _BYTE_MULTIPLIER) >> np.uint32(24)).astype(np.uint8).T


def similarity(first: np.ndarray, i: np.ndarray, second: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Estimates the Jaccard similarity of E pairs, first[i] with second[j].

    Different shingles have the same byte in one case of 256; the estimate takes these off.

    Args:
      first, second: uint8 […, PERMUTATIONS], signatures.
      i, j: int64 [E].

    Returns:
      float64 [E]; below 0 at times, 1 for texts with the same shingles.
    """
    equal = np.empty(len(i), np.int64)
    for start in range(0, len(i), _PAIRS):
        pairs = slice(start, start + _PAIRS)
        equal[pairs] = np.count_nonzero(first[i[pairs]] == second[j[pairs]], axis=1)
    return _estimate(equal)


def matches_of(similarity: float) -> int:
    """The least number of equal bytes whose estimate reaches a similarity of at most 1."""
    return int(np.argmax(_estimate(np.arange(PERMUTATIONS + 1)) >= similarity))


def matches(columns: np.ndarray, one: np.ndarray) -> np.ndarray:
    """How many bytes of signatures, uint8 [PERMUTATIONS, N], are those of one: uint8 [N]."""
    equal = columns == one[:, None]
    return np.add.reduce(equal.view(np.uint8), axis=0, dtype=np.uint8)


def first_match(columns: np.ndarray, ones: np.ndarray, least: int) -> np.ndarray:
    """The first of some signatures that has so many bytes of each of N others.

    Args:
      columns, ones: uint8 [PERMUTATIONS, N] and [PERMUTATIONS, K].
      least: equal bytes that are enough.

    Returns:
      Its place among `ones`, int64 [N]; -1 where none has.
    """
    found = np.full(columns.shape[1], -1)
    for start in range(0, columns.shape[1], _COLUMNS):
        block = np.ascontiguousarray(columns[:, start : start + _COLUMNS])
        here = found[start : start + _COLUMNS]
        for place, one in enumerate(ones.T):
            here[(matches(block, one) >= least) & (here < 0)] = place
    return found


def leaders(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Who stands for whom: each text that none stands for, in turn, for all later ones like it.

    Some of these are found at a time, and compared with all others while those lie in the cache.

    Args:
      signatures: uint8 [N, PERMUTATIONS].
      threshold: estimated similarity that is like.

    Returns:
      The place of the text that stands for each, its own maybe: int64 [N].
    """
    leaders = np.arange(len(signatures))
    columns, left = np.ascontiguousarray(signatures.T), leaders.copy()
    least = matches_of(threshold)
    while len(left):
        some = columns[:, :_LEADERS]
        like = np.array([matches(some, one) for one in some.T]) >= least
        found, free = [], np.ones(some.shape[1], bool)
        for place in range(some.shape[1]):
            if free[place]:
                leaders[left[:_LEADERS][free & like[place]]] = left[place]
                free &= ~like[place]
                found.append(place)
        others = columns[:, _LEADERS:]
        led_by = first_match(others, columns[:, found], least)
        led = led_by >= 0
        left, others_left = left[found], left[_LEADERS:]
        leaders[others_left[led]] = left[led_by[led]]
        left, columns = others_left[~led], np.ascontiguousarray(others[:, ~led])
    return leaders


def _estimate(equal: np.ndarray) -> np.ndarray:
    return (equal / PERMUTATIONS - 1 / 256) / (1 - 1 / 256)


def _sketch(texts: pa.StringArray | pa.ChunkedArray, simplify: bool) -> tuple[np.ndarray, ...]:
    joined = text.join(texts)
    hashes, rows = text.ngrams(text.tokens(joined, simplify), SHINGLE)
    least = minima(hashes, rows)
    return signatures(least), band_keys(least), np.diff(joined.starts), np.diff(rows) == 0
