"""`experiments.convert_checkpoint`, there and back."""

import os
import subprocess
import sys
from pathlib import Path

from baichuan_jax.convert.release import read_config
from tests.convert import releases
from tests.convert.test_hugging_face import siblings


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.convert_checkpoint", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": ""},
    )


def test_the_command_there_and_back(tmp_path):
    tensors = releases.make_release(tmp_path / "r", files="bin", shards=2)
    run = command(f"--from_hf={tmp_path / 'r'}", f"--to={tmp_path / 'run'}", "--step=3")
    assert run.returncode == 0, run.stderr
    assert "Baichuan 2, with NormHead: config.json has z_loss_weight." in run.stdout
    assert "run is ready: its weights are in checkpoints/00000003." in run.stdout
    assert "convert" in run.stderr  # the progress
    back = f"--to_hf={tmp_path / 'back'}"
    run = command(f"--from={tmp_path / 'run'}", back, "--raw_head", "--max_shard_gb=0.0001")
    assert run.returncode == 0, run.stderr
    assert "Note: vLLM and SGLang" in run.stdout and "Note: --raw_head:" in run.stdout
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    found = read_config(tmp_path / "back").tensors
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype
        assert found[name].read().tobytes() == x.tobytes(), name


def test_the_command_tells_in_one_line(tmp_path):
    releases.make_release(tmp_path / "r", z_loss_weight=None)
    run = command(f"--from_hf={tmp_path / 'r'}", f"--to={tmp_path / 'run'}")
    assert run.returncode == 1
    assert run.stderr.startswith("AmbiguousError: ") and run.stderr.count("\n") == 1
    assert "--version=1" in run.stderr and siblings(tmp_path) == ["r"]
    run = command(f"--from_hf={tmp_path / 'r'}")
    assert run.returncode == 1 and "Give --from_hf=DIR --to=DIR" in run.stdout + run.stderr
