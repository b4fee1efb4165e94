"""The planner: which layout a machine trains a model with (paper §2.7).

The paper shards the optimizer over all devices and then decides, layer by layer, whether the
parameters are sharded too, and over how many devices; its rule is not published. Ours: of all
layouts whose memory is within the device's, the one with the shortest predicted step; but a mesh
whose `replica` axis is the nodes or slices is preferred to others that are up to 2 % faster, and on
the mesh, of layouts up to 0.5 % apart, one that offloads nothing, then one of few groups of layers
(each is a loop of its own, whose last scatters nothing hides), then the one whose collectives take
the least time, hidden or not, then the one that takes the least memory.

All layouts are looked at: mesh shapes, micro-batches, rematerialisation policies, and how many
layers are replicated, hierarchical and full. Layers are alike, so counts are all there is to
choose, and the optimum over counts is the optimum over all 3^layers placements (beyond 128 layers,
over 128 evenly spread counts). What makes this quick is a bound: what no placement makes shorter.
"""

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np

from baichuan_jax.config import Config, ZeroConfig, validate
from baichuan_jax.parallel import cost, fitting
from baichuan_jax.parallel.layout import FIELDS, Job, Layout
from baichuan_jax.parallel.layouts import Fixed, frames, placements, refusal
from baichuan_jax.parallel.memory import Memory, memory
from baichuan_jax.parallel.topology import MeshShape, Topology

# Times the shortest step: predictions so near to each other are as good as equal.
_SAME_MESH, _SAME_LAYOUT = 1.02, 1.005


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout, and what it is predicted to take.

    Attributes:
      looked_at: layouts that it was chosen from; 0 where it was given.
    """

    job: Job
    topology: Topology
    assumptions: cost.Assumptions
    layout: Layout
    memory: Memory
    step: cost.Step
    looked_at: int = 0

    @property
    def limit(self) -> float:
        """Bytes of a device's memory that the plan may fill."""
        return self.topology.chip.memory * self.assumptions.margin

    @property
    def fits(self) -> bool:
        return bool(self.memory.peak <= self.limit)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.job.tokens / float(self.step.seconds)

    @property
    def flops(self) -> float:
        """Model FLOP/s of one device, as `cost.flops_per_token` counts."""
        each = self.tokens_per_second / self.topology.num_devices
        return each * cost.flops_per_token(self.job.shape, self.job.time)

    @property
    def mfu(self) -> float:
        """`flops` as a share of the device's peak."""
        return self.flops / self.topology.chip.flops

    def nearest(self) -> str:
        """Where it does not fit: by how much, and what does."""
        peak = float(self.memory.peak)
        return fitting.nearest(self.job, self.topology, self.assumptions, {}, peak)


class DoesNotFit(ValueError):
    """No layout fits; the message names the nearest settings that do."""


def plan(
    config: Config,
    machine: Topology,
    as_is: bool = False,
    fixed: Sequence[str] = (),
    assumed: Sequence[str] = (),
) -> Plan:
    """The plan of a config.

    Args:
      as_is: takes the config's own layout, whether it fits or not, and searches nothing.
      fixed: settings that are not to be chosen, 'mesh.tensor=2'.
      assumed: rates that differ from those of the chip, 'products=0.6'.

    Raises:
      DoesNotFit: see `search`.
      ValueError: names the setting, and what would be right. What is chosen here may be wrong in
        the config.
    """
    rates = {name: _number(name, text) for name, text in map(_split, assumed)}
    assumptions = cost.Assumptions.of(machine.chip, **rates)
    if as_is:
        if fixed:
            raise ValueError(
                "--as_is takes the config's layout: leave out --fix, or set --config.mesh.tensor"
                " and so on."
            )
        validate(config)
        layout = Layout.of(config, machine.num_devices, machine.granules)
        return evaluate(Job.of(config), layout, machine, assumptions)
    settings = dict(_setting(*_split(text)) for text in fixed)
    _check(config, settings)
    job = Job.of(config)
    fitting.check_mesh(job, machine, settings)
    return search(job, machine, assumptions, settings)


def _split(setting: str) -> tuple[str, str]:
    name, separator, text = setting.partition("=")
    if not separator:
        raise ValueError(f"{setting!r} should be NAME=VALUE.")
    return name, text


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text} should be a number.") from None


