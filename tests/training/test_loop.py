"""The loop: it learns, resumes bit for bit, refuses what changed, and stops at NaN."""

import contextlib
import copy
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from baichuan_jax.config import ROPE_SCALING_FIELDS, MeshConfig, to_json
from baichuan_jax.data.stream import Stream
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training import loop
from baichuan_jax.training.metrics import read_metrics
from baichuan_jax.training.pretrain import open_data, pretrain
from baichuan_jax.training.step import pretraining_loss


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The runs here, also those in other processes, are mostly the same program."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def arrays(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def assert_same(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_array_equal(x, y)


def losses(workdir, split="train"):
    return {e["step"]: e["loss"] for e in read_metrics(workdir) if e["split"] == split}


def run_on(config, workdir, shape, loss=None):
    """Trains on a mesh of `shape`, perhaps with another loss, through `loop.train`."""
    workdir.mkdir(exist_ok=True)
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    tokenizer = Tokenizer(config.data.tokenizer)
    manifest = open_data(config.data, tokenizer, workdir)
    streams = [Stream(manifest, split, config.data) for split in ("train", "eval")]
    loss = loss or pretraining_loss(config.model, config.training)
    return loop.train(config, workdir, mesh, loss, *streams, tokenizer.token_bytes)


def test_learns_and_leaves_a_record(config, tmp_path):
    state = run_on(config, tmp_path, (1, 1, 1))
    curve = losses(tmp_path)
    assert list(curve) == list(range(1, 13)) and int(state.step) == 12
    assert curve[12] < curve[1] - 1
    held_out = [entry for entry in read_metrics(tmp_path) if entry["split"] == "eval"]
    assert [entry["step"] for entry in held_out] == [6, 12]
    assert held_out[1]["loss"] < held_out[0]["loss"]
    bits, nats = held_out[1]["bits_per_byte"], held_out[1]["loss"]
    assert bits > 0 and nats / np.log(2) / 30 < bits < nats / np.log(2)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(to_json(config))
    assert list((tmp_path / "tensorboard").glob("*tfevents*"))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["00000004", "00000008", "00000012"]
    assert held_out[0]["tokens"] == 6 * 8 * 32


def test_an_interrupted_run_ends_with_the_same_bits(config, tmp_path):
    """Stopped after 8 of 12 steps; the schedule still aims at 12."""
    whole = run_on(config, tmp_path / "whole", (1, 1, 1))
    part = tmp_path / "part"

    class StopAt8(Exception):
        pass

    inner = pretraining_loss(config.model, config.training)
    original = loop._Recorder.train

    def stop(self, where, results):
        if where.step == 9:
            raise StopAt8
        return original(self, where, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Recorder, "train", stop)
        with pytest.raises(StopAt8):
            run_on(config, part, (1, 1, 1), inner)
    resumed = run_on(config, part, (1, 1, 1))
    assert_same(whole, resumed)
    assert losses(part) == losses(tmp_path / "whole")


def test_goes_on_with_the_same_losses_on_fewer_devices(config, tmp_path):
    config.training.num_steps = 9
    config.checkpoint.every_steps = 3
    run_on(config, tmp_path / "one", (1, 1, 1))
    whole = losses(tmp_path / "one")
    moved = tmp_path / "moved"
    original = loop._sigterm
    for stop, shape in ((3, (2, 2, 2)), (6, (2, 2, 1)), (9, (1, 1, 2))):

        @contextlib.contextmanager
        def sigterm(stop=stop):
            with original():
                yield lambda step: step == stop

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "_sigterm", sigterm)
            run_on(config, moved, shape)
    assert list(losses(moved)) == list(whole)
    np.testing.assert_allclose(list(losses(moved).values()), list(whole.values()), atol=1e-5)


def test_a_damaged_newest_checkpoint_is_passed_over(config, tmp_path, caplog):
    whole = run_on(config, tmp_path, (1, 1, 1))
    newest = tmp_path / "checkpoints" / "00000012"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    with caplog.at_level(logging.INFO):
        again = run_on(config, tmp_path, (1, 1, 1))
    assert f"Not a sound checkpoint: {newest}" in caplog.text
    assert "Resumes at step 8, row 64." in caplog.text
    assert_same(whole, again)


