"""The command itself: its flags, and that it goes on after kills."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.data.prepare.small import contents, same


def command(*flags):
    return [sys.executable, "-m", "experiments.prepare_data", *map(str, flags)]


def run(*flags):
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=300)


def test_a_misspelt_setting_names_those_that_there_are(tmp_path):
    found = run(f"--workdir={tmp_path}", "--config.documents.treshold=0.8")
    assert found.returncode == 1
    assert found.stderr.startswith("--config.documents.treshold: there is no 'treshold' among thr")


def test_show_prints_the_settings_wherever_config_stands(tmp_path):
    found = run("--config.documents.threshold=0.8", "--show", "--config=configs/data.py")
    assert found.returncode == 0 and '"threshold": 0.8' in found.stdout
    without = run("--config.documents.threshold=0.8", "--show")
    assert without.stdout == found.stdout


def test_no_workdir():
    found = run("--config.sources=embedded:100000")
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("ValueError: --workdir=DIR is missing")


@pytest.mark.slow
def test_goes_on_after_kills_at_any_moment(tmp_path):
    flags = (
        *("--config.sources=embedded:600000", "--config.vocab_size=1500", "--workers=2"),
        *("--config.tokens.sequence_length=128", "--config.ingest.shard_bytes=50000"),
        "--config.tokens.eval_fraction=0.05",
    )
    assert run(f"--workdir={tmp_path / 'whole'}", *flags).returncode == 0
    rng, kills = random.Random(0), 0
    for signal_ in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM) * 5:
        process = subprocess.Popen(
            command(f"--workdir={tmp_path / 'killed'}", *flags), stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(3, 7))
        if process.poll() is None:
            kills += 1
            os.kill(process.pid, signal_)
            process.wait()
    assert kills > 5
    assert run(f"--workdir={tmp_path / 'killed'}", *flags).returncode == 0
    same(contents(tmp_path / "killed"), contents(tmp_path / "whole"))
