"""A config for the small corpus of conftest.py, and all that a run on it leaves."""

import json

import numpy as np
import pyarrow.parquet as pq

from baichuan_jax.data.prepare import engine
from baichuan_jax.data.prepare.config import PrepareConfig

SECRET = "Write to jane.doe@mail-of-jane.org before noon, she said, and do not forget the keys. "


def config_of(raw, **more):
    config = PrepareConfig()
    config.sources = ",".join(
        f"{name}={raw / name}.jsonl.gz" for name in ("docs", "python", "dialogue")
    )
    config.vocab_size = 1_200
    config.tokens.sequence_length = 128
    config.tokens.eval_fraction = 0.05
    config.ingest.shard_bytes = 60_000
    config.decontaminate.against = str(raw / "exam.jsonl")
    for name, value in more.items():
        setattr(config, name, value)
    return config


def local(folder, workers=1):
    return engine.Local(folder, workers)


def contents(workdir):
    """All that a run leaves and that is not a time: tables, rows of tokens, counts."""
    found = {}
    for path in sorted(workdir.glob("*/**/*.parquet")):
        found[str(path.relative_to(workdir))] = pq.read_table(path).to_pydict()
    for path in sorted(workdir.glob("stages/*.json")):
        record = json.loads(path.read_text())
        found[path.name] = record["counts"], record["fingerprint"]
    manifest = json.loads((workdir / "shards" / "manifest.json").read_text())
    found["sets"] = manifest["sets"]
    found["tokenizer"] = (workdir / "tokenizer.model").read_bytes()
    return found


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_equal(a[name], b[name], err_msg=name)
