"""Dense embeddings of documents (§2.1), without a model.

A document is the set of its tokens and pairs of tokens, each weighted by tf-idf:
(1 + log of how often) × log of (documents / documents that have it). A random projection that
keeps angles makes a few hundred numbers of it. It is sparse: a feature adds ±its weight to one
number in each of four blocks, and its hash says to which and with what sign. So there is no
matrix to store, and the spread of a cosine around the true one is that of a dense projection,
about 1 / sqrt(dimensions).

The embeddings of a stage stand in the corpus's folder as float16, a file for each shard:

    DIRECTORY/embeddings/STAGE/00000.npy    [documents that earlier stages kept, D]

`pooled.py` makes them by a trained model. Legend: N texts, F features, D dimensions.
"""

import functools
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from etils import epath

from baichuan_jax.data.prepare import text
from baichuan_jax.data.prepare.corpus import Corpus, whole
from baichuan_jax.data.prepare.engine import Block, Engine, Key, from_bytes, to_bytes

BUCKETS = 1 << 18  # of the counts of documents; rare features share one
_BLOCKS = 4  # of the numbers of an embedding; a feature adds to one in each
_FEATURE_BITS = 44  # of a feature's hash
_COUNT_PARTS = 16  # workers that may add up the counts
_TEXTS = 1 << 10  # embedded at one time, so that their sums stay in cache


def features(joined: text.Joined) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different tokens and pairs of tokens of each of at most 2^20 texts.

    Returns:
      The text [F], int64; the feature [F], a hash of 44 bits in uint64; how often the text has
      it [F], int64.
    """
    singles = text.tokens(joined)
    pairs, ends = text.ngrams(singles, 2)
    texts = np.arange(len(ends) - 1, dtype=np.uint64) << np.uint64(_FEATURE_BITS)
    keys = np.concatenate([singles.hashes, pairs]) >> np.uint64(64 - _FEATURE_BITS)
    keys |= np.concatenate([np.repeat(texts, np.diff(rows)) for rows in (singles.rows, ends)])
    counted = pa.array(keys).value_counts()  # by a hash table: faster than a sort
    keys, counts = (counted.field(number).to_numpy() for number in range(2))
    low = np.uint64((1 << _FEATURE_BITS) - 1)
    return (keys >> np.uint64(_FEATURE_BITS)).astype(np.int64), keys & low, counts


def document_counts(texts: pa.StringArray | pa.ChunkedArray) -> np.ndarray:
    """How many texts have a feature of each bucket: uint32 [BUCKETS].

    A text with two features of a bucket counts twice.
    """
    counts = np.zeros(BUCKETS, np.uint32)
    for part in _parts(texts):
        _, hashes, _ = features(text.join(texts[part]))
        counts += np.bincount(_bucket(hashes), minlength=BUCKETS).astype(np.uint32)
    return counts


def inverse_frequencies(counts: np.ndarray, documents: int) -> np.ndarray:
    """The weight of each bucket's features: log((1 + documents) / (1 + counts)), float32 ≥ 0."""
    shares = (1 + documents) / (1 + np.minimum(counts, documents).astype(np.float64))
    return np.log(shares).astype(np.float32)


def embed(
    texts: pa.StringArray | pa.ChunkedArray,
    inverse: np.ndarray,
    dimensions: int = 256,
    seed: int = 0,
) -> np.ndarray:
    """Embeds texts, each by itself: what else is in the batch changes nothing.

    Args:
      inverse: of `inverse_frequencies`.
      dimensions: D, a power of two, at least 8.
      seed: of the projection.

    Returns:
      Rows of length one, float16 [N, D]; zeros for a text without a token.

    Raises:
      ValueError: `dimensions` is no such number.
    """
    check_dimensions(dimensions)
    width = dimensions // _BLOCKS
    bits = width.bit_length()  # a place in a block, and a sign
    salt = np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))
    embeddings = np.zeros((len(texts), dimensions), np.float16)
    for part in _parts(texts):
        rows, hashes, counts = features(text.join(texts[part]))
        weights = (1 + np.log(counts)) * inverse[_bucket(hashes)]
        drawn = text.mix(hashes + salt)
        sums = np.zeros((part.stop - part.start) * dimensions)
        for block in range(_BLOCKS):
            places = rows * dimensions + block * width + (drawn & np.uint64(width - 1)).astype(int)
            signed = np.where(drawn & np.uint64(width), weights, -weights)
            sums += np.bincount(places, signed, minlength=len(sums))
            drawn >>= np.uint64(bits)
        sums = sums.reshape(-1, dimensions)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        embeddings[part] = sums / np.where(lengths > 0, lengths, 1)
    return embeddings


