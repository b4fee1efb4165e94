"""The commands one after the other, as a user with text of their own gives them."""

import json
import os
import subprocess
import sys

from baichuan_jax.data.dialogue import dialogue
from baichuan_jax.training.metrics import read_metrics

MODEL = {
    "model.vocab_size": 1_000,
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "data.sequence_length": 32,
    "training.batch_size": 8,
    "training.num_steps": 40,
    "training.eval_every": 20,
    "optimizer.warmup_steps": 4,
}


def run(module, *arguments, **config):
    """Runs a command to its end; returns its exit code and all it said."""
    flags = [f"--config.{name}={value}" for name, value in config.items()]
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments, *flags],
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def write_jsonl(path, documents):
    rows = [json.dumps({"text": d.text, "lang": d.language}) for d in documents]
    path.write_text("\n".join(rows) + "\n")


def record(workdir, split):
    return [entry for entry in read_metrics(workdir) if entry["split"] == split]


def test_text_to_tokenizer_to_model_to_continued_training(tmp_path):
    documents = list(dialogue(400, seed=1))
    write_jsonl(tmp_path / "first.jsonl", documents[:300])
    write_jsonl(tmp_path / "second.jsonl", documents[300:])
    tokenizer = tmp_path / "tokenizer.model"
    code, said = run(
        "train_tokenizer",
        f"--sources=chat={tmp_path}/first.jsonl",
        f"--out={tokenizer}",
        "--vocab_size=1000",
    )
    assert code == 0 and tokenizer.exists(), said

    recipe = ("--config=configs/quickstart.py", f"--workdir={tmp_path}/base")
    data = {"data.tokenizer": tokenizer, "data.sources": f"chat={tmp_path}/first.jsonl"}
    code, said = run("pretrain", *recipe, **MODEL, **data)
    assert code == 0, said
    base = record(tmp_path / "base", "train")
    assert base[-1]["step"] == 40 and base[-1]["loss"] < base[0]["loss"] - 1
    assert (tmp_path / "base" / "plots" / "loss.png").exists()

    recipe = ("--config=configs/quickstart.py", f"--workdir={tmp_path}/more")
    data["data.sources"] = f"chat={tmp_path}/second.jsonl"
    code, said = run(
        "pretrain", *recipe, **MODEL, **data, **{"checkpoint.init_from": tmp_path / "base"}
    )
    assert code == 0 and f"Starts from the weights of {tmp_path}/base" in said, said
    more = record(tmp_path / "more", "train")
    assert [entry["step"] for entry in more] == list(range(1, 41))
    assert more[0]["learning_rate"] == base[0]["learning_rate"]  # warm-up anew
    assert abs(more[0]["loss"] - base[-1]["loss"]) < 0.5 < base[0]["loss"] - more[0]["loss"]


def test_commands_refuse_in_one_line(tmp_path):
    """An error of the user is one line with the file or flag, exit code 1, no traceback."""
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n["not an object"]\n')
    out = f"--out={tmp_path}/t.model"
    recipe = ("--config=configs/quickstart.py", f"--workdir={tmp_path}/run")
    for module, arguments, config, named in (
        ("train_tokenizer", (f"--sources={tmp_path}/bad.jsonl", out), {}, "bad.jsonl, row 2"),
        ("train_tokenizer", (f"--sources={tmp_path}/none.jsonl", out), {}, "none.jsonl: no such"),
        ("pretrain", recipe, {"data.tokenizer": f"{tmp_path}/none.model"}, "none.model"),
        ("pretrain", recipe, {"model.layers": 2}, "--config.model.layers: "),
        ("quickstart", recipe, {"mesh.tensor": 7}, "config.mesh.tensor=7"),
        ("quickstart", recipe, {"training.remat": "some"}, "config.training.remat='some'"),
    ):
        code, said = run(module, *arguments, **config)
        assert code == 1 and named in said and "Traceback" not in said, (module, said)
    assert not (tmp_path / "t.model").exists()
    assert not (tmp_path / "run" / "tokenizer.model").exists()  # refused before any long work
