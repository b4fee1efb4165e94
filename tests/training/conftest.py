"""A small corpus, a tokenizer and a config that trains in seconds."""

import json

import pytest

from baichuan_jax import tokenizer as tokenizer_module
from baichuan_jax.config import Config
from baichuan_jax.data.dialogue import dialogue


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with `zh_en.jsonl` and `tokenizer.model`."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = list(dialogue(400, seed=1))
    rows = [json.dumps({"text": d.text, "lang": d.language}) for d in documents]
    (folder / "zh_en.jsonl").write_text("\n".join(rows) + "\n")
    texts = [(d.text, d.source) for d in documents]
    tokenizer_module.train(texts, folder / "tokenizer.model", vocab_size=1_000)
    return folder


@pytest.fixture
def config(corpus):
    config = Config()
    model, training = config.model, config.training
    model.vocab_size, model.hidden_size, model.intermediate_size = 1_000, 32, 48
    model.num_layers, model.num_heads = 2, 4
    config.data.sources = f"chat={corpus / 'zh_en.jsonl'}"
    config.data.tokenizer = str(corpus / "tokenizer.model")
    config.data.sequence_length, config.data.eval_fraction = 32, 0.05
    training.num_steps, training.batch_size = 12, 8
    training.compute_dtype, training.remat = "float32", "none"
    training.log_every, training.eval_every, training.eval_batches = 1, 6, 2
    config.checkpoint.every_steps = 4
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 2
    return config
