"""(seed, global index) -> rows of a batch, the same on any number of hosts.

A stream is a list of rows without a state: row i is found by computation, so the whole
position of a training run is one integer, the index of its next row. The batch of a step
is the rows from that index on; each host loads those that its own devices hold.

Shapes: B rows of a batch, T sequence length.
"""

import collections
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import grain
import jax
import numpy as np
from absl import logging

from baichuan_jax.config import DataConfig
from baichuan_jax.data import shards, sources


class Stream:
    """The rows of one split of a folder of shards, by index.

    'train' is endless: a set is shuffled anew each time it is repeated, and the sets are mixed
    by weight. A set's weight counts tokens: by default what the manifest says, or those it has,
    so that all are repeated equally often; `config.weights` may say otherwise, and 0 leaves a
    set out.

    'eval' is each held-out row of every set once. The sets take turns in proportion to their
    rows, so that the first rows stand for all. Rows past the end are empty, without targets.

    Attributes:
      num_rows: rows in one pass over the sets that take part.
      weights: of these sets, in tokens; empty for 'eval'.
    """

    def __init__(self, manifest: shards.Manifest, split: str, config: DataConfig):
        """Opens the sets.

        Raises:
          ValueError: the split has no row; a weight is malformed or names no set.
        """
        self._manifest, self._split, self._seed = manifest, split, config.seed
        parts = {name: sets[split] for name, sets in manifest.sets.items() if sets[split].rows}
        self.weights = {}
        if split == "train":
            given = manifest.weights | _parse_weights(config.weights, parts)
            self.weights = {name: given.get(name, part.tokens) for name, part in parts.items()}
            self.weights = {name: weight for name, weight in self.weights.items() if weight}
            parts = {name: parts[name] for name in self.weights}
        if not parts:
            raise ValueError(
                f"{manifest.directory} has no row to {split} with: see config.data.weights,"
                " config.data.eval_fraction and config.data.eval_sources."
            )
        self.num_rows = sum(part.rows for part in parts.values())
        self._order = None
        sets = [_open_set(manifest, name, split) for name in parts]
        if split == "train":
            shares = [self.weights[name] / part.tokens * part.rows for name, part in parts.items()]
            for name, share in zip(parts, shares, strict=True):
                share /= sum(shares)
                logging.info("%s is %.2f%% of the mix.", name, 100 * share)
            sets = [
                rows.shuffle(seed=_seed(config.seed, name)).repeat()
                for name, rows in zip(parts, sets, strict=True)
            ]
            rows = grain.MapDataset.mix(sets, shares)
        else:
            turns = [(np.arange(len(rows)) + 0.5) / len(rows) for rows in sets]
            self._order = np.argsort(np.concatenate(turns), kind="stable")
            rows = grain.MapDataset.concatenate(sets)
        self._rows = rows.map(shards.decode_row)

    def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows at these indices, in this order: B = len(indices).

        Returns:
          tokens_BT, targets_BT: int32, the row and the same shifted by one; 0 where empty.
          segments_BT: int32; 1, 2, 3, ... for the pieces of documents in a row, 0 where empty.
          positions_BT: int32; of a token in its piece, from 0.
          mask_BT: bool; the target belongs to the same piece as the token.
        """
        shape = (len(indices), self._manifest.sequence_length + 1)
        tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        for b, index in enumerate(indices):
            if self._order is not None:
                if index >= len(self._order):
                    continue
                index = self._order[index]
            row = self._rows[int(index)]
            lengths, size = row["lengths"], len(row["tokens"])
            tokens[b, :size] = row["tokens"]
            segments[b, :size] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
            positions[b, :size] = np.arange(size) - starts
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
        return {
            "tokens_BT": tokens[:, :-1],
            "targets_BT": tokens[:, 1:],
            "segments_BT": segments[:, :-1],
            "positions_BT": positions[:, :-1],
            "mask_BT": same,
        }

    def global_batch(
        self, start: int, batch_size: int, sharding: jax.sharding.Sharding
    ) -> dict[str, jax.Array]:
        """Rows start, ..., start + batch_size - 1 as global arrays [batch_size, T].

        A process loads the rows that its own devices hold, each once.
        """
        shape = (batch_size, self._manifest.sequence_length)
        held = sharding.addressable_devices_indices_map(shape).values()
        numbers = sorted({number for rows, _ in held for number in range(batch_size)[rows]})
        place = {number: i for i, number in enumerate(numbers)}
        local = self.rows([start + number for number in numbers])

        def build(array_BT: np.ndarray) -> jax.Array:
            def shard(index: tuple[slice, slice]) -> np.ndarray:
                mine = [place[number] for number in range(batch_size)[index[0]]]
                return array_BT[mine, index[1]]

            return jax.make_array_from_callback(shape, sharding, shard)

        return {name: build(array_BT) for name, array_BT in local.items()}

    def describe(self, batch_size: int) -> dict[str, Any]:
        """All that decides the batches; a checkpoint keeps it, see `difference`."""
        contents = {
            name: hashlib.blake2b(
                "".join(file.content for file in sets[self._split].files).encode(), digest_size=8
            ).hexdigest()
            for name, sets in self._manifest.sets.items()
        }
        return {
            "split": self._split,
            "tokenizer": self._manifest.inputs["tokenizer"],
            "sequence_length": self._manifest.sequence_length,
            "batch_size": batch_size,
            "seed": self._seed,
            "sets": contents,
            "weights": self.weights,
        }


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed between two results of `Stream.describe`, a line each; '' if nothing did."""
    old, new = _flatten(old), _flatten(new)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "\n".join(f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}" for key in keys)


def prefetch(
    stream: Stream,
    start: int,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    *,
    stop: int | None = None,
    ahead: int = 2,
) -> Iterator[dict[str, jax.Array]]:
    """Global batches from row `start` to row `stop` (None: without end).

    A background thread prepares the next `ahead` of them. Its errors are raised here, in
    place of the batch they belong to; closing the iterator ends the thread.
    """
    starts = itertools.takewhile(
        lambda index: stop is None or index < stop, itertools.count(start, batch_size)
    )
    with futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:

        def submit(count: int) -> list[futures.Future]:
            return [
                thread.submit(stream.global_batch, index, batch_size, sharding)
                for index in itertools.islice(starts, count)
            ]

        pending = collections.deque(submit(ahead))
        try:
            while pending:
                batch = pending.popleft().result()
                pending.extend(submit(1))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)


def _open_set(manifest: shards.Manifest, name: str, split: str) -> grain.MapDataset:
    paths = [os.fspath(path) for path in manifest.paths(name, split)]
    return grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths))


def _seed(seed: int, name: str) -> int:
    """Another seed for each set; Grain wants 32 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest())


def _parse_weights(texts: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    weights = {}
    for text in sources.split(texts):
        name, _, number = text.rpartition("=")
        if name not in known:
            raise ValueError(
                f"config.data.weights: {text!r} should be SET=WEIGHT with a set of"
                f" {', '.join(known)}."
            )
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not 0 <= weights[name] < math.inf:
            raise ValueError(f"config.data.weights: {text!r} needs a number of tokens, 0 or more.")
    return weights


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key} ")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
