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
from baichuan_jax.parallel.topology import AXES, MeshShape, Topology

# (remat, offload), from the fastest to the one that needs least memory. Without 'none': what it
# saves beside the products is soon computed again, and XLA hides no gather in its forward loop.
POLICIES = (("matmuls", ""), ("attention", ""), ("full", ""), ("full", "input"))

# Settings that are not to be chosen, by `layout.FIELDS`.
Fixed = dict[str, int | str]

# What of a step another placement can make shorter than that of full layers is.
_BY_PLACEMENT = ("waits for layers", "waits at the ends", "waits once")


def frames(
    job: Job, machine: Topology, assumptions: cost.Assumptions, fixed: Fixed
) -> list[tuple[float, Layout]]:
    """Layouts whose layers are full, with their bounds; those with the lowest bound first."""
    found = []
    for mesh in _meshes(job, machine, fixed):
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
    first, last = np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij")
    keep = first + last <= count
    for name, values in (("zero.replicated_layers", first), ("zero.full_layers", last)):
        if name in fixed:
            keep &= values == fixed[name]
    layers = (first[keep], count - first[keep] - last[keep], last[keep])
    if not layers[0].size:
        return
    # With one micro-batch embedding and head are gathered once, whatever their placement.
    ends = PLACEMENTS if frame.micro_batches > 1 else PLACEMENTS[-1:]
    names = ("zero.embedding", "zero.head")
    choices = ([fixed[name]] if name in fixed else ends for name in names)
    for embedding, head in itertools.product(*choices):
        yield dataclasses.replace(frame, embedding=embedding, layers=layers, head=head)


def refusal(job: Job, layout: Layout) -> str:
    """Why a layout cannot be run on any machine, or nothing."""
    replica, fsdp, tensor = layout.mesh
    if reason := indivisible(job.shape, tensor):
        return reason
    if job.rows % (layout.micro_batches * replica * fsdp):
        return (
            f"config.training.batch_size={job.rows} must be a multiple of"
            f" config.training.micro_batches={layout.micro_batches} × replica={replica} ×"
            f" fsdp={fsdp}."
        )
    return ""


def _meshes(job: Job, machine: Topology, fixed: Fixed) -> Iterator[MeshShape]:
    """Mesh shapes that fit the machine, `tensor` inside its fastest links."""
    devices = machine.num_devices
    for tensor in _divisors(devices):
        if job.shape.num_heads % tensor:
            continue
        for fsdp in _divisors(devices // tensor):
            shape = (devices // tensor // fsdp, fsdp, tensor)
            wanted = (fixed.get(f"mesh.{axis}", -1) for axis in AXES)
            if any(w not in (-1, n) for w, n in zip(wanted, shape, strict=True)):
                continue
            try:
                rings = machine.rings(shape)
            except ValueError:  # it cuts nodes or slices in pieces
                continue
            if all(ring.kind != machine.chip.across.kind for ring in rings[TENSOR_AXIS]):
                yield shape


def _micro_batches(job: Job, mesh: MeshShape, fixed: Fixed) -> list[int]:
    if "training.micro_batches" in fixed:
        return [fixed["training.micro_batches"]]
    rows, left = divmod(job.rows, mesh[0] * mesh[1])
    return [] if left else _divisors(rows)


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


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
