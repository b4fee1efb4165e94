import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax import tokenizer as tokenizer_module
from baichuan_jax.config import Config, MeshConfig, to_json
from baichuan_jax.data.dialogue import dialogue
from baichuan_jax.data.prepare import perplexity, reading
from baichuan_jax.data.prepare.corpus import Corpus, write_parquet
from baichuan_jax.data.prepare.perplexity import PerplexityConfig
from baichuan_jax.data.prepare.reading import bits_per_byte
from baichuan_jax.inference.load import load
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder; its model as it was trained; its tokenizer; texts of all lengths."""
    workdir = tmp_path_factory.mktemp("run")
    texts = [document.text for document in dialogue(60, seed=1)]
    file = workdir / "tokenizer.model"
    tokenizer_module.train([(text, "a") for text in texts], file, vocab_size=700)
    config = Config()
    config.model.vocab_size, config.model.hidden_size, config.model.num_heads = 700, 32, 4
    config.model.intermediate_size, config.model.num_layers = 48, 2
    config.data.sequence_length = 200
    (workdir / "config.json").write_text(to_json(config))
    rng = np.random.default_rng(0)
    model = jax.eval_shape(lambda key: Transformer(key, config.model), jax.random.key(0))
    model = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), model)
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"model": model}, {}, 0)
    texts = [*texts[:8], "a", "", "好", texts[9][:40], " ".join(texts[10:40])]
    return workdir, model, tokenizer_module.Tokenizer(file), texts


@jax.jit
def logits(model, tokens):
    at = jnp.arange(tokens.shape[1])[None]
    return model.logits(model(tokens, at, at * 0 + 1, dtype=jnp.float32))[0]


def plain(model, tokenizer, text, limit):
    """One text at a time, all of its logits at once; what fills the row comes after it."""
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id][: limit + 1])
    size = sum(len(tokenizer.id_bytes(int(i))) for i in ids[1:])
    if not size:
        return np.nan
    row = np.zeros((1, 200), np.int32)
    row[0, : len(ids) - 1] = ids[:-1]
    z = np.asarray(logits(model, row), np.float64)[: len(ids) - 1]
    nats = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), ids[1:]]
    return nats.sum() / np.log(2) / size


@pytest.mark.parametrize("mesh", [None, MeshConfig(2, 2, 2)])
def test_as_a_plain_computation(made, mesh):
    workdir, model, tokenizer, texts = made
    served = load(workdir, mesh=mesh)
    config = PerplexityConfig(tokens=150, batch_tokens=400)
    found = bits_per_byte(pa.array(texts), served, config.tokens, config.batch_tokens)
    expected = [plain(model, tokenizer, text, 150) for text in texts]
    np.testing.assert_allclose(found, np.float32(expected), rtol=2e-5)
    assert np.isnan(found[[8, 9, 10]]).all() and np.isfinite(found).sum() == len(texts) - 3
    assert found.dtype == np.float32


def test_no_more_than_the_model_was_trained_on(made):
    workdir, model, tokenizer, texts = made
    served = load(workdir)
    assert len(tokenizer.encode(texts[-1])) > 200
    found = bits_per_byte(pa.array(texts[-1:]), served, 512, 1 << 14)
    assert found[0] == pytest.approx(plain(model, tokenizer, texts[-1], 200), rel=2e-5)


def test_writes_all_shards_and_resumes(made, tmp_path, monkeypatch):
    workdir, model, tokenizer, texts = made
    served, config = load(workdir), PerplexityConfig(tokens=64, batch_tokens=256)
    corpus = Corpus(str(tmp_path))
    for shard, part in enumerate([texts[:5], texts[5:], []]):
        columns = {"source": ["s"] * len(part), "language": [None] * len(part)}
        write_parquet(
            corpus.document_path(shard),
            pa.table({"text": pa.array(part, pa.string()), **columns, "origin": columns["source"]}),
        )
    told = perplexity.run(corpus, "perplexity", served, config)
    json.dumps(told)
    assert told["documents"] == len(texts) and told["unscored"] == 3
    expected = np.array([plain(model, tokenizer, text, 64) for text in texts])
    assert told["mean"] == pytest.approx(np.nanmean(expected), rel=1e-4)
    assert told["percentiles"]["50"] == pytest.approx(np.nanmedian(expected), rel=1e-4)
    after = corpus.after("perplexity")
    found = [after.read(shard, "bits_per_byte")["bits_per_byte"].to_numpy() for shard in range(3)]
    assert [len(part) for part in found] == [5, len(texts) - 5, 0]
    np.testing.assert_allclose(np.concatenate(found), np.float32(expected), rtol=2e-5)
    # What is done is not done again; the rest comes out the same.
    corpus.attribute_path("perplexity", 1).unlink()
    scored, real = [], bits_per_byte
    monkeypatch.setattr(
        reading, "bits_per_byte", lambda texts, *rest: scored.append(texts) or real(texts, *rest)
    )
    assert perplexity.run(corpus, "perplexity", served, config) == told
    assert [part.to_pylist() for part in scored] == [texts[5:]]


def test_refuses_what_gives_no_score():
    PerplexityConfig(tokens=2, batch_tokens=1).check()
    for field, value, least in (("tokens", 1, 2), ("batch_tokens", 0, 1)):
        message = f"config.perplexity.{field}={value} must be {least} or more"
        with pytest.raises(ValueError, match=message):
            PerplexityConfig(**{field: value}).check()
