"""Scheduling policies beside each other: goodput on generated traces, as a table and a picture."""

import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from baichuan_jax.training.cluster import Work, bound, goodputs, ideal_counts, simulate
from baichuan_jax.training.metrics import Progress
from baichuan_jax.training.traces import Trace, draw

# Percent, by policy or interval, kind of trace, and seed.
Found = dict[str, dict[str, list[float]]]

BOUND = "no cost of change"  # what no policy reaches


def _fixed(works: Sequence[Work], machines: int) -> list[Work]:
    """Jobs that only run on so many machines, divided between them once and for all.

    Raises:
      ValueError: these are too few for all jobs.
    """
    counts = ideal_counts(works, machines)
    fitting = zip(works, counts, strict=True)
    return [dataclasses.replace(work, speeds={n: work.speeds[n]}) for work, n in fitting]


# What becomes of the jobs: `scheduling` with its hands tied, or free.
POLICIES: dict[str, Callable[[Sequence[Work], int], list[Work]]] = {
    "fixed, all machines": _fixed,
    "fixed, an eighth spare": lambda works, machines: _fixed(works, machines - -(-machines // 8)),
    "fixed, half spare": lambda works, machines: _fixed(works, machines - machines // 2),
    "grows at once": lambda works, _: [dataclasses.replace(work, patience=0.0) for work in works],
    "the policy": lambda works, _: list(works),
}

# Seconds between checkpoints; None: the best interval.
INTERVALS = {"10 minutes": 600.0, "half an hour": 1_800.0, "2 hours": 7_200.0, "best": None}


def goodput(trace: Trace, works: Sequence[Work], chosen: Sequence[Work]) -> tuple[float, float]:
    """Of `chosen`, which are `works` under a policy.

    Returns:
      Percent: the mean goodput of the jobs, by their weights; and the machine time given back.
    """
    result = simulate(trace, chosen)
    weights = [work.weight for work in works]
    mean = float(np.average(goodputs(result.jobs, works, trace), weights=weights))
    return 100 * mean, 100 * result.given_back / result.present


def compare(
    works: Sequence[Work], kinds: Sequence[str], machines: int, days: float, seeds: int
) -> tuple[Found, Found]:
    """Goodput of each policy and `BOUND`, and what each policy gives back.

    A policy for which there are too few machines trains nothing and gives back all.

    Raises:
      ValueError: all machines together are too few for all jobs.
    """
    ideal_counts(works, machines)
    kept = {policy: {kind: [] for kind in kinds} for policy in (*POLICIES, BOUND)}
    given_back = {policy: {kind: [] for kind in kinds} for policy in POLICIES}
    for kind, trace in _draw("policies", kinds, machines, days, seeds):
        for policy, choose in POLICIES.items():
            try:
                found = goodput(trace, works, choose(works, machines))
            except ValueError:
                found = 0.0, 100.0
            kept[policy][kind].append(found[0])
            given_back[policy][kind].append(found[1])
        kept[BOUND][kind].append(100 * bound(works, trace))
    return kept, given_back


def compare_intervals(
    works: Sequence[Work], kinds: Sequence[str], machines: int, days: float, seeds: int
) -> Found:
    """Goodput of the policy by the time between checkpoints."""
    found = {interval: {kind: [] for kind in kinds} for interval in INTERVALS}
    for kind, trace in _draw("intervals", kinds, machines, days, seeds):
        for interval, seconds in INTERVALS.items():
            chosen = [dataclasses.replace(work, save_every=seconds) for work in works]
            found[interval][kind].append(goodput(trace, works, chosen)[0])
    return found


def _draw(
    phase: str, kinds: Sequence[str], machines: int, days: float, seeds: int
) -> Iterator[tuple[str, Trace]]:
    """A trace of each kind and seed, with a line that tells how many are done."""
    with Progress(phase, len(kinds) * seeds, unit="trace") as progress:
        progress.update(0)
        for done, (kind, seed) in enumerate(itertools.product(kinds, range(seeds)), 1):
            yield kind, draw(kind, machines, days, seed)
            progress.update(done)


def table(title: str, found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Mean ± standard deviation over seeds, as Markdown."""
    kinds = list(next(iter(found.values())))
    lines = [f"| {title} | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name, by_kind in found.items():
        cells = [f"{np.mean(by_kind[kind]):.1f} ± {np.std(by_kind[kind]):.1f}" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Mapping[str, Mapping[str, Sequence[float]]], path: epath.PathLike) -> None:
    """Draws what `compare` found into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    kinds = list(found[BOUND])
    policies = [policy for policy in found if policy != BOUND]
    width = 0.8 / len(policies)
    colours = ["#d0d0d0", "#a8a8a8", "#808080", "#e8a33d", "#2b6cb0"]
    for i, (policy, colour) in enumerate(zip(policies, colours, strict=True)):
        x = np.arange(len(kinds)) + (i - (len(policies) - 1) / 2) * width
        mean, spread = ([of(found[policy][kind]) for kind in kinds] for of in (np.mean, np.std))
        style = {"ecolor": "#404040", "capsize": 2, "error_kw": {"linewidth": 0.8}}
        axes.bar(x, mean, 0.92 * width, yerr=spread, color=colour, label=policy, **style)
    for i, kind in enumerate(kinds):
        label = "if changes cost nothing" if i == 0 else None
        level = np.mean(found[BOUND][kind])
        axes.plot([i - 0.42, i + 0.42], [level, level], color="black", linewidth=1.2, label=label)
    axes.set(ylabel="goodput (%)", ylim=(0, 100), xticks=range(len(kinds)), xticklabels=kinds)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    epath.Path(path).write_bytes(image.getvalue())
