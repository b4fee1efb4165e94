"""Traces of machines that fail, are taken away and come back, drawn from a seed."""

import dataclasses
import math

import numpy as np

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Change:
    """A machine comes, or leaves.

    Attributes:
      time: seconds from the start.
      machine: which.
      comes: else it leaves.
      notice: seconds before it leaves that this was announced; 0 for a failure.
    """

    time: float
    machine: int
    comes: bool
    notice: float = 0.0


@dataclasses.dataclass(frozen=True)
class Trace:
    """What happens to the machines of a cluster; all are there at the start.

    Attributes:
      changes: by time; of one machine leaving and coming by turns.
    """

    machines: int
    seconds: float
    changes: tuple[Change, ...]


@dataclasses.dataclass(frozen=True)
class Away:
    """One reason for which machines leave.

    Attributes:
      every: mean seconds that a machine stays.
      back: mean seconds until it comes back; exponential.
      notice: seconds that it is announced before.
      shape: of the Weibull distribution of the time that it stays; 1: exponential; below 1 it
        fails soon after a failure or not for long, as machines do (Schroeder and Gibson 2006:
        0.7 to 0.8).
    """

    every: float
    back: float
    notice: float = 0.0
    shape: float = 1.0


FAILURES = Away(every=30 * DAY, back=4 * 3600)

# What a machine of each kind of cluster leaves for.
KINDS = {
    "stable": (FAILURES,),
    "ageing": (dataclasses.replace(FAILURES, every=10 * DAY, shape=0.7),),
    "spot": (FAILURES, Away(every=8 * 3600, back=2 * 3600, notice=120.0)),
    "spot, no notice": (FAILURES, Away(every=8 * 3600, back=2 * 3600)),
    "diurnal": (FAILURES,),  # and others' work by day, see `draw`
}


def draw(kind: str, machines: int, days: float, seed: int) -> Trace:
    """A trace of one of `KINDS`.

    Of a diurnal cluster, others take up to half of the machines each day: one after the other
    from eight o'clock on, with five minutes' notice, and give them back in the evening, with an
    hour's spread.

    Raises:
      ValueError: names what is wrong.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}.")
    if machines < 1 or not 0 < days < math.inf:
        raise ValueError(f"machines={machines} and days={days} must be positive.")
    changes = []
    for machine in range(machines):
        rng = np.random.default_rng([seed, machine])
        gone = [span for why in KINDS[kind] for span in _leaves(rng, why, days * DAY)]
        if kind == "diurnal" and machine < machines // 2:
            gone += _by_day(rng, machine / max(machines // 2, 1), days)
        changes += _changes(machine, gone, days * DAY)
    changes.sort(key=lambda change: (change.time, change.machine))
    return Trace(machines, days * DAY, tuple(changes))


def _leaves(rng: np.random.Generator, why: Away, seconds: float) -> list[tuple]:
    """(leaves, comes, notice) of one machine for one reason."""
    scale = why.every / math.gamma(1 + 1 / why.shape)
    spans, time = [], 0.0
    while (leaves := time + scale * rng.weibull(why.shape)) < seconds:
        time = leaves + rng.exponential(why.back)
        spans.append((leaves, time, why.notice))
    return spans


def _by_day(rng: np.random.Generator, order: float, days: float) -> list[tuple]:
    spans = []
    for day in range(math.ceil(days)):
        leaves, comes = 8 + 4 * order + rng.normal(0, 0.5), 22 - 4 * order + rng.normal(0, 0.5)
        spans.append((day * DAY + leaves * 3600, day * DAY + comes * 3600, 300.0))
    return spans


def _changes(machine: int, gone: list[tuple], seconds: float) -> list[Change]:
    """Spans of absence, joined where they overlap, as changes."""
    changes, until = [], -1.0
    for leaves, comes, notice in sorted(gone):
        if leaves > until:
            changes.append(Change(leaves, machine, False, notice))
            changes.append(Change(comes, machine, True))
        elif comes > until:
            changes[-1] = Change(comes, machine, True)
        until = max(until, comes)
    return [change for change in changes if change.time < seconds]
