"""All layouts of a job on a machine, for the planner to look at.

They come in frames: everything but the placement of weights, with a bound of seconds that no
placement of the frame can be faster than.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from baichuan_jax.config import PLACEMENTS, TENSOR_AXIS, listed, saved_names
from baichuan_jax.parallel import cost
from baichuan_jax.parallel.layout import Job, Layout
from baichuan_jax.parallel.mesh import indivisible
from baichuan_jax.parallel.topology import AXES, MeshShape, Topology, divisors, split

# (remat, offload), from the fastest to the one that needs least memory. Without 'none': what it
# saves beside the products is soon computed again, and XLA hides no gather in its forward loop.
POLICIES = (("matmuls", ""), ("attention", ""), ("full", ""), ("full", "input"))

# Settings that are not to be chosen, by `layout.FIELDS`.
Fixed = dict[str, int | str]

# Counts of layers in one placement that are looked at: all up to so many layers, as evenly spread
# ones of more.
_MOST_COUNTS = 128

# What of a step another placement can make shorter than that of full layers is.
_BY_PLACEMENT = ("waits for layers", "waits at the ends", "waits once")


def frames(
    job: Job, machine: Topology, assumptions: cost.Assumptions, fixed: Fixed
) -> list[tuple[float, Layout]]:
    """Layouts whose layers are full, with their bounds; those with the lowest bound first."""
    found = []
    for mesh in meshes(job, machine, fixed):
        for count in _micro_batches(job, mesh, fixed):
            for remat, offload in _policies(fixed):
                layers = (0, 0, job.shape.num_layers)
                frame = Layout(mesh, count, remat, offload, "full", layers, "full")
                if not refusal(job, frame):
                    parts = cost.step(job, frame, machine, assumptions).parts
                    bound = sum(s for name, s in parts.items() if name not in _BY_PLACEMENT)
                    found.append((float(bound), frame))
    return sorted(found, key=lambda pair: pair[0])


def placements(job: Job, frame: Layout, fixed: Fixed) -> Iterator[Layout]:
    """The frame with every placement: all counts of layers in one layout of arrays."""
    count = job.shape.num_layers
    some = np.append(np.arange(0, count, -(-count // _MOST_COUNTS)), count)
    names = ("zero.replicated_layers", "zero.full_layers")
    first, last = np.meshgrid(*(fixed.get(name, some) for name in names), indexing="ij")
    if names[1] in fixed:  # what is too many is cut to what the other leaves
        first = np.minimum(first, count - last)
    else:
        last = np.minimum(last, count - first)
    first, last = np.unique([first.ravel(), last.ravel()], axis=1)
    layers = (first, count - first - last, last)
    # With one micro-batch embedding and head are gathered once, whatever their placement.
    ends = PLACEMENTS if frame.micro_batches > 1 else PLACEMENTS[-1:]
    choices = ([fixed[name]] if name in fixed else ends for name in ("zero.embedding", "zero.head"))
    for embedding, head in itertools.product(*choices):
        yield dataclasses.replace(frame, embedding=embedding, layers=layers, head=head)


def refusal(job: Job, layout: Layout) -> str:
    """Why a layout cannot be run on any machine, or nothing."""
    replica, fsdp, tensor = layout.mesh
    if reason := indivisible(job.shape, tensor):
        return reason
    count, shards = layout.micro_batches, replica * fsdp
    if job.rows % (count * shards):
        rows = -(-job.rows // (count * shards)) * count * shards
        fewer = [n for n in divisors(job.rows // shards) if n < count] * (not job.rows % shards)
        return (
            f"config.training.batch_size={job.rows} must be a multiple of"
            f" config.training.micro_batches={count} × replica={replica} × fsdp={fsdp}; the nearest"
            " that fit: "
            + (f"micro_batches={fewer[-1]}, or " if fewer else "")
            + f"batch_size={rows}. `python -m experiments.plan --apply=FILE.py` writes a recipe for"
            " a machine."
        )
    return ""


def meshes(job: Job, machine: Topology, fixed: Fixed) -> Iterator[MeshShape]:
    """Mesh shapes that fit model and machine, `tensor` inside a node or slice."""
    devices = machine.num_devices
    for tensor in divisors(devices):
        if indivisible(job.shape, tensor):
            continue
        for fsdp in divisors(devices // tensor):
            shape = (devices // tensor // fsdp, fsdp, tensor)
            if any(fixed.get(f"mesh.{axis}", n) != n for axis, n in zip(AXES, shape, strict=True)):
                continue
            try:
                _, crossing = split(shape, machine.granules)
                machine.rings(shape)
            except (ValueError, TypeError):  # it cuts nodes or slices, or JAX finds no place for it
                continue
            if crossing[AXES.index(TENSOR_AXIS)] == 1:
                yield shape


def _micro_batches(job: Job, mesh: MeshShape, fixed: Fixed) -> list[int]:
    if "training.micro_batches" in fixed:
        return [fixed["training.micro_batches"]]
    rows, left = divmod(job.rows, mesh[0] * mesh[1])
    return [] if left else divisors(rows)


def _policies(fixed: Fixed) -> list[tuple[str, str]]:
    """POLICIES, or the fixed one with each other half that goes with it."""
    found = {}
    for remat, offload in POLICIES:
        remat = fixed.get("training.remat", remat)
        offload = fixed.get("training.offload", offload)
        saved = saved_names(remat)
        if not offload or (saved is not None and set(listed(offload)) <= {"input", *saved}):
            found[remat, offload] = None
    return list(found)
