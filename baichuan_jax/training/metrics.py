"""What a run tells about itself: metrics file, FLOPs and MFU, progress line, plots.

`metrics.jsonl` in the run's folder is the record, one JSON object a line: `step`,
`tokens` (seen so far), `time` (Unix seconds), `split` ('train' or 'eval') and the values
by name, not finite ones as null. TensorBoard events lie beside it.
"""

import io
import json
import math
import pathlib
import shutil
import sys
import time

import jax
from absl import logging
from etils import epath

from baichuan_jax.parallel import chips

_PART_SECONDS = 60  # between two parts of the metrics on an object store


def quiet_logs() -> None:
    """Shows this package's messages from INFO on, and others' from WARNING on."""
    package = str(pathlib.Path(__file__).parents[1])
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno >= 30 or record.pathname.startswith(package)
    )


class MetricsWriter:
    """Appends metrics to a run's folder. Any process may call it; process 0 writes.

    On an object store, which cannot append, the metrics come in parts
    (`metrics-00000.jsonl`, ...), one a minute, and there are no TensorBoard events.
    """

    def __init__(self, workdir: epath.PathLike):
        self._workdir = epath.Path(workdir).expanduser()
        self._in_parts = _is_object_store(self._workdir)
        self._writes = jax.process_index() == 0
        self._events = None
        self._file = None
        self._lines: list[str] = []  # of the next part
        self._next_part, self._part_began = 0, time.time()
        if not self._writes:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        if self._in_parts:
            parts = _parts(self._workdir)
            self._next_part = int(parts[-1].stem.split("-")[1]) + 1 if parts else 0
        else:
            from tensorboardX import SummaryWriter  # slow to import

            self._file = _open_to_append(self._workdir / "metrics.jsonl")
            self._events = SummaryWriter(str(self._workdir / "tensorboard"), flush_secs=30)

    def write(self, split: str, step: int, tokens: int, values: dict[str, float]) -> None:
        """Records `values` of one step; `split` is 'train' or 'eval'."""
        if not self._writes:
            return
        values = {name: float(value) for name, value in values.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        entry = {"step": int(step), "tokens": int(tokens), "time": time.time(), "split": split}
        self._lines.append(json.dumps(entry | finite) + "\n")
        if not self._in_parts or time.time() - self._part_began > _PART_SECONDS:
            self._flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{split}/{name}", value, step)

    def _flush(self) -> None:
        text = "".join(self._lines)
        if self._file is not None:
            self._file.write(text.encode())
            self._file.flush()
        elif text:
            (self._workdir / f"metrics-{self._next_part:05d}.jsonl").write_text(text)
            self._next_part += 1
        self._lines, self._part_began = [], time.time()

    def close(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(workdir: epath.PathLike) -> list[dict]:
    """The metrics of a run in order; empty without any.

    Where a killed run resumed from an earlier step, what it had written past that step is
    left out. So is a last line that a kill cut short.

    Raises:
      ValueError: names the file and the line that is no JSON object.
    """
    workdir = epath.Path(workdir).expanduser()
    path = workdir / "metrics.jsonl"
    entries: dict[str, list[dict]] = {}
    for file in [path] if path.exists() else _parts(workdir):
        lines = file.read_text().split("\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
                kept = entries.setdefault(entry["split"], [])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{file}:{number}: no line of metrics: {line[:80]!r}.") from error
            while kept and kept[-1]["step"] >= entry["step"]:
                kept.pop()
            kept.append(entry)
        if lines[-1]:
            logging.warning("%s: its last line was cut short and is left out.", file)
    merged = [entry for kept in entries.values() for entry in kept]
    return sorted(merged, key=lambda entry: entry["step"])


def _is_object_store(path: epath.Path) -> bool:
    return "://" in str(path)


def _parts(workdir: epath.Path) -> list[epath.Path]:
    return sorted(workdir.glob("metrics-*.jsonl"))


def _open_to_append(path: epath.Path):
    """The file without a last line that a kill cut short, so that no two lines run together."""
    path.touch()
    file = open(path, "r+b")  # noqa: SIM115 - it stays open as long as the run
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(whole)
    return file


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s, None where it is not known.

    A TPU's device is one core or, on v4 and v5p, usually a chip of two.
    """
    chip = chips.of_kind(device.device_kind)
    cores = getattr(device, "num_cores", None) if device.platform == "tpu" else 1
    return None if chip is None or cores is None else chip.flops / chip.cores * cores


def mfu(tokens_per_second: float, flops_per_token: float, devices: list) -> float | None:
    """The share of all devices' peak that the model's FLOPs make up, None where not known."""
    peaks = [peak_flops(device) for device in devices]
    return None if None in peaks else tokens_per_second * flops_per_token / sum(peaks)


class Progress:
    """One line that tells how far a phase is; a context manager. Process 0 prints.

    On a terminal the line is rewritten; elsewhere a line is printed every ten seconds at
    most, and the last one always.

    Args:
      phase: its name.
      total: how much there is to do; None where that is not known.
      unit: what is counted, for the rate.
      stream: where to print; by default standard error.
    """

    def __init__(self, phase: str, total: int | None = None, *, unit: str = "", stream=None):
        self._phase, self._total, self._unit = phase, total, unit
        self._stream = sys.stderr if stream is None else stream
        self._rewrites = self._stream.isatty()
        self._began = time.monotonic()
        self._printed = -math.inf
        self._first: tuple[float, float] | None = None  # time, done
        self._line = ""

    def update(self, done: float, **fields) -> None:
        """Tells how much is done, with `fields` to show: numbers, strings, None for nothing.

        A field whose name ends in '/s' is shown as the rate instead of the own one.
        """
        now = time.monotonic()
        self._first = self._first or (now, done)  # what was done by then may be of another run
        seconds, since = now - self._first[0], done - self._first[1]
        rate = since / seconds if seconds > 0 and since > 0 else None
        fields = {name: value for name, value in fields.items() if value is not None}
        if rate is not None and not any(name.endswith("/s") for name in fields):
            fields[f"{self._unit}/s"] = rate
        parts = [f"{done:,}" if self._total is None else f"{done:,}/{self._total:,}"]
        parts += [_show(name, value) for name, value in fields.items()]
        self._line = "  ".join([f"{self._phase:<9}", *parts])
        if rate is not None and self._total is not None and done < self._total:
            left = f"{_duration((self._total - done) / rate)} left"
            self._print(f"{self._line}  {left}", now)
        else:
            self._print(self._line, now)

    def _print(self, line: str, now: float, last: bool = False) -> None:
        too_soon = now - self._printed < (0.1 if self._rewrites else 10)
        if jax.process_index() or (too_soon and not last):
            return
        self._printed = now
        if self._rewrites:
            line = line[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"\r{line}\x1b[K" + ("\n" if last else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Prints the last line, with the time the phase took."""
        now = time.monotonic()
        line = self._line or f"{self._phase:<9}"
        self._print(f"{line}  took {_duration(now - self._began)}", now, last=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Phases:
    """A progress line for each phase that takes long; a context manager, called as it goes on."""

    PATIENCE = 2.0  # seconds without a line

    def __init__(self):
        self._name: str | None = None
        self._began = 0.0
        self._line: Progress | None = None

    def __enter__(self) -> "Phases":
        return self

    def __exit__(self, *_) -> None:
        if self._line:
            self._line.close()
            self._line = None

    def __call__(self, name: str, done: int, total: int) -> None:
        """Tells how much of a phase is done; another name ends the phase before."""
        if name != self._name:
            self.__exit__()
            self._name, self._began = name, time.monotonic()
        if not self._line and time.monotonic() - self._began > self.PATIENCE:
            self._line = Progress(name, total, unit="part")
        if self._line:
            self._line.update(done)


def _count(x: float) -> str:
    """12345 → '12.3k'."""
    for size, letter in [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")]:
        if x >= 0.9995 * size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"


def _duration(seconds: float) -> str:
    """133 → '2:13'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _show(name: str, value: float | str) -> str:
    if name.endswith("/s"):
        return f"{_count(value)} {name}" if name != "/s" else f"{_count(value)}/s"
    return f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}"


_PLOTS = {  # file: its metric, the axis, and what the lines are called by split
    "loss": ("loss", "loss (nats per token)", {"train": "training", "eval": "held out"}),
    "learning_rate": ("learning_rate", "learning rate", {"train": ""}),
    "gradient_norm": ("gradient_norm", "gradient norm before clipping", {"train": ""}),
    "tokens_per_second": ("tokens_per_second", "tokens per second", {"train": ""}),
}


def plot(workdir: epath.PathLike) -> list[epath.Path]:
    """Draws `plots/*.png` from the metrics; returns those for which there were any."""
    from matplotlib.figure import Figure

    entries, paths = read_metrics(workdir), []
    folder = epath.Path(workdir).expanduser() / "plots"
    for name, (metric, label, lines) in _PLOTS.items():
        figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
        axes = figure.subplots()
        for split, title in lines.items():
            drawn = [e for e in entries if e["split"] == split and e.get(metric) is not None]
            if drawn:
                marker = "o" if split == "eval" or len(drawn) == 1 else ""
                x, y = [e["step"] for e in drawn], [e[metric] for e in drawn]
                axes.plot(x, y, label=title, marker=marker, markersize=4, linewidth=1.4)
        if not axes.lines:
            continue
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
        if metric == "learning_rate":
            axes.ticklabel_format(axis="y", scilimits=(-2, 2))
        if metric == "tokens_per_second":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda y, _: _count(y))
        image = io.BytesIO()
        figure.savefig(image, format="png")
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(image.getvalue())
    return paths
