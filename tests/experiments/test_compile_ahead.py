"""The command that compiles for a machine that is not there."""

import importlib.util
import os
import re
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


def test_machines_are_listed_without_a_recipe(tmp_path):
    def call(*flags):
        call = [sys.executable, "-m", "experiments.compile_ahead", *flags]
        return subprocess.run(call, capture_output=True, encoding="utf-8", timeout=60)

    done = call("--topology=list")
    assert done.returncode == 0 and "\nh200 " in done.stdout
    done = call("--topology=h200:1x8")
    assert done.returncode == 1 and "--config=RECIPE is missing" in done.stderr


def test_where_the_text_cannot_go_is_refused_at_once(tmp_path):
    code, out, err = run("--topology=h200:1x8", f"--text={tmp_path}")
    assert code == 1 and "Compiling" not in out and f"{tmp_path}" in err.splitlines()[-1]


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
@pytest.mark.parametrize("machine", ["h200:1x8", "h100:128x8"])
def test_what_is_planned_for_a_13b_hides_what_it_moves(tmp_path, machine):
    """At least 90 % of the bytes overlap, of what a user gets who follows the plan."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    recipe = tmp_path / "plan.py"
    plan = ("plan", "--config=configs/baichuan2_13b.py", f"--apply={recipe}")
    for command, *flags in (plan, ("compile_ahead", f"--config={recipe}")):
        done = subprocess.run(
            [sys.executable, "-m", f"experiments.{command}", f"--topology={machine}", *flags],
            env=os.environ | {"XLA_FLAGS": "", "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            encoding="utf-8",
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    overlap = re.search(r"products: ([\d.]+)% of the bytes of weights", done.stdout)
    assert float(overlap[1]) >= 90
    error = re.search(r"GiB by the plan \(([+-][\d.]+)%\)", done.stdout)
    assert abs(float(error[1])) < 10
    assert "buffers of full logits: none" in done.stdout
    assert "buffers of T × T: none" in done.stdout


@pytest.mark.aot
def test_what_does_not_fit_is_the_exit_code():
    pytest.importorskip("jax_plugins.xla_cuda13")
    code, out, _ = run("--topology=h100:1x1", "--config.model.hidden_size=32768")
    assert code == 1 and "DOES NOT FIT" in out