def check_dimensions(dimensions: int, field: str = "dimensions") -> None:
    """Raises ValueError: texts cannot be embedded in so many numbers."""
    if dimensions < 2 * _BLOCKS or dimensions & (dimensions - 1):
        raise ValueError(f"{field}={dimensions} must be a power of two, at least {2 * _BLOCKS}.")


def path(corpus: Corpus, stage: str, name: str) -> epath.Path:
    """A file beside the embeddings of a stage."""
    return epath.Path(corpus.directory) / "embeddings" / stage / f"{name}.npy"


def save(corpus: Corpus, stage: str, name: str, array: np.ndarray) -> None:
    """Writes an array beside the embeddings, whole or not at all."""
    with whole(path(corpus, stage, name)) as partial:
        partial.write_bytes(to_bytes(array))


def load(corpus: Corpus, stage: str, name: str) -> np.ndarray:
    return from_bytes(path(corpus, stage, name).read_bytes())


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


def run(
    corpus: Corpus,
    stage: str,
    engine: Engine,
    dimensions: int = 256,
    frequency_documents: int = 1 << 18,
    seed: int = 0,
) -> None:
    """Writes the embeddings of all documents that are kept.

    Args:
      frequency_documents: in how many documents a feature stands is counted in about so many.

    Raises:
      ValueError: as `embed`.
    """
    shards = range(corpus.num_shards())
    rows = sum(corpus.num_rows(shard) for shard in shards)
    count = functools.partial(_count, corpus, max(1, rows // frequency_documents))
    *counts, documents = (block for _, block in engine.run("frequencies", shards, count, _add))
    inverse = inverse_frequencies(np.concatenate(counts), documents.item())
    save(corpus, stage, "inverse_frequencies", inverse)
    engine.run("embeddings", shards, functools.partial(_embed, corpus, stage, dimensions, seed))


def _parts(texts: pa.StringArray | pa.ChunkedArray) -> Iterator[slice]:
    for part in text.batches(texts):
        for start in range(part.start, part.stop, _TEXTS):
            yield slice(start, min(start + _TEXTS, part.stop))


def _bucket(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(_FEATURE_BITS - BUCKETS.bit_length() + 1)).astype(np.int64)


def _count(corpus: Corpus, stride: int, shard: int) -> Iterable[tuple[Key, Block]]:
    texts = corpus.read(shard, "text")["text"]
    texts = texts.take(np.arange(0, len(texts), stride))
    counts = document_counts(texts).astype(np.uint64)
    for number, part in enumerate(np.split(counts, _COUNT_PARTS)):
        yield (number,), part
    yield (_COUNT_PARTS,), np.array([len(texts)], np.uint64)


def _add(key: Key, blocks: list[Block]) -> Iterable[tuple[Key, Block]]:
    yield key, np.sum(blocks, axis=0)


def _embed(
    corpus: Corpus, stage: str, dimensions: int, seed: int, shard: int
) -> Iterable[tuple[Key, Block]]:
    texts = corpus.read(shard, "text")["text"]
    inverse = load(corpus, stage, "inverse_frequencies")
    save(corpus, stage, shard_name(shard), embed(texts, inverse, dimensions, seed))
    return ()
