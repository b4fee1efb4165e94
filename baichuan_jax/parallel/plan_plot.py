"""Pictures of plans: memory and time of one, and how a model scales with the machine."""

import pathlib
import re
from collections.abc import Sequence

from baichuan_jax.config import PLACEMENTS
from baichuan_jax.parallel.chips import GIB
from baichuan_jax.parallel.cost import WAITS
from baichuan_jax.parallel.layout import sizes
from baichuan_jax.parallel.memory import KINDS, MOMENTS
from baichuan_jax.parallel.plan import Plan
from baichuan_jax.parallel.topology import AXES, show
from baichuan_jax.parallel.traffic import traffic

_COLORS = ("#4c72b0", "#8da7cf", "#55a868", "#c44e52", "#dd8452", "#8172b3", "#937860", "#b0b0b0")


def _figure(*sizes: int, width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt, plt.subplots(*sizes, figsize=(width, height), constrained_layout=True)


def _save(plt, figure, path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw(plan: Plan, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes `memory.png` and `time.png` into a folder, which is made."""
    return [_memory(plan, folder / "memory.png"), _time(plan, folder / "time.png")]


def _memory(plan: Plan, path: pathlib.Path) -> pathlib.Path:
    """A bar for each moment, by kind, below the device's memory."""
    plt, (figure, axes) = _figure(width=8, height=4.5)
    below = [0.0] * len(MOMENTS)
    for kind, color in zip(KINDS, _COLORS, strict=False):
        values = [float(plan.memory.moments[moment].get(kind, 0.0)) / GIB for moment in MOMENTS]
        if any(values):
            axes.bar(MOMENTS, values, 0.6, bottom=below, color=color, label=kind)
        below = [a + b for a, b in zip(below, values, strict=True)]
    names = [f"{moment}\n{height:.1f}" for moment, height in zip(MOMENTS, below, strict=True)]
    axes.set_xticks(range(len(MOMENTS)), names)
    whole = plan.topology.chip.memory / GIB
    axes.axhline(whole, color="black", label=f"the device's {whole:.1f} GiB")
    axes.axhline(plan.limit / GIB, color="black", linestyle=":", label="what the plan may fill")
    axes.set_ylim(0, 1.15 * max(whole, *below))
    axes.set_ylabel("GiB of one device")
    axes.set_title(f"{_name(plan)}\nmemory at the moments of a step")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(plt, figure, path)


def _time(plan: Plan, path: pathlib.Path) -> pathlib.Path:
    """One layer of each placement, compute above what hides behind it; and a step by its parts."""
    plt, (figure, (left, right)) = _figure(1, 2, width=11, height=4.5)
    step, rows = plan.step, []
    for placement, count in zip(PLACEMENTS, plan.layout.layers, strict=True):
        for when in ("forward", "backward") if count else ():
            rows.append((f"{placement}\n{when} (×{count})", step.phases[placement, when]))
    used = [axis for axis in AXES if plan.topology.rings(plan.layout.mesh)[axis]]
    lines = ["compute", *used]
    height = 0.8 / len(lines)
    for number, (line, color) in enumerate(zip(lines, _COLORS[::2], strict=False)):
        values = [
            1e3 * (phase.compute if line == "compute" else phase.links[line]) for _, phase in rows
        ]
        places = [row + (number - (len(lines) - 1) / 2) * height for row in range(len(rows))]
        left.barh(places, values, height, color=color, label=line)
    left.set_yticks(range(len(rows)), [name for name, _ in rows])
    left.invert_yaxis()
    left.set_xlabel("ms of one layer")
    left.set_title("what runs at one time")
    figure.legend(loc="outside lower left", ncols=len(lines), frameon=False)
    parts = {name: float(value) for name, value in step.parts.items() if value}
    colors = [_COLORS[3 if name in WAITS else 0] for name in parts]
    bars = right.barh(list(parts), list(parts.values()), color=colors)
    total = float(step.seconds)
    right.bar_label(bars, [f"{value / total:.1%}" for value in parts.values()], padding=3)
    right.margins(x=0.15)
    right.invert_yaxis()
    right.set_xlabel("seconds of a step, by what takes them; waits are red")
    right.set_title(f"{total:.3g} s, {plan.flops / 1e12:.0f} TFLOP/s a device, MFU {plan.mfu:.1%}")
    figure.suptitle(_name(plan))
    return _save(plt, figure, path)


def _name(plan: Plan) -> str:
    size = sizes(plan.job.model, (1, 1, 1))
    billions = (size.total("whole", plan.job.shape.num_layers) + size.gains) / 1e9
    return f"{billions:.1f} B parameters on {plan.topology.name}, {show(plan.layout.mesh)}"


def draw_scaling(series: dict[str, Sequence[Plan]], path: pathlib.Path) -> pathlib.Path:
    """Efficiency of weak scaling, and bytes, by number of devices; a line for each model."""
    plt, (figure, (left, right)) = _figure(1, 2, width=10, height=4)
    counts = sorted({plan.topology.num_devices for plans in series.values() for plan in plans})
    for (name, plans), color in zip(series.items(), (_COLORS[0], _COLORS[3]), strict=False):
        devices = [plan.topology.num_devices for plan in plans]
        label = f"{name}, {plans[-1].mfu:.1%} MFU at the end"
        speed = [plan.mfu / plans[0].mfu for plan in plans]
        left.plot(devices, speed, "o-", color=color, label=label)
        received = [sum(traffic(plan.job, plan.layout).values()) / 1e9 for plan in plans]
        right.plot(devices, received, "o-", color=color, label=name)
    left.set_ylim(bottom=0)
    left.set_ylabel("tokens/s a device, of those on the fewest")
    right.set_ylim(bottom=0)
    right.set_ylabel("GB that a device receives in a step")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set_xlabel(f"{plans[0].topology.chip.name} devices, the same tokens on each")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
    return _save(plt, figure, path)


def draw_compared(rows: Sequence, path: pathlib.Path) -> pathlib.Path:
    """The planner's bytes and the compiler's beside each other; `rows` as of `compared`."""
    plt, (figure, axes) = _figure(width=10, height=4.5)
    places = range(len(rows))
    for side, (label, values) in enumerate(
        (
            ("plan", [float(row.plan.memory.peak) / GIB for row in rows]),
            ("compiler", [row.compiler / GIB for row in rows]),
        )
    ):
        at = [place + 0.4 * (side - 0.5) for place in places]
        axes.bar(at, values, 0.4, color=_COLORS[(0, 4)[side]], label=label)
    for place, row in zip(places, rows, strict=True):
        top = max(float(row.plan.memory.peak), row.compiler) / GIB
        axes.annotate(f"{row.error:+.1%}", (place, top), ha="center", va="bottom", fontsize=8)
    names = [f"{row.model}\n" + re.sub("[:,]", "\n", row.plan.topology.name) for row in rows]
    axes.set_xticks(list(places), names, fontsize=8)
    axes.set_ylabel("GiB of one device")
    axes.legend(frameon=False)
    return _save(plt, figure, path)