def _setting(name: str, text: str) -> tuple[str, int | str]:
    if name not in FIELDS:
        raise ValueError(f"{name!r} is not planned; there are {', '.join(FIELDS)}.")
    section, field = name.split(".")
    if isinstance(getattr(getattr(Config(), section), field), str):
        return name, text
    try:
        return name, int(text)
    except ValueError:
        raise ValueError(f"{name}={text} should be a whole number.") from None


def _check(config: Config, settings: Fixed) -> None:
    """Refuses what cannot be run: of what is chosen, only the given settings count."""
    config = copy.deepcopy(config)
    config.zero = ZeroConfig(gradient_dtype=config.zero.gradient_dtype)
    config.training.micro_batches, config.training.remat, config.training.offload = 1, "matmuls", ""
    for name, value in settings.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)
    validate(config)


def evaluate(job: Job, layout: Layout, machine: Topology, assumptions: cost.Assumptions) -> Plan:
    """The plan of a given layout, whether it fits or not.

    Raises:
      ValueError: the mesh does not fit the machine, or the batch or the model not the mesh.
    """
    if reason := refusal(job, layout):
        raise ValueError(reason)
    steps = cost.step(job, layout, machine, assumptions)
    return Plan(job, machine, assumptions, layout, memory(job, layout, machine.chip), steps)


def search(
    job: Job, machine: Topology, assumptions: cost.Assumptions, fixed: Fixed | None = None
) -> Plan:
    """The best layout of a job on a machine.

    Args:
      fixed: settings of FIELDS that are not to be chosen.

    Raises:
      DoesNotFit: nothing fits. Says what would: other settings than those fixed, another batch,
        more devices, or another chip.
    """
    fixed = fixed or {}
    limit = machine.chip.memory * assumptions.margin
    found, fastest, smallest, looked_at = [], np.inf, np.inf, 0
    for bound, frame in frames(job, machine, assumptions, fixed):
        if bound > fastest * _SAME_MESH * _SAME_LAYOUT:
            break
        for layout in placements(job, frame, fixed):
            peak = memory(job, layout, machine.chip).peak
            bytes_ = np.broadcast_to(peak, layout.layers[0].shape)
            looked_at += bytes_.size
            smallest = min(smallest, float(bytes_.min()))
            fits = np.flatnonzero(bytes_ <= limit)
            if not fits.size:
                continue
            layout = layout.take(fits)
            steps = cost.step(job, layout, machine, assumptions)
            keys = (steps.seconds, sum(steps.links.values()), bytes_[fits])
            found.append((layout, np.broadcast_arrays(*keys)))
            fastest = min(fastest, float(found[-1][1][0].min()))
    if not found:
        raise DoesNotFit(fitting.nearest(job, machine, assumptions, fixed, smallest))
    best = evaluate(job, _choose(found, machine.granules), machine, assumptions)
    return dataclasses.replace(best, looked_at=looked_at)


def _choose(found: list[tuple[Layout, list[np.ndarray]]], granules: int) -> Layout:
    """One layout of arrays of them with their seconds, seconds of all collectives, and bytes."""
    on_mesh: dict[MeshShape, float] = {}
    for layout, (seconds, _, _) in found:
        on_mesh[layout.mesh] = min(on_mesh.get(layout.mesh, np.inf), float(seconds.min()))
    fastest = min(on_mesh.values())
    meshes = [mesh for mesh, seconds in on_mesh.items() if seconds <= fastest * _SAME_MESH]
    mesh = min(meshes, key=lambda mesh: (abs(np.log2(mesh[0] / granules)), on_mesh[mesh]))

    def least(pair: tuple[Layout, list[np.ndarray]]) -> tuple:
        layout, (seconds, sending, bytes_) = pair
        equal = np.flatnonzero(seconds <= on_mesh[mesh] * _SAME_LAYOUT)
        if layout.mesh != mesh or not equal.size:
            return (True,)
        groups = sum(np.asarray(count)[equal] > 0 for count in layout.layers)
        keys = (groups, sending[equal].round(6), bytes_[equal])
        first = np.lexsort(keys[::-1])[0]
        return bool(layout.offload), *(float(key[first]) for key in keys), int(equal[first])

    best = min((pair for pair in found if len(least(pair)) > 1), key=least)
    return best[0].take(least(best)[-1])
