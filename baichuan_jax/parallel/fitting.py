"""What fits where a job does not: the planner's message."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from baichuan_jax.parallel.chips import GIB, known, slice_shapes
from baichuan_jax.parallel.cost import Assumptions
from baichuan_jax.parallel.layout import Job
from baichuan_jax.parallel.layouts import Fixed, frames
from baichuan_jax.parallel.memory import memory
from baichuan_jax.parallel.topology import Topology

_MOST = 16  # times as many devices are looked at


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
    """Settings that fit: other values of what is fixed, another batch, a larger machine."""
    for name in fixed:
        others = {other: value for other, value in fixed.items() if other != name}
        if found := _fits(job, machine, assumptions, others):
            yield f"{name} left open, with {found}"
    if found := _fits(job, machine, assumptions, {}) if len(fixed) > 1 else "":
        yield f"all left open, with {found}"
    if math.isinf(smallest):
        rows = -(-job.rows // machine.num_devices) * machine.num_devices
        larger = dataclasses.replace(job, rows=rows)
        if found := _fits(larger, machine, assumptions, {}):
            yield f"config.training.batch_size={rows} with {found}"
        return
    for more in _larger(machine):
        if found := _fits(job, more, assumptions, {}):
            yield f"{more.name} with {found}"
            break
    for chip in sorted(known(), key=lambda chip: chip.memory):
        larger = chip.memory > machine.chip.memory and chip.platform == machine.platform
        if not larger or (chip.platform == "tpu" and machine.shape not in slice_shapes(chip)):
            continue
        other = dataclasses.replace(machine, chip=chip)
        if found := _fits(job, other, assumptions, {}):
            yield f"{other.name} with {found}"
            break


def _fits(job: Job, machine: Topology, assumptions: Assumptions, fixed: Fixed) -> str:
    """The fastest settings with full layers that fit, or nothing."""
    limit = machine.chip.memory * assumptions.margin
    usual = {"mesh.replica": machine.granules} | fixed  # rather than another mesh
    for some in (usual, fixed):
        for _, frame in frames(job, machine, assumptions, some):
            if memory(job, frame, machine.platform).peak <= limit:
                shown = frame.settings.items()
                return ", ".join(f"{name}={value}" for name, value in shown if value not in ("", 0))
    return ""


def _larger(machine: Topology) -> Iterator[Topology]:
    """The same chips, ever more of them."""
    if machine.platform == "gpu":
        nodes, gpus = machine.shape
        factors = [2**n for n in range(1, 1 + int(math.log2(_MOST)))]
        whole = [(nodes, 8)] if gpus < 8 else []
        for shape in (*whole, *((nodes * factor, max(gpus, 8)) for factor in factors)):
            yield dataclasses.replace(machine, shape=shape)
        return
    chips = math.prod(machine.shape)
    sizes: dict[int, tuple[int, ...]] = {}
    for shape in sorted(slice_shapes(machine.chip), key=sum):  # the most cubic of a size first
        sizes.setdefault(math.prod(shape), shape)
    for size in sorted(sizes):
        if chips < size <= _MOST * chips and size % chips == 0:
            yield dataclasses.replace(machine, shape=sizes[size])
    for factor in (2, 4):
        yield dataclasses.replace(machine, slices=machine.slices * factor)
