"""Collectives of a training step, and the bytes that each device receives in them (paper §2.7).

By the formulas of `zero.py`'s gathers and reductions, and of tensor parallelism with activations
that are split in time between products. The compiled NVIDIA programs move the same
(`training/ahead.py`), or less in one case: of a single full layer whose gradients several devices
keep alike (`Matrix.copies`), XLA sums those of all micro-batches before it reduces them.
"""

import dataclasses

from baichuan_jax.config import PLACEMENTS, saved_names
from baichuan_jax.parallel.layout import Job, Layout, Matrix, sizes
from baichuan_jax.parallel.topology import AXES


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One kind of collective.

    Attributes:
      when: 'before' or 'after' the micro-batches, once in a step, or in the 'forward' or 'backward'
        pass of each.
      what: 'weights', 'gradients' or 'activations'.
      axis: of the mesh.
      kind: as XLA calls it.
      bytes: that each device receives in one.
    """

    when: str
    what: str
    axis: str
    kind: str
    bytes: float


def _gathers(matrix: Matrix, job: Job, when_replica: str, when_fsdp: str) -> list[Transfer]:
    """Both stages of bringing a matrix from where it is stored."""
    stages = ((matrix.stored, matrix.shard), (matrix.shard, matrix.whole))
    return [
        Transfer(when, "weights", axis, "all-gather", (end - start) * job.compute)
        for axis, when, (start, end) in zip(AXES, (when_replica, when_fsdp), stages, strict=False)
        if when and end > start
    ]


def _reductions(matrix: Matrix, job: Job, when_replica: str, when_fsdp: str) -> list[Transfer]:
    """Both stages of taking its gradient back, over copies where a dimension did not divide."""
    found = []
    stages = ((matrix.stored, matrix.shard), (matrix.shard, matrix.whole))
    for place, (end, start) in enumerate(stages):
        axis, when, copies = AXES[place], (when_replica, when_fsdp)[place], matrix.copies[place]
        if start > end:
            size = (start - end) * job.gradient
            found.append(Transfer(when, "gradients", axis, "reduce-scatter", size))
        elif copies > 1:
            size = 2 * (copies - 1) / copies * end * job.gradient
            found.append(Transfer(when, "gradients", axis, "all-reduce", size))
    return found


def transfers(matrix: Matrix, job: Job, placement: str, micro_batches: int, again: bool):
    """The collectives of one matrix and its gradient.

    Args:
      again: whether the backward pass needs it again, as layers do and embedding and head do not.
    """
    held = PLACEMENTS[::-1].index(placement)  # stages that are gathered once: 0, 1, 2
    if micro_batches == 1:
        back = ("backward" if held < 1 else "", "backward" if held < 2 else "")
        return [
            *_gathers(matrix, job, "forward", "forward"),
            *(_gathers(matrix, job, *back) if again else ()),
            *_reductions(matrix, job, "backward", "backward"),
        ]
    first = ("forward" if held < 1 else "before", "forward" if held < 2 else "before")
    back = ("backward" if held < 1 else "", "backward" if held < 2 else "")
    last = ("backward" if held < 1 else "after", "backward" if held < 2 else "after")
    return [
        *_gathers(matrix, job, *first),
        *(_gathers(matrix, job, *back) if again else ()),
        *_reductions(matrix, job, *last),
    ]


def layer_activations(job: Job, layout: Layout) -> list[Transfer]:
    """What tensor parallelism sends inside one layer, in one micro-batch."""
    tensor = layout.mesh[2]
    if tensor == 1:
        return []
    size = layout.tokens(job) * job.shape.hidden_size * job.compute * (tensor - 1) / tensor
    saved = saved_names(layout.remat)
    again = [] if saved is None or "attention_out" in saved else ["reduce-scatter"]
    both = ("all-gather", "reduce-scatter") * 2  # before qkv and gate_up; after out and down
    kinds = {
        "forward": both,
        "backward": (*both, "all-gather", "all-gather", *again),  # with the forward pass again
    }
    return [
        Transfer(when, "activations", AXES[2], kind, size)
        for when, several in kinds.items()
        for kind in several
    ]


def end_activations(job: Job, layout: Layout) -> list[Transfer]:
    """What it sends beside the layers, at the embedding and in the loss."""
    tensor = layout.mesh[2]
    if tensor == 1:
        return []
    size = layout.tokens(job) * job.shape.hidden_size * job.compute * (tensor - 1) / tensor
    axis, what = AXES[2], "activations"
    return [
        Transfer("forward", what, axis, "all-to-all", size / tensor),  # D is split, then T
        Transfer("forward", what, axis, "all-gather", size),
        # Gradients by the hidden states are summed in float32.
        Transfer("forward", what, axis, "all-reduce", 2 * size * 4 / job.compute),
        Transfer("backward", what, axis, "all-to-all", size / tensor),
    ]


def traffic(job: Job, layout: Layout) -> dict[tuple[str, str, str], float]:
    """Bytes that each device receives in a step, by (what, axis, kind of collective).

    Left out are single numbers, norm gains' gradients, and each token's few sums in the loss.
    """
    found: dict[tuple[str, str, str], float] = {}
    rounds = {"before": 1, "after": 1, "forward": layout.micro_batches}
    rounds["backward"] = layout.micro_batches

    def add(transfers_: list[Transfer], times: int = 1) -> None:
        for one in transfers_:
            key = (one.what, one.axis, one.kind)
            found[key] = found.get(key, 0.0) + one.bytes * rounds[one.when] * times

    size, K = sizes(job.model, layout.mesh), layout.micro_batches
    add(transfers(size.embedding, job, layout.embedding, K, again=False))
    add(transfers(size.head, job, layout.head, K, again=False))
    for placement, count in zip(PLACEMENTS, layout.layers, strict=True):
        for matrix in size.layer.values():
            add(transfers(matrix, job, placement, K, again=True), int(count))
    add(layer_activations(job, layout), sum(map(int, layout.layers)))
    add(end_activations(job, layout))
    return found
