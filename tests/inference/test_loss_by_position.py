"""Loss against position: which tokens are read, with which scaling, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax import tokenizer as tokenizer_module
from baichuan_jax.config import Config, to_json
from baichuan_jax.data import packing
from baichuan_jax.data.dialogue import dialogue
from baichuan_jax.inference import loss_by_position, perplexity
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.training.checkpoint import Checkpoints

LENGTH = 96


@pytest.fixture(scope="module")
def texts():
    """Of very different lengths."""
    documents = [document.text for document in dialogue(300, seed=1)]
    return ["\n".join(documents[i : i + 1 + i % 17]) for i in range(0, 280, 7)]


def make_run(folder, texts, **model):
    folder.mkdir()
    text = folder.parent / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    pairs = [(t, "a") for t in texts]
    tokenizer_module.train(pairs, folder / "tokenizer.model", vocab_size=700)
    config = Config()
    config.model = dataclasses.replace(
        config.model, vocab_size=700, hidden_size=64, intermediate_size=96, num_layers=2, **model
    )
    config.model.num_heads = 2
    config.data.sources, config.data.sequence_length = str(text), 24
    config.data.eval_fraction = 0.5
    (folder / "config.json").write_text(to_json(config))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: Transformer(key, config.model), jax.random.key(0))
    made = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(5, {"model": made}, {}, 0)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("runs")
    configs = [make_run(root / p, texts, position=p) for p in ("rope", "alibi")]
    return root, configs


def test_rows_are_whole_and_of_held_out_documents(runs, texts):
    root, (config, _) = runs
    tokenizer = tokenizer_module.Tokenizer(root / "rope" / "tokenizer.model")
    rows = loss_by_position.long_rows(config.data, tokenizer, LENGTH)
    expected = []
    for text in texts:
        tokens = [*tokenizer.encode(text), tokenizer.eos_id]
        if packing.held_out(packing.text_hash(text), 0.5):
            while len(tokens) > LENGTH:
                expected.append(tokens[: LENGTH + 1])
                tokens = tokens[LENGTH:]
    assert sorted(rows.tolist()) == sorted(expected) and len(expected) > 10
    fewer = loss_by_position.long_rows(config.data, tokenizer, LENGTH, max_rows=4)
    np.testing.assert_array_equal(fewer, rows[:4])
    every = loss_by_position.long_rows(config.data, tokenizer, LENGTH, text=config.data.sources)
    assert len(every) > len(rows)


def test_each_scaling_is_the_model_with_that_config(runs):
    root, (config, other) = runs
    paths = [root / "rope", root / "alibi"]
    curves = loss_by_position.read(paths, LENGTH, ["none", "yarn"], max_rows=5)
    labels = [curve.label.removeprefix(f"{root}/") for curve in curves]
    assert labels == ["rope", "rope, yarn", "alibi"]
    tokenizer = tokenizer_module.Tokenizer(root / "rope" / "tokenizer.model")
    rows = loss_by_position.long_rows(config.data, tokenizer, LENGTH, max_rows=5)
    at = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (5, LENGTH))
    for curve, scaling in zip(curves, ["", "yarn", None], strict=True):
        model = other.model
        if scaling is not None:
            model = dataclasses.replace(config.model, rope_scaling=scaling)
            model.rope_factor, model.rope_original_length = 4.0 if scaling else 1.0, 24
        folder = paths[scaling is None]
        restored = perplexity.restore_float32(folder, model)
        hidden = restored(rows[:, :-1], at, np.ones_like(at), dtype=jnp.float32)
        z = np.asarray(restored.logits(hidden), np.float64)
        picked = np.take_along_axis(z, rows[:, 1:, None], -1)[..., 0]
        nats = (np.log(np.exp(z).sum(-1)) - picked).mean(0)
        np.testing.assert_allclose(curve.nats_T, nats, rtol=1e-4)
        assert (curve.trained, curve.rows) == (24, 5)
    assert all(np.abs(curves[0].nats_T - c.nats_T).max() > 1e-3 for c in curves[1:])


def test_table_and_picture(tmp_path):
    nats = np.arange(100.0)
    curves = [loss_by_position.Curve(name, 24, nats + n, 7) for n, name in enumerate("ab")]
    lines = [line.split() for line in loss_by_position.table(curves)]
    assert lines[0] == ["positions", "tokens", "a", "b"]
    assert [line[0] for line in lines[1:]] == ["0-15", "16-31", "32-63", "64-99"]
    assert lines[2] == ["16-31", "112", "23.5000", "24.5000"]
    loss_by_position.draw(curves, tmp_path / "plots" / "x.png")
    assert (tmp_path / "plots" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_compare_is_refused(runs, texts, tmp_path):
    root, _ = runs
    with pytest.raises(ValueError, match=r"No document of \S+ has more than 100,000 tokens"):
        loss_by_position.read([root / "rope"], 100_000)
    with pytest.raises(ValueError, match="'dynamic' should be one of none, linear, ntk, yarn"):
        loss_by_position.read([root / "rope"], LENGTH, ["dynamic"])
    with pytest.raises(ValueError, match="--length=24 is not above the 24 tokens"):
        loss_by_position.read([root / "rope"], 24, ["yarn"])
    changed = make_run(tmp_path / "other", texts[:20])
    with pytest.raises(ValueError, match="have different tokenizers"):
        loss_by_position.read([root / "rope", tmp_path / "other"], LENGTH)
    tokenizer = (root / "rope" / "tokenizer.model").read_bytes()
    (tmp_path / "other" / "tokenizer.model").write_bytes(tokenizer)
    with pytest.raises(ValueError, match=r"held out different documents: give .* --sources"):
        loss_by_position.read([root / "rope", tmp_path / "other"], LENGTH)
    changed.data.sources = ""
    (tmp_path / "other" / "config.json").write_text(to_json(changed))
    with pytest.raises(ValueError, match="configs name no documents: give some with --sources"):
        loss_by_position.read([tmp_path / "other"], LENGTH)


def test_command(runs, tmp_path):
    root, _ = runs
    flags = [f"--checkpoints={root}/rope,{root}/alibi", f"--length={LENGTH}", "--max_rows=2"]
    command = [sys.executable, "-m", "experiments.loss_by_position", *flags]
    command += ["--scalings=none,yarn", f"--plot={tmp_path}/x.png"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == [
        *("positions", "tokens", f"{root}/rope", f"{root}/rope,", "yarn", f"{root}/alibi"),
    ]
    assert len(lines) == 4 and (tmp_path / "x.png").exists()
