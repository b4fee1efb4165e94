"""`experiments.plan` as a user calls it. (Plans of data: tests/data/prepare/test_plan.py.)"""

import os
import subprocess
import sys

import pytest

from baichuan_jax.parallel.topology import known


def command(module: str, *flags: str) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", f"experiments.{module}", *flags]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        call, env=environment, capture_output=True, encoding="utf-8", timeout=120, check=False
    )


def test_plans_a_run_and_applies_it(tmp_path):
    """The written recipe is what pre-training takes: here it stops at the 1,024 devices."""
    recipe = tmp_path / "plan.py"
    before = os.times().children_user
    done = command(
        "plan",
        *("--topology=h100:128x8", f"--plot={tmp_path}/plots", f"--apply={recipe}"),
        *("--config.data.tokenizer=x.model", "--config=configs/baichuan2_13b.py"),
    )
    assert done.returncode == 0, done.stderr
    assert os.times().children_user - before < 15
    assert "Predicted: " in done.stdout and f"Written: {recipe}" in done.stdout
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "memory.png",
        "time.png",
    ]
    assert "--topology=h100:128x8" in recipe.read_text(encoding="utf-8")
    run = command(
        "pretrain",
        *(f"--config={recipe}", f"--workdir={tmp_path}/run", "--config.data.sources=README.md"),
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "config.mesh.replica=128 × config.mesh.fsdp=8 × config.mesh.tensor=1" in run.stderr


def test_topologies():
    done = command("plan", "--topology=list")
    assert done.returncode == 0, done.stderr
    for chip in known():
        assert f"\n{chip.name} " in done.stdout


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--topology=v5e:2x2",), "DoesNotFit: v5e:2x2: a device needs"),
        (("--topology=h100:1x8", "--as_is", "--config.training.remat=none"), "DoesNotFit: h100:1"),
        ((), "ValueError: --topology=CHIP:SHAPE and --config=RECIPE are both needed"),
    ],
)
def test_tells_in_one_line(flags, said):
    done = command("plan", "--config=configs/baichuan2_13b.py", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(said), done.stderr
