"""Baselines beside counts by hand and the gzip module."""

import collections
import gzip
import json
import math

import numpy as np

from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training.pretrain import open_data
from baichuan_jax.training.report import baselines


def test_baselines(config, tmp_path):
    """Two documents, one to train on and one held out, both far shorter than a row."""
    train, held_out = "一加一等于二。", "二加一等于三。"
    for name, text in (("train", train), ("eval", held_out)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
    config.data.sources = str(tmp_path / "train.jsonl")
    config.data.eval_sources = f"train={tmp_path / 'eval.jsonl'}"
    tokenizer = Tokenizer(config.data.tokenizer)
    got = baselines(open_data(config.data, tokenizer, tmp_path), config, tokenizer)

    V = config.model.vocab_size
    seen = collections.Counter([*tokenizer.encode(train), tokenizer.eos_id][1:])
    targets = [*tokenizer.encode(held_out), tokenizer.eos_id][1:]
    total = V + sum(seen.values())
    nats = [-math.log((1 + seen[token]) / total) for token in targets]
    text_bytes = sum(tokenizer.token_bytes[token] for token in targets)
    np.testing.assert_allclose(got["unigram"]["loss"], np.mean(nats), rtol=1e-6)
    bits = sum(nats) / math.log(2) / text_bytes
    np.testing.assert_allclose(got["unigram"]["bits_per_byte"], bits, rtol=1e-6)
    raw = held_out.encode()
    assert got["gzip"]["bits_per_byte"] == 8 * len(gzip.compress(raw, 9)) / len(raw)
