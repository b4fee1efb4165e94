"""A simulated cluster: jobs on machines that come and go (traces.py).

Deterministic, from event to event. The jobs do what `scheduling.divide` and `scheduling.decide` say
and know what a real run knows: which machines are there, which are announced to leave, what was
observed so far.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from baichuan_jax.training.scheduling import (
    Costs,
    Decision,
    History,
    Job,
    Rates,
    decide,
    divide,
    needs,
)
from baichuan_jax.training.traces import Change, Trace


@dataclasses.dataclass(frozen=True)
class Work:
    """A job to simulate; it has no end. The fields are those of `scheduling.Job`."""

    speeds: Mapping[int, float]
    costs: Costs
    weight: float = 1.0
    patience: float = 1.0
    save_every: float | None = None

    def job(self, rates: Rates, **state) -> Job:
        return Job(**{**vars(self), "rates": rates, **state})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one job.

    Attributes:
      tokens: trained and not lost.
      seconds: by what it did: 'trains' (what was not lost later), 'lost' (trained in vain),
        'saves', 'restarts', 'waits'.
      restarts: how many, the start too.
      checkpoints: how many were begun.
      log: each restart and wait: its time, and why.
    """

    tokens: float
    seconds: Mapping[str, float]
    restarts: int
    checkpoints: int
    log: tuple[tuple[float, str], ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """Of a simulation.

    Attributes:
      jobs: an outcome for each.
      present: machine-seconds.
      given_back: those of them in which no job ran on a machine or held it as a spare.
    """

    jobs: tuple[Outcome, ...]
    present: float
    given_back: float


def simulate(trace: Trace, works: Sequence[Work]) -> Result:
    """Runs jobs through a trace by the policy of `scheduling`.

    Machines that are given back are free at once when a job wants them again.
    """
    cluster = _Cluster(trace, works)
    cluster.run()
    jobs = tuple(run.outcome() for run in cluster.runs)
    return Result(jobs, cluster.history.machine_seconds, cluster.given_back)


def ideal_counts(works: Sequence[Work], machines: int) -> list[int]:
    """Machines of each job where the policy divides so many and none ever leaves.

    Raises:
      ValueError: they are too few for all jobs.
    """
    never = Rates(failures=0.0, departures=0.0, arrivals=0.0)
    counts = divide([work.job(never) for work in works], machines)
    if 0 in counts:
        needed = sum(min(work.speeds) for work in works)
        raise ValueError(f"{machines} machines are too few: the jobs need {needed} at least.")
    return counts


def goodputs(outcomes: Sequence[Outcome], works: Sequence[Work], trace: Trace) -> list[float]:
    """Of each job: tokens kept / tokens of the same time by `ideal_counts`.

    Raises:
      ValueError: there are too few machines for all jobs.
    """
    counts = ideal_counts(works, trace.machines)
    speeds = [work.speeds[count] for work, count in zip(works, counts, strict=True)]
    return [o.tokens / (v * trace.seconds) for o, v in zip(outcomes, speeds, strict=True)]


def bound(works: Sequence[Work], trace: Trace) -> float:
    """The mean goodput, by the jobs' weights, if restarts and checkpoints took no time."""
    never = Rates(failures=0.0, departures=0.0, arrivals=0.0)

    @functools.cache
    def speed(machines: int) -> float:
        counts = divide([work.job(never) for work in works], machines)
        of_full = [
            work.speeds.get(count, 0.0) / work.speeds[full]
            for work, count, full in zip(works, counts, fulls, strict=True)
        ]
        return float(np.average(of_full, weights=[work.weight for work in works]))

    fulls = ideal_counts(works, trace.machines)
    time, there, total = 0.0, trace.machines, 0.0
    for change in (*trace.changes, Change(trace.seconds, 0, True)):
        total += speed(there) * (change.time - time)
        time, there = change.time, there + (1 if change.comes else -1)
    return total / trace.seconds


class _Run:
    """One job in the simulation."""

    def __init__(self, work: Work):
        self.work = work
        self.machines: list[int] = []
        self.lost: set[int] = set()  # of its machines, since the last decision
        self.phase, self.until = "waits", math.inf
        self.asks = math.inf  # when it wants the next decision
        self.spares = 0
        self.tokens = self.trained = self.unsaved = 0.0  # the last two: seconds
        self.safe = (0.0, 0.0)  # tokens and seconds of the last checkpoint
        self.writing: tuple[float, float, float] | None = None  # the same, and when it is ready
        self.seconds = dict.fromkeys(("lost", "saves", "restarts", "waits"), 0.0)
        self.restarts = self.checkpoints = 0
        self.log: list[tuple[float, str]] = []

    def next(self) -> float:
        return min(self.until, self.asks, self.writing[2] if self.writing else math.inf)

    def advance(self, seconds: float) -> None:
        if self.phase == "trains":
            self.tokens += seconds * self.work.speeds[len(self.machines)]
            self.trained += seconds
            self.unsaved += seconds
        else:
            self.seconds[self.phase] += seconds

    def settle(self, now: float) -> None:
        """What ends at this time."""
        if self.writing and self.writing[2] <= now:
            self.safe, self.writing = self.writing[:2], None
        if self.until <= now:
            self.phase, self.until = "trains", math.inf
        if self.asks <= now:
            self.asks = math.inf

    def save(self, now: float) -> None:
        self.writing = (self.tokens, self.trained, now + self.work.costs.save)
        self.unsaved = 0.0
        self.checkpoints += 1

    def stop(self) -> None:
        """Back to the last checkpoint."""
        self.seconds["lost"] += self.trained - self.safe[1]
        self.tokens, self.trained = self.safe
        self.writing, self.unsaved = None, 0.0

    def outcome(self) -> Outcome:
        seconds = {"trains": self.trained, **self.seconds}
        return Outcome(self.tokens, seconds, self.restarts, self.checkpoints, tuple(self.log))


class _Cluster:
    def __init__(self, trace: Trace, works: Sequence[Work]):
        self.trace = trace
        self.runs = [_Run(work) for work in works]
        self.now = 0.0
        self.present = set(range(trace.machines))
        self.leaving: dict[int, float] = {}  # announced: when
        self.free_at: dict[int, float] = {}  # a job still writes its last checkpoint there
        self.history = History()
        self.last_left = self.last_came = 0.0  # when
        self.given_back = 0.0
        news = [(change.time, 1, change) for change in trace.changes]
        told = [change for change in trace.changes if change.notice]
        news += [(max(change.time - change.notice, 0.0), 0, change) for change in told]
        self.news = sorted(news, key=lambda item: item[:2])[::-1]

    def run(self) -> None:
        while self.now < self.trace.seconds:
            self.decide()
            news = self.news[-1][0] if self.news else math.inf
            time = min(news, *(run.next() for run in self.runs), self.trace.seconds)
            self.advance(time - self.now)
            self.now = time
            for run in self.runs:
                run.settle(time)
            while self.news and self.news[-1][0] <= time:
                self.hear(*self.news.pop()[1:])

    def advance(self, seconds: float) -> None:
        used = sum(len(run.machines) for run in self.runs)
        free = len(self.present) - used - len(self.leaving.keys() - self.used())
        self.history.seconds += seconds
        self.history.machine_seconds += seconds * len(self.present)
        self.given_back += seconds * max(free - sum(run.spares for run in self.runs), 0)
        for run in self.runs:
            run.advance(seconds)

    def used(self) -> set[int]:
        return {machine for run in self.runs for machine in run.machines}

    def hear(self, happens: int, change: Change) -> None:
        if change.comes:
            self.present.add(change.machine)
            self.history.came += 1
            self.last_came = self.now
        elif happens:
            self.present.discard(change.machine)
            self.leaving.pop(change.machine, None)
            self.history.left[change.notice] += 1
            self.last_left = self.now
            for run in self.runs:
                if change.machine in run.machines:
                    run.machines.remove(change.machine)
                    run.lost.add(change.machine)
                    run.stop()
        else:
            self.leaving[change.machine] = change.time

    def staying(self, run: _Run) -> list[int]:
        return [machine for machine in run.machines if machine not in self.leaving]

    def state(self, run: _Run) -> Job:
        own = run.machines
        leaving = [self.leaving[machine] for machine in own if machine in self.leaving]
        return run.work.job(
            self.history.rates(run.work.costs),
            machines=len(own) + len(run.lost),
            lost=len(run.lost),
            leaving=len(leaving),
            notice=min(leaving, default=math.inf) - self.now,
            since_left=self.now - self.last_left,
            since_came=self.now - self.last_came,
            unsaved=run.unsaved,
            saving=run.writing is not None,
        )

    def decide(self) -> None:
        """Asks for all jobs but those that are restarting, and does what is decided."""
        runs = [run for run in self.runs if run.phase != "restarts" or run.lost]
        jobs = [self.state(run) for run in runs]
        free = self.present - self.leaving.keys() - self.used()
        total = len(free) + sum(len(self.staying(run)) for run in runs)
        counts = divide(jobs, total)
        shares = [needs(job, count) for job, count in zip(jobs, counts, strict=True)]
        rest, moves = total - sum(shares), []
        for run, job, share in zip(runs, jobs, shares, strict=True):
            decision = decide(dataclasses.replace(job, available=share + rest))
            run.spares, run.asks = decision.spares, self.now + decision.again
            if decision.restart or not decision.machines:
                rest += share - decision.machines
                if decision.machines or run.phase != "waits":
                    moves.append((run, decision))
                continue
            rest += share - (job.machines - job.leaving)
            if decision.save:
                run.save(self.now)
                run.phase, run.until = "saves", self.now + run.work.costs.pause
        for run, decision in moves:
            self.release(run, decision, free)
        for run, decision in moves:
            self.start(run, decision, free)

    def release(self, run: _Run, decision: Decision, free: set[int]) -> None:
        """Keeps of a job's machines what it goes on with."""
        ready = self.now
        if decision.save:
            run.save(self.now)
            ready += run.work.costs.save
        elif run.phase != "waits":
            run.stop()
        own, run.lost = self.staying(run), set()
        self.free_at |= dict.fromkeys(own, ready)
        run.machines = own[: decision.machines]
        free.update(own[decision.machines :])

    def start(self, run: _Run, decision: Decision, free: set[int]) -> None:
        run.log.append((self.now, decision.why))
        missing = decision.machines - len(run.machines)
        taken = sorted(free, key=lambda machine: (self.free_at.get(machine, 0.0), machine))[
            :missing
        ]
        free.difference_update(taken)
        run.machines += taken
        if not run.machines:
            run.phase, run.until = "waits", math.inf
            return
        begins = max(self.now, *(self.free_at.get(machine, 0.0) for machine in run.machines))
        run.phase, run.until = "restarts", begins + run.work.costs.restart
        run.restarts += 1