def test_changed_data_is_refused_unless_accepted(config, tmp_path, caplog):
    run_on(config, tmp_path, (1, 1, 1))
    for section, name, value, said in (
        ("data", "seed", 7, "seed: 0 -> 7"),
        ("training", "batch_size", 16, "batch_size: 8 -> 16"),
        ("data", "weights", "chat.zh=3,chat.en=1", "weights chat.zh"),
    ):
        changed = copy.deepcopy(config)
        changed.training.num_steps = 13
        setattr(getattr(changed, section), name, value)
        with pytest.raises(ValueError, match=said) as error:
            run_on(changed, tmp_path, (1, 1, 1))
        assert "accept_changed_data" in str(error.value)
        assert list(losses(tmp_path))[-1] == 12
    changed.checkpoint.accept_changed_data = True
    with caplog.at_level(logging.WARNING):
        run_on(changed, tmp_path, (1, 1, 1))
    assert "New batches from row 96 on" in caplog.text
    assert list(losses(tmp_path))[-1] == 13


def test_another_model_in_the_same_folder_is_refused(config, tmp_path):
    run_on(config, tmp_path, (1, 1, 1))
    config.model.rope_base = 5e5
    with pytest.raises(ValueError, match=r"another model than config.model:\nrope_base: 10000.0"):
        run_on(config, tmp_path, (1, 1, 1))


def test_a_run_from_before_a_field_of_the_model_resumes(config, tmp_path, monkeypatch):
    def older(value, asdict=dataclasses.asdict):
        return {k: v for k, v in asdict(value).items() if k not in ROPE_SCALING_FIELDS}

    config.training.num_steps = 4
    with monkeypatch.context() as patch:
        patch.setattr(loop.dataclasses, "asdict", older)
        run_on(config, tmp_path, (1, 1, 1))
    config.training.num_steps = 5
    assert int(run_on(config, tmp_path, (1, 1, 1)).step) == 5


def test_continued_training_takes_the_weights_alone(config, tmp_path):
    source = run_on(config, tmp_path / "source", (1, 1, 1))
    config.checkpoint.init_from = str(tmp_path / "source")
    config.optimizer.learning_rate = 1e-9
    config.optimizer.final_learning_rate = 0.0
    config.training.num_steps = 3
    continued = run_on(config, tmp_path / "continued", (1, 1, 1))
    assert int(continued.step) == 3 and int(continued.opt_state[0].count) == 3
    pairs = zip(arrays(source.model), arrays(continued.model), strict=True)
    assert all(np.abs(a - b).max() < 1e-6 for a, b in pairs)
    rates = [e["learning_rate"] for e in read_metrics(tmp_path / "continued")[:2]]
    np.testing.assert_allclose(rates, [0.5e-9, 1e-9], rtol=1e-5)  # warm-up anew


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_step_that_is_not_finite_stops_the_run(config, tmp_path, value):
    """Rows 40 to 47 are the batch of step 6; the last good checkpoint is of step 4."""
    plain = pretraining_loss(config.model, config.training)
    manifest = open_data(config.data, Tokenizer(config.data.tokenizer), tmp_path)
    bad_row = Stream(manifest, "train", config.data).rows([43])["tokens_BT"][0]

    def loss(model, batch):
        total, count, sums = plain(model, batch)
        bad = jnp.any(jnp.all(batch["tokens_BT"] == bad_row, axis=1))
        return jnp.where(bad, value, 1.0) * total, count, sums

    with pytest.raises(loop.NonFiniteError) as error:
        run_on(config, tmp_path, (1, 1, 1), loss)
    message = str(error.value)
    assert message.startswith("Step 6: ")
    assert "the loss of the forward pass" in message
    assert "rows 40 to 47" in message and "step 4" in message
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["00000004"]


def test_log_every_thins_the_record_out_and_the_last_step_is_in_it(config, tmp_path):
    config.training.log_every = 5
    run_on(config, tmp_path, (1, 1, 1))
    assert list(losses(tmp_path)) == [5, 10, 12]
    assert list(losses(tmp_path, "eval")) == [6, 12]


def test_profiler_window(config, tmp_path):
    config.training.num_steps = 5
    config.training.profile_start, config.training.profile_steps = 2, 2
    run_on(config, tmp_path, (1, 1, 1))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_keeps_every_so_many_tokens(config, tmp_path):
    config.checkpoint.every_steps, config.checkpoint.keep = 2, 1
    config.checkpoint.keep_every_tokens = 6 * 8 * 32
    run_on(config, tmp_path, (1, 1, 1))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["00000006", "00000012"]


