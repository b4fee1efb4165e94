"""The commands generate and chat on a tiny random release, each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from baichuan_jax import tokenizer as tokenizer_module
from baichuan_jax.config import ModelConfig
from baichuan_jax.inference.load import load
from tests.convert.releases import make_release

SHARED = ["--dtype=float32", "--max_length=96"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A chat model, as Hugging Face has it."""
    directory = tmp_path_factory.mktemp("models")
    texts = [("今天天气很好，我们去公园。 The dog sleeps, the fox jumps.", "a")] * 200
    tokenizer_module.train(texts, directory / "tokenizer.model", vocab_size=480)
    model = ModelConfig(480, 64, 96, 2, 4)
    tokenizer = directory / "tokenizer.model"
    make_release(directory / "tiny-chat", chat=True, model=model, tokenizer=tokenizer)
    return directory / "tiny-chat"


def run(command, folder, *flags, said=""):
    process = subprocess.run(
        [sys.executable, "-m", f"experiments.{command}", f"--checkpoint={folder}", *SHARED, *flags],
        input=said,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    return process.returncode, process.stdout, process.stderr


def test_chat(folder, tmp_path):
    path = tmp_path / "talk.json"
    flags = ["--temperature=0", "--max_new_tokens=12", "--system=好", "--quantize=int8"]
    code, out, err = run("chat", folder, *flags, said=f"今天 the dog？\n去\n/save {path}\n")
    assert code == 0, err
    messages = json.loads(path.read_text(encoding="utf-8"))
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    assert out == "".join(f"{reply}\n" for reply in replies) and any(replies)
    assert [m["content"] for m in messages if m["role"] != "assistant"] == [
        "好",
        "今天 the dog？",
        "去",
    ]
    model = load(folder, dtype="float32", quantize="int8", slots=1, max_length=96)
    options = {"temperature": 0.0, "max_new_tokens": 12}
    assert [model.chat(messages[:2], **options), model.chat(messages[:4], **options)] == replies


def test_generate(folder, tmp_path):
    rows = [{"prompt": "今天天气"}, {"prompt": "The dog\n"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sampling = ["--seed=3", "--temperature=1", "--top_k=0", "--top_p=1", "--max_new_tokens=10"]
    many = ["--prompt=好", f"--prompts_file={tmp_path}/in.jsonl", "--n=2", "--logprobs"]
    code, out, err = run("generate", folder, *sampling, *many, f"--out={tmp_path}/out.jsonl")
    assert (code, out) == (0, ""), err
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    results = [json.loads(line) for line in lines]
    prompts = ["好", "今天天气", "The dog\n"]
    assert [(r["prompt"], r["sample"]) for r in results] == [
        (p, s) for p in prompts for s in (0, 1)
    ]
    assert results[0]["text"] != results[1]["text"]
    for result in results:
        assert result["finish_reason"] in ("stop", "length")
        assert result["tokens"] == len(result["token_ids"]) == len(result["logprobs"]) <= 10
        assert max(result["logprobs"]) <= 0

    code, out, err = run("generate", folder, *sampling, "--prompt=今天天气")
    assert (code, out) == (0, f"今天天气{results[2]['text']}\n"), err
    stop = results[2]["text"][2:4]
    code, out, err = run(
        "generate", folder, *sampling, "--prompt=今天天气", "--prompt=好", f"--stop={stop}"
    )
    assert f"\n今天天气⟶{results[2]['text'].partition(stop)[0]}\n" in out and "\n好⟶" in out


@pytest.mark.parametrize(
    "command, flags, message",
    [
        ("generate", [], "Give --prompt or --prompts_file"),
        ("generate", ["--prompt=x", "--logprobs"], "--out=FILE.jsonl, which is not given"),
        ("generate", ["--prompt=x", "--max_new_tokens=500"], "max_new_tokens=500 are more than"),
        ("chat", ["--top_p=3"], "top_p=3.0 must be"),
        ("chat", ["--version=1", "--system=x"], "Baichuan 1 has no system message"),
    ],
)
def test_what_a_user_can_set_right_is_one_line(folder, command, flags, message):
    code, _, err = run(command, folder, *flags, said="x\n")
    assert code != 0 and message in err and "Traceback" not in err
