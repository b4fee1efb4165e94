"""What is left of a corpus after a stage, and what the stage dropped."""

import collections
import functools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.engine import Block, Engine, Key, as_json, of_json


def count(corpus: Corpus, stage: str, engine: Engine) -> dict[str, list]:
    """What is kept of a corpus, and what one of its stages dropped.

    Returns:
      'sets': [source, language, documents, UTF-8 bytes] of what is kept; 'reasons':
      [reason, documents, UTF-8 bytes] of what the stage dropped.
    """
    totals = {name: collections.defaultdict(lambda: [0, 0]) for name in ("sets", "reasons")}
    shards = range(corpus.num_shards())
    for _, block in engine.run("count", shards, functools.partial(_count, corpus, stage)):
        for name, rows in of_json(block).items():
            for *key, documents, size in rows:
                total = totals[name][tuple(key)]
                total[0] += documents
                total[1] += size
    return {
        name: [[*key, *total] for key, total in sorted(of_name.items())]
        for name, of_name in totals.items()
    }


def _count(corpus: Corpus, stage: str, shard: int) -> Iterator[tuple[Key, Block]]:
    table = corpus.read_all(shard, "text", "source", "language", "stage")
    size = pc.cast(pc.binary_length(table["text"]), pa.int64())
    table = table.append_column("size", size)
    kept = table.filter(pc.is_null(table["reason"]))
    dropped = table.filter(pc.equal(table["stage"], stage))
    sets, reasons = _sums(kept, ["source", "language"]), _sums(dropped, ["reason"])
    yield (shard,), as_json({"sets": sets, "reasons": reasons})


def _sums(table: pa.Table, keys: list[str]) -> list[list]:
    sums = table.group_by(keys).aggregate([("size", "count"), ("size", "sum")])
    rows = sums.select([*keys, "size_count", "size_sum"]).to_pylist()
    return [list(row.values()) for row in rows]
