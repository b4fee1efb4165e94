"""Weak scaling as the planner predicts it: ever more devices, the same work for each."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence

from baichuan_jax.config import Config
from baichuan_jax.parallel import cost, plan, plan_plot
from baichuan_jax.parallel.chips import GIB, known, slice_shapes
from baichuan_jax.parallel.layout import Job
from baichuan_jax.parallel.topology import Topology, parse
from baichuan_jax.parallel.traffic import traffic

DEVICES = (8, 16, 32, 64, 128, 256, 512, 1_024)


def machine(chip: str, devices: int) -> Topology:
    """So many devices of a kind: nodes of eight GPUs, or the slice or slices nearest to a cube.

    Raises:
      ValueError: there is no such chip, or it does not come in so many devices; says why.
    """
    found = next((one for one in known() if one.name == chip), None)
    if found is None:
        raise ValueError(f"chip={chip!r} must be one of {', '.join(c.name for c in known())}.")
    if found.platform == "gpu":
        if devices > 8 and devices % 8:
            raise ValueError(f"{devices} × {chip} are no whole nodes of 8.")
        return parse(f"{chip}:{-(-devices // 8)}x{min(devices, 8)}")
    for slices in (1, 2, 4, 8):
        each = devices / slices / found.per_chip
        shapes = [shape for shape in slice_shapes(found) if math.prod(shape) == each]
        if shapes:
            return Topology(found, min(shapes, key=sum), slices)
    raise ValueError(f"{chip} does not come in {devices} devices.")


def plans(config: Config, chip: str, devices: Sequence[int] = DEVICES) -> list[plan.Plan]:
    """The plan for each number of devices that the model fits on; the config's batch is that of
    the largest, and smaller ones have as many rows for each device."""
    job, found = Job.of(config), []
    for count in devices:
        rows = max(1, job.rows * count // max(devices))
        there = machine(chip, count)
        try:
            some = dataclasses.replace(job, rows=rows)
            found.append(plan.search(some, there, cost.Assumptions.of(there.chip)))
        except plan.DoesNotFit:
            continue
    if not found:
        raise ValueError(f"The model fits on none of {', '.join(map(str, devices))} × {chip}.")
    return found


def report(recipes: dict[str, Config], chip: str, plot: str = "") -> Iterator[str]:
    """Tables of recipes by name, line by line, and a picture, FILE.png, if one is asked for."""
    found = {name: plans(config, chip) for name, config in recipes.items()}
    for name, some in found.items():
        yield from lines(name, some)
    if plot:
        yield f"Picture: {plan_plot.draw_scaling(found, pathlib.Path(plot))}"


def lines(name: str, found: list[plan.Plan]) -> Iterator[str]:
    """A table: a row for each machine."""
    yield (
        f"{name}: {found[0].job.tokens // found[0].topology.num_devices:,} tokens a device and step"
    )
    yield (
        f"  {'machine':18}{'mesh':>13}{'remat':>11}{'layers':>11}{'GiB':>7}"
        f"{'GB received':>13}{'waits':>7}{'s a step':>10}{'TFLOP/s':>9}{'MFU':>7}{'efficiency':>12}"
    )
    for one in found:
        layout = one.layout
        received = sum(traffic(one.job, layout).values()) / 1e9
        waits = float(one.step.exposed) / float(one.step.seconds)
        yield (
            f"  {one.topology.name:18}{'×'.join(map(str, layout.mesh)):>13}{layout.remat:>11}"
            f"{'+'.join(map(str, layout.layers)):>11}{float(one.memory.peak) / GIB:7.1f}"
            f"{received:13.1f}{waits:7.1%}{float(one.step.seconds):10.3f}{one.flops / 1e12:9.0f}"
            f"{one.mfu:7.1%}{one.mfu / found[0].mfu:12.1%}"
        )
    yield (
        "  layers: replicated + hierarchical + full; GB of one device and step; efficiency: MFU by"
        f" that on {found[0].topology.num_devices:,},"
    )
    yield "  the fewest that it fits on; above 100 % where memory leaves these only a slow layout"
