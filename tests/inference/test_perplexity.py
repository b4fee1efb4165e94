"""The benchmark of quantisation: its numbers, and what it says without a run or a text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax import tokenizer as tokenizer_module
from baichuan_jax.config import Config, to_json
from baichuan_jax.data import packing
from baichuan_jax.data.dialogue import dialogue
from baichuan_jax.inference import perplexity
from baichuan_jax.inference.quantize import quantize, save_quantized
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.training.checkpoint import Checkpoints


def make_model(config: Config) -> Transformer:
    rng = np.random.default_rng(0)
    model = jax.eval_shape(lambda key: Transformer(key, config.model), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), model)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with random weights; its text."""
    workdir = tmp_path_factory.mktemp("run")
    documents = list(dialogue(200, seed=1))
    text = workdir / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": d.text}) for d in documents))
    tokenizer_module.train(
        [(d.text, d.source) for d in documents], workdir / "tokenizer.model", vocab_size=700
    )
    config = Config()
    config.model.vocab_size, config.model.hidden_size, config.model.num_heads = 700, 64, 4
    config.model.intermediate_size, config.model.num_layers = 96, 2
    config.data.sources, config.data.tokenizer = f"{text}", str(workdir / "tokenizer.model")
    config.data.sequence_length, config.data.eval_fraction = 48, 0.2
    (workdir / "config.json").write_text(to_json(config))
    tokenizer = tokenizer_module.Tokenizer(config.data.tokenizer)
    packing.pack(config.data, tokenizer, workdir / "shards")
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(5, {"model": make_model(config)}, {}, 0)
    return workdir, config, text


def predicted(line: str) -> int:
    return int(line.split(";")[1].split()[0].replace(",", ""))


def test_table(run):
    workdir, _, text = run
    lines = list(perplexity.benchmark(workdir))
    table = {line.split()[0]: line.split() for line in lines[2:]}
    assert list(table) == ["bfloat16", "int8", "nf4", "int4"]
    linears = {kind: float(row[1]) for kind, row in table.items()}
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96) / 2**20
    assert linears["bfloat16"] == pytest.approx(2 * weights, abs=0.01)
    assert linears["int8"] == pytest.approx(weights, rel=0.1)
    assert linears["nf4"] == linears["int4"] == pytest.approx(0.57 * weights, rel=0.15)
    loss = {kind: float(row[6]) for kind, row in table.items()}
    change = {kind: float(row[8].rstrip("%")) for kind, row in table.items()}
    for kind in table:
        assert float(table[kind][7]) == pytest.approx(np.exp(loss[kind]), rel=1e-3)
        expected = 100 * np.expm1(loss[kind] - loss["bfloat16"])
        assert change[kind] == pytest.approx(expected, abs=0.02)
    assert change["bfloat16"] == 0 and abs(change["int8"]) < 1 and change["nf4"] != 0
    # The held-out fifth, then all of the text.
    everything = next(perplexity.benchmark(workdir, str(text)))
    counts = [predicted(line) for line in (lines[0], everything)]
    assert 0.1 < counts[0] / counts[1] < 0.3 and counts[0] > 500
    assert str(workdir / "shards") in lines[0] and str(text) in everything
    fewer = next(perplexity.benchmark(workdir, str(text), max_tokens=300))
    assert 200 < predicted(fewer) <= 7 * 48


def test_loss_in_chunks_is_that_of_all_logits(run, monkeypatch):
    config = run[1]
    model = make_model(config)
    rng = np.random.default_rng(1)
    shape = (3, 50)
    batch = {name: rng.integers(0, 700, shape, np.int32) for name in ("tokens_BT", "targets_BT")}
    batch["positions_BT"] = np.broadcast_to(np.arange(50, dtype=np.int32), shape)
    batch["segments_BT"] = np.ones(shape, np.int32)
    batch["mask_BT"] = rng.random(shape) < 0.7

    @jax.jit
    def logits(model):
        places = (batch[name] for name in ("tokens_BT", "positions_BT", "segments_BT"))
        return model.logits(model(*places, dtype=jnp.float32))

    z = np.asarray(logits(model), np.float64)
    picked = np.take_along_axis(z, batch["targets_BT"][..., None], -1)[..., 0]
    nats = (np.log(np.exp(z).sum(-1)) - picked) * batch["mask_BT"]
    monkeypatch.setattr(perplexity, "_LOGITS", 3 * 768 * 7)  # 50 tokens in chunks of 7
    found, tokens = perplexity.losses(model, [batch, batch], jnp.float32)
    np.testing.assert_allclose(found, np.tile(nats.sum(1), 2), rtol=1e-5)
    np.testing.assert_array_equal(tokens, np.tile(batch["mask_BT"].sum(1), 2))


def test_released_models_take_what_their_authors_say():
    rows = [line.split() for line in perplexity.released_memory()][1:-1]
    found = {(name, kind): (float(values[3]), values[4:]) for name, kind, *values in rows}
    assert len(found) == 8
    for key, (total, official) in found.items():
        if official:
            # In 4 bits theirs quantises the scales, too: 0.37 bits a weight, 5 percent in all.
            least, most = (0.995, 1.06) if key[1] == "nf4" else (0.98, 1.02)
            assert least < total / float(official[0]) < most, key
    assert found["Baichuan2-7B", "nf4"][0] == found["Baichuan2-7B", "int4"][0]


def test_says_what_is_missing(run, tmp_path):
    workdir, config, _ = run
    with pytest.raises(ValueError, match=r"no run's folder.*python -m experiments.quickstart"):
        next(perplexity.benchmark(tmp_path))
    (tmp_path / "config.json").write_text(to_json(config))
    with pytest.raises(ValueError, match="give some with --text=FILES"):
        next(perplexity.benchmark(tmp_path))
    small = quantize(make_model(config), "int4")
    save_quantized(small, config, tmp_path / "small", source=workdir)
    with pytest.raises(ValueError, match="is quantised already, as int4"):
        next(perplexity.benchmark(tmp_path / "small"))
