"""What fits where a job does not: the planner's message."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from baichuan_jax.parallel.chips import GIB, known, slice_shapes
from baichuan_jax.parallel.cost import Assumptions
from baichuan_jax.parallel.layout import Job, sizes
from baichuan_jax.parallel.layouts import Fixed, frames, meshes
from baichuan_jax.parallel.memory import memory
from baichuan_jax.parallel.topology import AXES, Topology

_MOST = 1_024  # times as many devices are looked at


def check_mesh(job: Job, machine: Topology, fixed: Fixed) -> None:
    """Refuses sizes of mesh axes that no mesh of the machine has.

    Raises:
      ValueError: names one of them, and what it may be beside the others.
    """
    names = [f"mesh.{axis}" for axis in AXES]
    given = {name: fixed[name] for name in names if name in fixed}
    if next(meshes(job, machine, given), None):
        return
    for name, value in given.items():
        others = {other: size for other, size in given.items() if other != name}
        can = {shape[names.index(name)] for shape in meshes(job, machine, others)}
        if can:
            near = sorted(can, key=lambda size: abs(math.log2(max(value, 0.5) / size)))[:4]
            beside = " and ".join(f"{other}={size}" for other, size in others.items())
            raise ValueError(
                f"{name}={value} goes with no mesh of {machine.name}"
                + (f" with {beside}" if beside else "")
                + f"; the nearest that do are {', '.join(map(str, sorted(near)))}. It must divide"
                f" the {machine.num_devices:,} devices, as whole nodes or slices or parts of one;"
                " tensor lies inside one and divides the model's heads and widths."
            )
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    raise ValueError(f"{shown}: no mesh of {machine.name} has two of them; leave one out.")


def nearest(
    job: Job, machine: Topology, assumptions: Assumptions, fixed: Fixed, smallest: float
) -> str:
    """How far off it is, and the nearest settings that fit.

    Args:
      smallest: bytes of the smallest layout that was looked at; infinite where no mesh divides the
        batch.
    """
    limit = machine.chip.memory * assumptions.margin
    if math.isinf(smallest):
        said = (
            f"{machine.name}: no mesh of {machine.num_devices:,} devices divides"
            f" config.training.batch_size={job.rows:,} rows"
        )
    else:
        said = (
            f"{machine.name}: a device needs {smallest / GIB:.1f} GiB and may be filled to"
            f" {limit / GIB:.1f} GiB"
        )
    if fixed:
        said += f" (with {', '.join(f'{name}={value}' for name, value in fixed.items())})"
    found = list(itertools.islice(_others(job, machine, assumptions, fixed, smallest), 3))
    return f"{said}. " + (f"What fits: {'; '.join(found)}." if found else "Nothing near it fits.")


def _others(
    job: Job, machine: Topology, assumptions: Assumptions, fixed: Fixed, smallest: float
) -> Iterator[str]:
    """Settings that fit: other values of what is fixed, another batch, another machine."""
    if not fixed and (found := _fits(job, machine, assumptions, {})):  # a layout was given
        yield f"{machine.name} itself with {found}"
        return
    for name in fixed:
        others = {other: value for other, value in fixed.items() if other != name}
        if found := _fits(job, machine, assumptions, others):
            yield f"{name} left open, with {found}"
    if found := _fits(job, machine, assumptions, {}) if len(fixed) > 1 else "":
        yield f"all left open, with {found}"
    divides = not math.isinf(smallest)
    if not divides and (rows := _rows(job, machine)) != job.rows:
        larger = dataclasses.replace(job, rows=rows)
        if found := _fits(larger, machine, assumptions, {}):
            yield f"config.training.batch_size={rows} with {found}"
    for other in _of_another_size(machine, fewer=not divides):
        if found := _fits(job, other, assumptions, {}):
            yield f"{other.name} with {found}"
            break
    for chip in sorted(known(), key=lambda chip: chip.memory) if divides else ():
        larger = chip.memory > machine.chip.memory and chip.platform == machine.platform
        if not larger or (chip.platform == "tpu" and machine.shape not in slice_shapes(chip)):
            continue
        other = dataclasses.replace(machine, chip=chip)
        if found := _fits(job, other, assumptions, {}):
            yield f"{other.name} with {found}"
            break


def _rows(job: Job, machine: Topology) -> int:
    """The nearest batch that all devices divide."""
    return max(1, round(job.rows / machine.num_devices)) * machine.num_devices


def _fits(job: Job, machine: Topology, assumptions: Assumptions, fixed: Fixed) -> str:
    """The fastest settings with full layers that fit, or nothing."""
    limit = machine.chip.memory * assumptions.margin
    parameters = sizes(job.model, (1, 1, 1)).total("whole", job.shape.num_layers)
    if 12 * parameters / machine.num_devices > limit:  # weights and moments alone
        return ""
    usual = {"mesh.replica": machine.granules} | fixed  # rather than another mesh
    for some in (usual, fixed):
        for _, frame in frames(job, machine, assumptions, some):
            if memory(job, frame, machine.chip).peak <= limit:
                shown = frame.settings.items()
                return ", ".join(f"{name}={value}" for name, value in shown if value not in ("", 0))
    return ""


def _of_another_size(machine: Topology, fewer: bool) -> list[Topology]:
    """The same chips, more of them or, where that is asked for, fewer; the nearest counts first.

    Counts are powers of two and the machine's own times these; nodes of GPUs have eight, or fewer
    where there is one.
    """
    powers = [2**n for n in range(1 + int(math.log2(_MOST)))]
    if machine.platform == "gpu":
        nodes, gpus = machine.shape
        counts = sorted({*powers, *(nodes * power for power in powers)})
        shapes = [(1, power) for power in powers if power < 8]
        shapes += [(count, max(gpus, 8)) for count in counts]
        near = [dataclasses.replace(machine, shape=shape) for shape in shapes]
    else:
        chips, by_size = math.prod(machine.shape), {}
        for shape in sorted(slice_shapes(machine.chip), key=sum):  # the most cubic of a size first
            by_size.setdefault(math.prod(shape), shape)
        counts = {*powers, *(chips * power for power in powers)} & by_size.keys()
        near = [dataclasses.replace(machine, shape=by_size[count]) for count in sorted(counts)]
        near += [dataclasses.replace(machine, slices=machine.slices * n) for n in (2, 4)]

    def far(other: Topology) -> float:
        return abs(math.log2(other.num_devices / machine.num_devices))

    devices = machine.num_devices
    wanted = [m for m in near if m.num_devices > devices or (fewer and m.num_devices < devices)]
    return [m for m in sorted(wanted, key=far) if m.num_devices <= _MOST * devices]
