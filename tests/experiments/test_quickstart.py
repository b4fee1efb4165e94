"""The whole system in one command, small: run, killed, run again."""

import os
import re
import signal
import subprocess
import sys
import time

FLAGS = {
    "data.sources": "embedded:400000",
    "model.vocab_size": 2_500,
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "data.sequence_length": 64,
    "training.num_steps": 30,
    "training.eval_every": 10,
    "checkpoint.every_steps": 5,
}


def start(workdir):
    flags = [f"--config.{name}={value}" for name, value in FLAGS.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.quickstart", f"--workdir={workdir}", *flags],
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_in_the_middle_it_goes_on_and_reports(tmp_path):
    process = start(tmp_path)
    while process.poll() is None and not list(tmp_path.glob("checkpoints/*/manifest-*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "report.md").exists()

    said, progress = start(tmp_path).communicate(timeout=300)
    report = (tmp_path / "report.md").read_text()
    assert re.search(r"Resumes at step (5|10|15|20|25|30)\b", progress), progress
    assert "问：三加五等于多少？" in said and "Question: What is seven plus two?" in said
    losses = [float(x) for x in re.search(r"\| this model \| (.*) \| (.*) \|", report).groups()]
    unigram = [float(x) for x in re.search(r"\| unigram .*? \| (.*) \| (.*) \|", report).groups()]
    assert 0 < losses[0] < 8 and 0 < unigram[0] < 8 and "gzip -9" in report
    for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
        assert f"plots/{name}.png" in report
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 5_000
    assert "experiments.pretrain" in report

    before = (tmp_path / "metrics.jsonl").read_text()
    _, again = start(tmp_path).communicate(timeout=300)
    assert "Resumes at step 30," in again
    assert (tmp_path / "metrics.jsonl").read_text() == before
