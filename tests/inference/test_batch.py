"""Prompts from files, samples into files."""

import json

import pytest

from baichuan_jax import tokenizer as tokenizer_module
from baichuan_jax.inference import batch
from baichuan_jax.inference.sampling import Sampling
from tests.inference import scripted


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [("今天天气很好，我们去公园。 The dog sleeps, the fox jumps.", "a")] * 200
    tokenizer_module.train(texts, path, vocab_size=480)
    return tokenizer_module.Tokenizer(path)


def test_prompts_of_a_file(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text('今天\r\n  {"prompt": 1}\nlast', encoding="utf-8")
    assert batch.read_prompts(lines) == ["今天", '  {"prompt": 1}', "last"]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a\\nb", "id": 7}\n{"prompt": "好"}\n', encoding="utf-8")
    assert batch.read_prompts(str(rows)) == ["a\nb", "好"]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("p.txt", b"a\n\nb\n", r"p\.txt:2: the line is empty"),
        ("p.txt", b"", r"p\.txt:1: the line is empty"),
        ("p.txt", b"ab\xff", r"p\.txt: byte 2 is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", b'{"text": "a"}', r"p\.jsonl:1: .* string 'prompt', not {\"text\": \"a\"}"),
        ("p.jsonl", b'{"prompt": 5}', r"p\.jsonl:1: .* string 'prompt'"),
        ("p.jsonl", b'"a"', r"p\.jsonl:1: a row must be an object"),
    ],
)
def test_files_that_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        batch.read_prompts(tmp_path / name)


def test_jobs(tokenizer):
    model = scripted.model(tokenizer, [], max_length=30)
    long = "好" * 15
    first, second, _ = batch.jobs(model, ["the", long, "x"], stop=("。",))
    assert (first.prompt, first.sample) == ("the", 0)
    assert first.request.prompt == tokenizer.encode("the")
    assert first.request.continues and first.request.stop == ("。",)
    assert first.request.sampling == scripted.DEFAULTS.sampling
    assert first.request.max_new_tokens == 20  # the model's own
    assert second.request.max_new_tokens == 30 - 15  # what is left
    sampling = Sampling(temperature=1.0, seed=5)
    made = batch.jobs(model, ["a", "b"], samples=2, sampling=sampling, max_new_tokens=40)
    assert [(j.prompt, j.sample, j.request.sampling.seed) for j in made] == [
        *(("a", 0, 5), ("a", 1, 6), ("b", 0, 5), ("b", 1, 6)),
    ]
    assert {j.request.max_new_tokens for j in made} == {40}  # the engine says that it is too much
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        batch.jobs(model, ["a", ""])
    with pytest.raises(ValueError, match=r"Prompt 1: .* surrogate"):
        batch.jobs(model, ["a", "b\ud800"])


def test_results_come_in_order_and_run_together(tokenizer):
    model = scripted.model(tokenizer, ["The dog sleeps", "好", "x"])
    engine = model.engine
    results = batch.run(engine, batch.jobs(model, ["a", "b", "c"]))
    job, output = next(results)
    assert (job.prompt, output.text) == ("a", "The dog sleeps")
    assert engine.most_running == 3 and not engine.busy  # the shorter ones have ended, too
    assert [(j.prompt, o.text) for j, o in results] == [("b", "好"), ("c", "x")]


def test_nothing_runs_where_one_request_is_wrong(tokenizer):
    model = scripted.model(tokenizer, ["x"] * 3, max_length=30)
    jobs = batch.jobs(model, ["a", "好" * 40])
    with pytest.raises(ValueError, match=r"Prompt '好+': max_new_tokens=1 is too much"):
        list(batch.run(model.engine, jobs))
    assert not model.engine.busy and model.engine.steps == 0


def test_file_of_results(tokenizer, tmp_path, capsys):
    model = scripted.model(tokenizer, ["The dog", "龘" * 10])
    path = tmp_path / "new folder/out.jsonl"
    jobs = batch.jobs(model, ["今天"], samples=2, max_new_tokens=7)
    batch.write(model.engine, jobs, path)
    tokens = len(tokenizer.encode("The dog"))
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {
            "prompt": "今天",
            "sample": 0,
            "text": "The dog",
            "tokens": tokens,
            "finish_reason": "stop",
        },
        {
            **{"prompt": "今天", "sample": 1, "text": "龘龘\ufffd", "tokens": 7},
            "finish_reason": "length",
        },
    ]
    assert "今天" in path.read_text(encoding="utf-8")
    model = scripted.model(tokenizer, ["The dog"])
    batch.write(model.engine, batch.jobs(model, ["今天"]), path, logprobs=True)
    row = json.loads(path.read_text(encoding="utf-8"))
    assert (row["token_ids"], row["logprobs"]) == (tokenizer.encode("The dog"), [-0.5] * tokens)
    assert [file.name for file in path.parent.iterdir()] == ["out.jsonl"]
    assert "1/1" in capsys.readouterr().err


def test_a_file_is_whole_or_absent(tokenizer, tmp_path):
    def broken(step):
        if step == 4:
            raise RuntimeError("device lost")

    model = scripted.model(tokenizer, ["x", "The dog sleeps"], on_step=broken)
    with pytest.raises(RuntimeError):
        batch.write(model.engine, batch.jobs(model, ["a", "b"]), tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir()) and not model.engine.busy
    with pytest.raises(IsADirectoryError):
        batch.write(model.engine, [], tmp_path)
