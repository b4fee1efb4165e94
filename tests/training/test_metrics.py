"""Metrics that survive kills, peaks of record, one progress line, plots."""

import io
import json
import struct
import types
import warnings

import numpy as np
import pytest

from baichuan_jax.training import metrics
from baichuan_jax.training.metrics import MetricsWriter, Phases, Progress, plot, read_metrics


def steps(workdir, split="train") -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in read_metrics(workdir) if e["split"] == split]


def write(workdir, first: int, last: int, loss: float) -> None:
    with MetricsWriter(workdir) as writer:
        for step in range(first, last + 1):
            writer.write("train", step, 100 * step, {"loss": loss})


def test_writes_one_object_a_line(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write("train", 1, 2_048, {"loss": np.float32(5.5), "learning_rate": 1e-4})
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # already there
        writer.write("eval", 1, 2_048, {"loss": float("inf")})
    entry = json.loads(lines[0])
    assert entry.pop("time") > 1.7e9
    assert entry == {
        "step": 1, "tokens": 2_048, "split": "train", "loss": 5.5, "learning_rate": 1e-4,
    }  # fmt: skip
    assert [e["loss"] for e in read_metrics(tmp_path / "run")] == [5.5, None]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    write(tmp_path, 1, 5, loss=1.0)
    with MetricsWriter(tmp_path) as writer:
        writer.write("eval", 5, 500, {"loss": 9.0})
    write(tmp_path, 3, 4, loss=2.0)
    assert steps(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert steps(tmp_path, "eval") == [(5, 9.0)]


def test_a_line_cut_short_is_left_out_and_not_glued_to_the_next(tmp_path, caplog):
    write(tmp_path, 1, 2, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert steps(tmp_path) == [(1, 1.0)]
    assert f"{path}: its last line was cut short" in caplog.text
    write(tmp_path, 2, 3, loss=2.0)
    assert steps(tmp_path) == [(1, 1.0), (2, 2.0), (3, 2.0)]


@pytest.mark.parametrize("line", ["{", "7", '{"step": 2}'])
def test_a_line_that_is_no_metrics_is_named(tmp_path, line):
    write(tmp_path, 1, 1, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: no line of metrics"):
        read_metrics(tmp_path)


def test_writes_parts_where_nothing_can_be_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_is_object_store", lambda path: True)
    monkeypatch.setattr(metrics, "_PART_SECONDS", -1)  # each line its part
    write(tmp_path, 1, 2, loss=1.0)
    monkeypatch.setattr(metrics, "_PART_SECONDS", 60)
    write(tmp_path, 2, 4, loss=2.0)
    names = [f"metrics-{i:05d}.jsonl" for i in range(3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert steps(tmp_path) == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    write(tmp_path, 1, 2, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, 1, 2, loss=1.5)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, scalars = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("Q", data[:8])  # then its checksum, the event, its checksum
        event = Event.FromString(data[12 : 12 + length])
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    assert scalars == [(1, "train/loss", 1.5), (2, "train/loss", 1.5)]


def device(kind: str, platform: str = "gpu", **attributes):
    return types.SimpleNamespace(device_kind=kind, platform=platform, **attributes)


def test_peaks():
    h100 = device("NVIDIA H100 80GB HBM3", core_count=132)
    assert metrics.peak_flops(h100) == 989e12
    assert metrics.peak_flops(device("TPU v5", "tpu", num_cores=2)) == 459e12
    assert metrics.peak_flops(device("TPU v4", "tpu", num_cores=1)) == 275e12 / 2
    assert metrics.peak_flops(device("TPU v6 lite", "tpu", num_cores=1)) == 918e12
    for unknown in [device("cpu", "cpu"), device("NVIDIA H100 PCIe"), device("TPU v5", "tpu")]:
        assert metrics.peak_flops(unknown) is None
        assert metrics.mfu(1e4, 1e9, [h100, unknown]) is None
    assert metrics.mfu(20_000, 45.17e9, [h100, h100]) == pytest.approx(0.4567, abs=1e-4)


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now.seconds)
    return now


def test_progress_prints_a_line_every_ten_seconds(clock):
    out = io.StringIO()
    with Progress("train", 256, stream=out) as progress:
        for step in range(120, 257):  # resumed: the steps before do not count for the rate
            fields = {"loss": 5.4321 - step / 1e4, "tok/s": 12_345.0, "MFU": None}
            progress.update(step, **fields)
            clock.seconds += 1
    lines = out.getvalue().splitlines()
    assert lines[0] == "train      120/256  loss 5.42  12.3k tok/s"
    assert lines[1] == "train      130/256  loss 5.419  12.3k tok/s  2:06 left"
    assert len(lines) == 1 + 13 + 1
    assert lines[-1] == "train      256/256  loss 5.407  12.3k tok/s  took 2:17"


def test_only_phases_that_take_long_have_a_line(clock, capsys):
    with Phases() as phases:
        for done in range(3):
            phases("quick", done, 2)
            clock.seconds += 0.5
        for done in range(9):
            phases("slow", done, 8)
            clock.seconds += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["slow       3/8", "slow       8/8  1 part/s  took 0:06"]


def test_progress_without_a_total_shows_its_own_rate(clock):
    out = io.StringIO()
    with Progress("pack", unit="documents", stream=out) as progress:
        progress.update(0)
        clock.seconds += 4_000
        progress.update(8_000_000, files="3")
    assert out.getvalue().splitlines() == [
        "pack       0",
        "pack       8,000,000  files 3  2k documents/s",
        "pack       8,000,000  files 3  2k documents/s  took 1:06:40",
    ]


def test_progress_rewrites_its_line_on_a_terminal(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    out = io.StringIO()
    out.isatty = lambda: True
    with Progress("train", 3, stream=out) as progress:
        for step in range(3):
            progress.update(step, loss=1.0, note="more than fits in a line")
            clock.seconds += 1
    *rewritten, end = out.getvalue().split("\r")[1:]
    assert len(rewritten) == 3 and end.endswith("\x1b[K\n")
    assert all(len(line) <= 29 + len("\x1b[K") and "\n" not in line for line in rewritten)


@pytest.mark.parametrize(
    "x, shown",
    [(0.5, "0.5"), (999.4, "999"), (999.6, "1k"), (12_345, "12.3k"), (999_600, "1M"), (2e9, "2G")],
)
def test_counts_have_three_digits(x, shown):
    assert metrics._count(x) == shown


def test_plots_what_there_is(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(20):
            values = {"loss": 9 - step / 4, "learning_rate": 1e-4, "tokens_per_second": 1e4}
            writer.write("train", step, step, values)
        writer.write("eval", 19, 19, {"loss": 5.0})
    with warnings.catch_warnings(action="error"):
        paths = plot(tmp_path)
    assert [p.name for p in paths] == ["loss.png", "learning_rate.png", "tokens_per_second.png"]
    for path in paths:
        assert path.parent == tmp_path / "plots"
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert plot(tmp_path / "nothing") == []
