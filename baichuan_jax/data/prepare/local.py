"""Stages that look at one document at a time: a function of a table, run on all shards."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.engine import Block, Engine, Key, as_json, of_json

Local = Callable[[pa.Table], pa.Table]  # documents -> their attributes, row by row
_BATCH_BYTES = 1 << 23  # of text given to a function at a time


def run(function: Local, corpus: Corpus, stage: str, engine: Engine) -> dict[str, int]:
    """Runs a function of documents (`text`, `source`, `language`) on all shards.

    Returns:
      The sums of its columns of unsigned integers, which count something.
    """
    call, totals = functools.partial(_shard, function, corpus, stage), collections.Counter()
    for _, block in engine.run(stage, range(corpus.num_shards()), call):
        totals.update(of_json(block))
    return dict(totals)


def _shard(function: Local, corpus: Corpus, stage: str, shard: int) -> Iterator[tuple[Key, Block]]:
    found = corpus.read(shard, "text", "source", "language").combine_chunks()
    places = pc.binary_length(found["text"]).to_numpy().cumsum(dtype=np.int64) // _BATCH_BYTES
    bounds = [0, *(1 + np.flatnonzero(np.diff(places))).tolist(), len(found)]
    parts = [function(found.slice(a, b - a)) for a, b in itertools.pairwise(bounds)]
    attributes = pa.concat_tables(parts)
    corpus.write(stage, shard, found["row"], attributes)
    counted = [f.name for f in attributes.schema if pa.types.is_unsigned_integer(f.type)]
    yield (shard,), as_json({name: pc.sum(attributes[name]).as_py() or 0 for name in counted})
