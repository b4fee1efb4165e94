"""What a training step takes on a machine: seconds, and what hides behind what.

Nothing is measured here: FLOPs and bytes (`traffic.py`) by the rates that `Assumptions` names. A
collective over several levels of links is as slow as its slowest level, for they work at one time,
plus the latency of a ring's hops, or of a tree's where these are fewer.

Inside the loops over layers the gathers of the next layer, and the scatters of the one before, run
behind the compute of a layer, and on the links of all mesh axes at one time: a layer takes as long
as the longest of these. What a tensor-parallel layer sends within itself, nothing hides. Nor does
anything hide what comes first or last in a pass, or the gathers and reductions that stand outside
the loop over micro-batches. The head's hide behind what the layers leave free.

Weights that are held between layers are not free either: XLA copies each layer's into a stack and
out again, or out of one in both passes. A gather that hides costs less than that.
"""

import dataclasses
import math

import numpy as np

from baichuan_jax.config import PLACEMENTS, ModelConfig, listed, saved_names
from baichuan_jax.parallel.chips import Chip
from baichuan_jax.parallel.layout import Job, Layout, sizes
from baichuan_jax.parallel.topology import AXES, Ring, Topology
from baichuan_jax.parallel.traffic import Transfer, end_activations, layer_activations, transfers

# Share of the peak in matrix products: such that the plan with kernels for attention
# (logit_bytes=0) reaches the best MFU, by `flops_per_token`, published for training models of this
# size in bfloat16. That is, for A100 61.7 % (llm-foundry, MPT-7B), for H100 52.8 % (NVIDIA
# dgxc-benchmarking, Llama 3.1 8B), for H200 51.1 % with all computed again (KempnerForge, 8B), and
# by MaxText for v4 56.7 % (22B), v5e 61.1 % (16B), v5p 71.5 % (32B), v6e 41 % (8B), v7x 52 % (70B).
# For B200 nothing was found: as H100.
_PRODUCTS = {
    "a100": 0.72,
    "a800": 0.72,
    "h100": 0.64,
    "h200": 0.73,
    "b200": 0.64,
    "v4": 0.64,
    "v5e": 0.82,
    "v5p": 0.81,
    "v6e": 0.53,
    "v7x": 0.60,
}


def _assumed(value, meaning: str):
    return dataclasses.field(default=value, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What the plan takes for granted about hardware and compiler."""

    products: float = _assumed(0.65, "of the peak, in matrix products; by chip")
    attention: float = _assumed(0.50, "of the peak, in attention's products")
    logit_bytes: float = _assumed(0.0, "a logit of attention forward, twice backward; by chip")
    loss_bytes: float = _assumed(24.0, "a logit of the loss, between its products")
    memory: float = _assumed(0.85, "of the memory's bandwidth")
    links: float = _assumed(0.80, "of the bandwidth of all links")
    host: float = _assumed(25e9, "bytes/s between device and host, for offloaded activations")
    margin: float = _assumed(0.95, "of the device's memory that the plan may fill")

    @classmethod
    def of(cls, chip: Chip, **changes: float) -> "Assumptions":
        """Those of a chip, some of them changed.

        Raises:
          ValueError: names one that there is not, or a value that cannot be.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"{name!r} is not assumed; there are {', '.join(known)}.")
            share = known[name].default <= 1 and name != "logit_bytes"
            least = 0 if name in ("logit_bytes", "loss_bytes") else 1e-9
            if not least <= value <= (1 if share else math.inf):
                raise ValueError(
                    f"{name}={value} should be {'above 0, and at most 1' if share else 'positive'}."
                )
        by_chip = cls(
            products=_PRODUCTS.get(chip.name, 0.65),
            logit_bytes=0.0 if chip.fused_attention else 16.0,
        )
        return dataclasses.replace(by_chip, **changes)


def seconds(received: float, rings: tuple[Ring, ...], assumptions: Assumptions) -> float:
    """Of a gather or scatter over one mesh axis in which each device receives so many bytes."""
    devices = math.prod(ring.size for ring in rings)
    if devices == 1 or not received:
        return 0.0
    left, slowest, latency = received * devices / (devices - 1), 0.0, 0.0
    for ring in rings:
        moved = left * (ring.size - 1) / ring.size
        slowest = max(slowest, moved / (ring.bandwidth * assumptions.links))
        left /= ring.size
        latency += min(ring.size - 1, 2 * math.log2(ring.size)) * ring.latency
    return slowest + latency


