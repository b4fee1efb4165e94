"""`experiments.plan` as a user calls it. (Plans of data: tests/data/prepare/test_plan.py.)"""

import os
import re
import subprocess
import sys

import pytest

from baichuan_jax.config import BATCH_AXES
from baichuan_jax.parallel.recipe import check
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
    text = recipe.read_text(encoding="utf-8")
    assert "--topology=h100:128x8" in text
    check(recipe)  # it may be written over
    replica, fsdp = (re.search(rf"config\.mesh\.{axis} = (\d+)", text)[1] for axis in BATCH_AXES)
    run = command(
        "pretrain",
        *(f"--config={recipe}", f"--workdir={tmp_path}/run", "--config.data.sources=README.md"),
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert f"config.mesh.replica={replica} × config.mesh.fsdp={fsdp} × " in run.stderr


def test_topologies():
    done = command("plan", "--topology=list")
    assert done.returncode == 0, done.stderr
    for chip in known():
        assert f"\n{chip.name} " in done.stdout


def test_names_are_fixed_beside_other_settings():
    fix = "--fix=mesh.tensor=1,training.remat=qkv,gate_up,training.micro_batches=128"
    done = command("plan", "--config=configs/baichuan2_7b.py", "--topology=h100:1x8", fix)
    assert done.returncode == 0, done.stderr
    assert "  activations  qkv,gate_up\n" in done.stdout
    assert "  micro-batch  128 a step" in done.stdout


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--topology=h100:1x8", "--fix", "mesh.tensor=1", "stray"), "ValueError: 'stray' is no f"),
        (("--topology=h100:1x8", "--apply=x.txt"), "ValueError: x.txt should end in .py"),
        (
            ("--topology=h100:1x8", "--apply=configs/data.py"),
            "ValueError: configs/data.py is there",
        ),
        (("--topology=h100:1x8", "--plot=README.md"), "ValueError: --plot=README.md is a file"),
        (("--topology=no.json",), "FileNotFoundError: topology no.json: there is no such file"),
        (("--topology=v5e:2x2",), "DoesNotFit: v5e:2x2: a device needs"),
        (("--topology=h100:1x8", "--as_is", "--config.training.remat=none"), "DoesNotFit: h100:1"),
        ((), "ValueError: --topology=CHIP:SHAPE and --config=RECIPE are both needed"),
    ],
)
def test_tells_in_one_line(flags, said):
    done = command("plan", "--config=configs/baichuan2_13b.py", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(said), done.stderr
