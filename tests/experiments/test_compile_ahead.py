"""The command that compiles for a machine that is not there."""

import importlib.util
import os
import subprocess
import sys

import pytest

TINY = {
    "model.vocab_size": 2048,
    "model.hidden_size": 256,
    "model.intermediate_size": 640,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "data.sequence_length": 1024,
    "training.loss_chunk": 128,
    "training.batch_size": 16,
    "training.micro_batches": 2,
}


def run(*flags):
    shape = [f"--config.{name}={value}" for name, value in TINY.items()]
    command = ["-m", "experiments.compile_ahead", "--config=configs/baichuan2_13b.py", *shape]
    process = subprocess.run(
        [sys.executable, *command, *flags],
        env=os.environ | {"XLA_FLAGS": "", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    return process.returncode, process.stdout, process.stderr


def test_an_unknown_machine_is_refused_in_one_line():
    code, _, err = run("--topology=h201:1x8")
    assert code == 1 and err.startswith("ValueError: ") and "Did you mean" in err


def test_without_a_compiler_the_extra_is_named():
    if importlib.util.find_spec("jax_plugins"):
        pytest.skip("the CUDA plugin is installed")
    code, _, err = run("--topology=h200:1x8")
    assert code == 1 and err.splitlines()[-1].endswith("pip install -e '.[cuda]'")


@pytest.mark.aot
def test_a_gpu_program(tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda13")
    code, out, err = run("--topology=h200:1x8", f"--text={tmp_path / 'step.hlo'}")
    assert code == 0, err
    assert "GiB by the compiler" in out and "GiB by the plan" in out
    assert "overlap with matrix products" in out
    assert "buffers of full logits: none" in out and "buffers of T × T: none" in out
    assert (tmp_path / "step.hlo").read_text().startswith("HloModule jit_train_step")


@pytest.mark.aot
def test_what_does_not_fit_is_the_exit_code():
    pytest.importorskip("jax_plugins.xla_cuda13")
    code, out, _ = run("--topology=h100:1x1", "--config.model.hidden_size=32768")
    assert code == 1 and "DOES NOT FIT" in out