@dataclasses.dataclass(frozen=True)
class Compute:
    """Seconds of one micro-batch on one device.

    Attributes:
      forward, backward: of one layer; `backward` without what is computed again.
      again: of one layer, for what rematerialisation has not saved.
      loss: of both passes.
      offload: of one layer, to bring offloaded activations to the host; as much again back.
    """

    forward: float
    backward: float
    again: float
    loss: float
    offload: float


def compute(job: Job, layout: Layout, chip: Chip, assumptions: Assumptions) -> Compute:
    """Seconds of the layers and the loss by FLOPs and by bytes of memory."""
    model, n, tensor = job.shape, layout.tokens(job), layout.mesh[2]
    D, F, T = model.hidden_size, model.intermediate_size, job.time
    product = 2 * n / tensor / (chip.flops * assumptions.products)  # a parameter
    traffic_ = n / tensor / (chip.bandwidth * assumptions.memory)  # a byte of each token
    products = {"qkv": 3 * D * D, "attention_out": D * D, "gate_up": 2 * D * F, "down": D * F}
    # Two products forward, five backward, of T / 2 keys; elementwise work on each logit between.
    attended = 2 * T * D * n / tensor / (chip.flops * assumptions.attention)
    logits = T / 2 * model.num_heads * assumptions.logit_bytes * traffic_
    # Read and written beside products: norms, residuals, rotation, gating; twice as much backward.
    elementwise = (14 * D + 3 * F) * job.compute * traffic_
    attention = attended + logits
    forward = sum(products.values()) * product + attention + elementwise
    backward = 2 * sum(products.values()) * product + 2.5 * attended + 2 * logits + 2 * elementwise
    saved = saved_names(layout.remat)
    again = 0.0
    if saved is not None:
        missing = [name for name in products if name not in (*saved, "down")]
        again = sum(products[name] for name in missing) * product + elementwise
        again += 0.0 if "attention" in saved else attention
    V = model.padded_vocab_size
    loss = 3 * V * D * product + V * assumptions.loss_bytes * traffic_
    moved = sum(n / tensor * job.activation(name) for name in listed(layout.offload))
    return Compute(forward, backward, again, loss, moved / assumptions.host)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One pass over the layers of one placement, for one layer: what runs, and what waits.

    Attributes:
      compute: seconds.
      hidden: seconds of collectives that may run behind it, by mesh axis.
      inline: seconds of collectives inside the layer, which nothing hides.
    """

    compute: float
    hidden: dict[str, float]
    inline: float

    @property
    def links(self) -> dict[str, float]:
        """Seconds of all of its collectives by mesh axis."""
        return self.hidden | {AXES[2]: self.hidden.get(AXES[2], 0.0) + self.inline}

    @property
    def exposed(self) -> float:
        """Seconds by which the collectives are longer than the compute that hides them."""
        return max(0.0, max(self.hidden.values(), default=0.0) - self.compute)

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.inline


@dataclasses.dataclass(frozen=True)
class Step:
    """A predicted step; every number may be an array where the layout's layers are arrays.

    Attributes:
      phases: of a layer, by (placement, 'forward' or 'backward').
      parts: seconds of a step by what they are spent on; they add up to it.
      links: seconds that collectives take by mesh axis, hidden or not.
    """

    phases: dict[tuple[str, str], Phase]
    parts: dict[str, float]
    links: dict[str, float]

    @property
    def seconds(self):
        return sum(self.parts.values())

    @property
    def exposed(self):
        """Seconds of collectives that nothing hides."""
        return sum(value for name, value in self.parts.items() if name in WAITS)


# What a step waits for, and no placement can make shorter than nothing.
WAITS = ("waits for layers", "waits for tensor", "waits at the ends", "waits once")


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Training FLOPs per token of the published architecture: forward and backward.

    Six for each parameter of a matrix product (the head is one, the embedding is not), and
    6·T·D for each layer's causal attention. Nothing is credited for recomputation.
    """
    D, F, L = model.hidden_size, model.intermediate_size, model.num_layers
    matrices = L * (4 * D * D + 3 * D * F) + model.vocab_size * D
    return 6 * matrices + 6 * sequence_length * D * L