# In a process of its own, to be killed.


def start(config, workdir, *flags, devices=1):
    """`experiments.pretrain` with the config as a recipe beside the run."""
    workdir.mkdir(exist_ok=True)
    (workdir / "config_in.json").write_text(to_json(config))
    recipe = workdir / "recipe.py"
    recipe.write_text(
        "from baichuan_jax.config import from_json\n"
        f"def get_config():\n    return from_json({str(workdir / 'config_in.json')!r})\n"
    )
    command = [sys.executable, "-m", "experiments.pretrain", f"--config={recipe}"]
    simulated = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *flags],
        env=os.environ | {"XLA_FLAGS": simulated, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_done(workdir):
    return max((e["step"] for e in read_metrics(workdir)), default=0)


def interrupt(process, workdir, after, sign):
    """Sends a signal once the run has recorded `after` steps."""
    while process.poll() is None and steps_done(workdir) < after:
        time.sleep(0.02)
    process.send_signal(sign)
    process.wait()
    return process.stderr.read()


def final_arrays(config, workdir):
    """The state of a finished run, read from its last checkpoint."""
    assert steps_done(workdir) == config.training.num_steps
    return run_on(config, workdir, (1, 1, 1))


def killed_run_equals_uninterrupted(config, tmp_path, kills):
    config.training.num_steps = 100 + 15 * kills
    config.training.eval_every = 50
    config.checkpoint.every_steps = 7
    whole = run_on(config, tmp_path / "whole", (1, 1, 1))
    chance = random.Random(kills)
    workdir = tmp_path / "killed"
    for number in range(kills):
        process = start(config, workdir)
        reach = int((number + chance.random()) * (config.training.num_steps - 30) / kills)
        said = interrupt(process, workdir, reach, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL, said
    process = start(config, workdir)
    assert process.wait() == 0, process.stderr.read()
    assert_same(whole, final_arrays(config, workdir))
    assert losses(workdir) == losses(tmp_path / "whole")


def test_two_kills_change_no_bit(config, tmp_path):
    killed_run_equals_uninterrupted(config, tmp_path, 2)


@pytest.mark.slow
def test_twenty_kills_change_no_bit(config, tmp_path):
    killed_run_equals_uninterrupted(config, tmp_path, 20)


def test_sigterm_saves_and_exits_cleanly_and_changes_no_bit(config, tmp_path):
    config.training.num_steps = 300
    config.training.eval_every = config.checkpoint.every_steps = 10_000
    whole = run_on(config, tmp_path / "whole", (1, 1, 1))
    stopped = tmp_path / "stopped"
    process = start(config, stopped)
    said = interrupt(process, stopped, 20, signal.SIGTERM)
    assert process.returncode == 0 and "Traceback" not in said, said
    [name] = [path.name for path in (stopped / "checkpoints").iterdir()]
    assert 20 <= int(name) < 300 and int(name) == steps_done(stopped)
    process = start(config, stopped)
    _, said = process.communicate()
    assert process.returncode == 0 and f"Resumes at step {int(name)}," in said, said
    assert_same(whole, final_arrays(config, stopped))
    assert losses(stopped) == losses(tmp_path / "whole")


def test_unknown_fields_are_refused_with_the_flag_named(config, tmp_path):
    process = start(config, tmp_path, "--config.training.num_stepz=3")
    _, said = process.communicate()
    assert process.returncode != 0 and "num_stepz" in said


def test_errors_of_the_user_are_one_line(config, tmp_path):
    config.data.sources = str(tmp_path / "missing.jsonl")
    process = start(config, tmp_path)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "missing.jsonl" in said and "Traceback" not in said


@pytest.mark.slow
def test_two_processes_train_as_one_does(config, tmp_path):
    config.mesh = MeshConfig(2, 2, 2)
    run_on(config, tmp_path / "one", (2, 2, 2))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    processes = [
        start(config, tmp_path / "two", *cluster, f"--process_id={number}", devices=4)
        for number in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two)
    np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1e-5)


def test_pretrain_is_the_same_run_from_a_config_alone(config, tmp_path):
    config.mesh = MeshConfig(1, 8, 1)
    config.training.num_steps = 4
    config.optimizer.warmup_steps = 2
    pretrain(config, tmp_path / "a")
    run_on(config, tmp_path / "b", (1, 8, 1))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
