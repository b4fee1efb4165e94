"""The command: on a file of speeds, by the planner, and what it says of a bad one."""

import json
import subprocess
import sys

import pytest

from baichuan_jax.parallel import topology
from baichuan_jax.training import speeds
from configs import baichuan2_13b


def run(*flags):
    command = [sys.executable, "-m", "experiments.simulate_schedule", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_two_jobs_of_a_file(tmp_path):
    by_count = {str(n): 1000 * n for n in range(1, 5)}
    jobs = {"7b": {"speeds": by_count}, "13b": {"speeds": by_count, "weight": 2}}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    plotted = tmp_path / "goodput.png"
    found = run(
        *(f"--jobs={tmp_path / 'jobs.json'}", "--machines=5", "--days=0.5", "--seeds=1"),
        *("--kind=stable", "--kind=spot", f"--out={plotted}"),
    )
    assert found.returncode == 0, found.stderr
    assert "13b, tokens/s by machines: 1: 1,000, 2: 2,000" in found.stdout
    assert "| goodput, % | stable | spot |" in found.stdout
    assert "| the policy | 9" in found.stdout and "| best | 9" in found.stdout
    assert "| given back, % |" in found.stdout and "policies   2/2" in found.stderr
    assert plotted.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["[]", '{"a": {"speeds": {"x": 1}}}', '{"a": 3}', "{}", "{"])
def test_a_bad_file_is_named(tmp_path, text):
    path = tmp_path / "jobs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"jobs\.json (should be|holds no job)"):
        speeds.read(path)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"a": {"speeds": {"1": NaN}}}', "a.speeds.1=nan should be a positive number"),
        ('{"a": {"speeds": {"1": 2, "4": 0}}}', "a.speeds.4=0.0 should be"),
        ('{"a": {"speeds": {"1": 2}, "weight": 0}}', "a.weight=0.0 should be"),
        ('{"a": {"speeds": {"1": 2}, "weight": -1}}', "a.weight=-1.0 should be"),
        ('{"a": {"speeds": {"1": 2}, "weight": Infinity}}', "a.weight=inf should be"),
        ('{"a": {"speeds": {}}}', "a.speeds={} should be of one machine or more"),
        ('{"a": {"speeds": {"0": 2}}}', "a.speeds={0: 2.0} should be of one machine or more"),
    ],
)
def test_figures_that_cannot_be_are_named(tmp_path, text, said):
    path = tmp_path / "jobs.json"
    path.write_text(text)
    with pytest.raises(ValueError) as refusal:
        speeds.read(path)
    assert str(refusal.value).startswith(f"{path}: {said}")


def test_planned_speeds_are_those_of_counts_that_divide_the_batch():
    config = baichuan2_13b.get_config()
    config.training.batch_size = 96
    planned = speeds.planned(config, topology.parse("a800:5x8"))
    assert list(planned) == [1, 2, 3, 4]  # 96 rows are no multiple of 5
    assert planned[4] == pytest.approx(4 * planned[1], rel=0.25)


def test_where_no_count_fits_the_planner_says_why():
    with pytest.raises(ValueError, match=r"a800:1x1: a device needs .* GiB"):
        speeds.planned(baichuan2_13b.get_config(), topology.parse("a800:1x1"))