def step(job: Job, layout: Layout, topology: Topology, assumptions: Assumptions) -> Step:
    """Predicts one optimizer step."""
    rings, K, L = topology.rings(layout.mesh), layout.micro_batches, job.shape.num_layers
    size = sizes(job.model, layout.mesh)
    work = compute(job, layout, topology.chip, assumptions)
    busy = {"forward": work.forward, "backward": work.backward + work.again}
    rounds = {"before": 1, "forward": K, "backward": K, "after": 1}
    links, parts = dict.fromkeys(AXES, 0.0), dict.fromkeys(WAITS, 0.0)

    def spent(found: list[Transfer], when: str) -> dict[str, float]:
        """Seconds by axis; collectives over one axis run one after the other."""
        result = dict.fromkeys(AXES, 0.0)
        for one in found:
            if one.when == when:
                result[one.axis] += seconds(one.bytes, rings[one.axis], assumptions)
        return result

    def add(what: str, waits, times, by_axis: dict[str, float]) -> None:
        parts[what] = parts[what] + waits * times
        for axis in AXES:
            links[axis] = links[axis] + by_axis[axis] * times

    inside = {when: spent(layer_activations(job, layout), when) for when in busy}
    phases, free = {}, dict.fromkeys(busy, 0.0)
    for placement, count in zip(PLACEMENTS, layout.layers, strict=True):
        found = [
            one
            for matrix in size.layer.values()
            for one in transfers(matrix, job, placement, K, again=True)
        ]
        for when, times in rounds.items():
            by_axis = spent(found, when)
            if when not in busy:  # nothing runs beside these, one stage after the other
                add("waits once", sum(by_axis.values()), count, by_axis)
                continue
            phase = Phase(busy[when], by_axis, sum(inside[when].values()))
            phases[placement, when] = phase
            free[when] = free[when] + count * np.maximum(0.0, busy[when] - max(by_axis.values()))
            add("waits for layers", phase.exposed, times * count, by_axis)
            add("waits for tensor", phase.inline, times * count, inside[when])

    # Nothing hides the gather of the first layer of a pass, nor what its last layer scatters.
    groups = list(zip(PLACEMENTS, layout.layers, strict=True))
    for when, order in (("forward", groups), ("backward", groups[::-1])):
        edges = [sum(phases[placement, when].hidden.values()) for placement, _ in order]
        first = np.select([np.asarray(count) > 0 for _, count in order], edges)
        parts["waits at the ends"] = parts["waits at the ends"] + K * np.minimum(first, busy[when])

    # The head's hide behind what the layers leave free; the embedding's are first and last.
    for name in ("embedding", "head"):
        found = transfers(getattr(size, name), job, getattr(layout, name), K, again=False)
        for when, times in rounds.items():
            by_axis = spent(found, when)
            waits = sum(by_axis.values())
            if name == "head" and when in free:
                waits = np.maximum(0.0, waits - free[when])
            add("waits at the ends" if when in free else "waits once", waits, times, by_axis)
    for when in busy:
        by_axis = spent(end_activations(job, layout), when)
        add("waits for tensor", sum(by_axis.values()), K, by_axis)

    all_busy = K * L * sum(busy.values())
    spent_busy = {
        "layers": K * L * (work.forward + work.backward),
        "computed again": K * L * work.again,
        "loss": K * work.loss,
        "held weights": _held(job, layout, topology.chip, assumptions),
        "optimizer": _optimizer(job, layout, topology.chip, assumptions),
        "offload": max(0.0, 2 * K * L * work.offload - all_busy),
    }
    return Step(phases, spent_busy | parts, links)


def _held(job: Job, layout: Layout, chip: Chip, assumptions: Assumptions):
    """Seconds of copying the layers' held weights: twice for each micro-batch, read and written.

    With one micro-batch into the stack of what the backward pass finds, and out of it; with several
    out of the stack that was gathered before them, in either pass.
    """
    matrices, copied = sizes(job.model, layout.mesh).layer.values(), 0
    for placement, count in zip(PLACEMENTS, layout.layers, strict=True):
        copied = copied + count * sum(matrix.held(placement) for matrix in matrices)
    moved = 4 * layout.micro_batches * copied * job.compute
    return moved / (chip.bandwidth * assumptions.memory)


def _optimizer(job: Job, layout: Layout, chip: Chip, assumptions: Assumptions):
    """Seconds that AdamW, and adding up gradients, take of the memory's bandwidth."""
    size, K = sizes(job.model, layout.mesh), layout.micro_batches
    # Read and written: weight, both moments; read: the gradient, and once more for its norm.
    moved = 32 * (size.total("stored", job.shape.num_layers) + size.gains)
    if K > 1:  # every micro-batch adds its gradients to the sums
        held = size.embedding.held(layout.embedding) + size.head.held(layout.head)
        for placement, count in zip(PLACEMENTS, layout.layers, strict=True):
            matrices = size.layer.values()
            held = held + count * sum(m.held(placement) or m.stored for m in matrices)
        moved = moved + K * held * (2 * job.gradient + job.compute)
    return moved / (chip.bandwidth * assumptions.memory)
