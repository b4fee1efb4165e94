"""When an elastic run grows, shrinks and checkpoints (§2.7: "the co-design of elastic training and
cluster scheduling"; the paper gives no rule, this one is ours).

Functions of what a runner knows: the speed at each count of machines, what interruptions cost, how
often machines leave and come. `decide` answers for one job, `divide` shares machines between
several. `cluster.py` simulates both.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import lambertw

# A tenth of a loss in three machine-days: what is believed of machines before they are watched.
PRIOR_EVENTS, PRIOR_SECONDS = 0.1, 3 * 86_400.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """What interruptions of a job take, in seconds, as measured.

    Attributes:
      restart: from the stop of one set of machines to the first step of another: to notice, to
        load the checkpoint, to compile.
      pause: that training stands still for a checkpoint.
      save: until a checkpoint can be restored from; its pause included, and with asynchronous
        writing more than that. Give the slow ones' time: a warning is answered this late.
    """

    restart: float
    pause: float
    save: float


@dataclasses.dataclass(frozen=True)
class Rates:
    """How often machines leave and come (`History` knows).

    Attributes:
      failures: without a warning, or with too short a one; each machine, 1/s.
      departures: announced in time; each machine, 1/s.
      arrivals: of machines that the job may take; 1/s.
    """

    failures: float
    departures: float
    arrivals: float


@dataclasses.dataclass(frozen=True)
class Job:
    """A job at this moment.

    Attributes:
      speeds: tokens/s at each count of machines that has a mesh and divides the batch.
      machines: that it runs on, or did until some were lost; 0: it does not run.
      lost: of those, how many are gone; with any gone it stands still.
      leaving: of those, how many are announced to leave and still there.
      available: machines that it may run on, its own included, without any that will leave.
      notice: seconds until the first of these goes.
      since_left, since_came: seconds since a machine of the cluster did.
      unsaved: seconds of training since the last checkpoint began.
      saving: a checkpoint is being written.
      save_every: seconds between checkpoints; None: the best.
      patience: what growing must gain, in units of what it costs. 1 is the policy, 0 grows
        whenever more machines are there.
      weight: its share where several jobs compete (`divide`).
    """

    speeds: Mapping[int, float]
    costs: Costs
    rates: Rates
    machines: int = 0
    lost: int = 0
    leaving: int = 0
    available: int = 0
    notice: float = math.inf
    since_left: float = 0.0
    since_came: float = 0.0
    unsaved: float = 0.0
    saving: bool = False
    save_every: float | None = None
    patience: float = 1.0
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do now.

    Attributes:
      machines: to run on; 0: wait.
      restart: on these machines; else it goes on as it is.
      save: write a checkpoint, before the restart if there is one.
      spares: further machines to hold; what is available beyond `machines + spares` may be given
        back.
      again: seconds after which to ask again, if nothing changes before.
      why: for the log.
    """

    machines: int
    restart: bool
    save: bool
    spares: int
    again: float
    why: str


class History:
    """What was seen of the machines of a cluster, and the rates that it makes likely.

    Means of gamma posteriors: `PRIOR_EVENTS` in `PRIOR_SECONDS` are counted as if seen, so that no
    rate is 0 and a young run is prudent. Who watches the machines adds to the fields.

    Attributes:
      seconds, machine_seconds: of watching; times the machines that were there.
      came: machines that came.
      left: how many left, by the seconds that this was announced before; 0: not at all.
    """

    def __init__(self):
        self.seconds = self.machine_seconds = 0.0
        self.came = 0
        self.left = collections.Counter()

    def rates(self, costs: Costs) -> Rates:
        """For a job of such costs: a notice shorter than its checkpoint is none."""
        late = sum(count for notice, count in self.left.items() if notice < costs.save)
        return Rates(
            failures=_rate(late, self.machine_seconds),
            departures=_rate(self.left.total() - late, self.machine_seconds),
            arrivals=_rate(self.came, self.seconds),
        )


def _rate(events: int, seconds: float) -> float:
    return (events + PRIOR_EVENTS) / (seconds + PRIOR_SECONDS)


def best_interval(pause: float, failures: float) -> float:
    """Seconds of training between checkpoints that lose least to failures at a constant rate.

    Where failures are exponential, a segment of τ seconds and its checkpoint take
    (exp(λ(τ + pause)) − 1) exp(λ restart) / λ on average (Daly 2006), and the least time for a
    second of progress is where (1 − λτ) exp(λτ) = exp(−λ pause): exact, by Lambert's W. To first
    order it is √(2 pause / λ) (Young 1974).

    Args:
      pause: seconds that a checkpoint stops training for.
      failures: of all machines in use, 1/s.
    """
    if failures <= 0:
        return math.inf
    return float(_best(failures * pause)) / failures


def _best(y: np.ndarray) -> np.ndarray:
    """The x from 0 to 1 where (1 − x) exp(x) = exp(−y): the best interval and a pause, × the rate.

    1 + W(−exp(−1 − y)); near 0, where that cancels, W's series at its branch point.
    """
    p = np.sqrt(-2 * np.expm1(-np.asarray(y)))
    return np.where(p < 1e-3, p - p**2 / 3 + 11 / 72 * p**3, 1 + lambertw(-np.exp(-1 - y)).real)


def log_efficiency(costs: Costs, failures: np.ndarray, departures: np.ndarray) -> np.ndarray:
    """The logarithm of the share of its speed that a job keeps in the long run (Daly's formula).

    Checkpoints are at the best interval. One that is still being written when a machine fails is
    no use: that time counts as part of the restart. Of an announced departure, only the restart
    and the pause of a checkpoint are lost.

    Args:
      failures, departures: of all machines in use, 1/s.
    """
    rate = np.maximum(failures, 1e-12)
    x = _best(rate * costs.pause)  # rate × the best interval
    segment = x + rate * costs.pause
    log_expm1 = segment + np.log(-np.expm1(-segment))
    failed = rate * (costs.restart + costs.save - costs.pause)
    return np.log(x) - failed - log_expm1 - np.log1p(departures * (costs.restart + costs.pause))


def decide(job: Job) -> Decision:
    """Whether to go on, to restart on another count of machines, or to write a checkpoint.

    A restart on m machines instead of n pays if ln(g_m / g_n) > patience × k / H. g is the speed
    kept in the long run (`log_efficiency`). k is what the restart takes, with the checkpoint before
    it or, if that is less, the work since the last one. H is how long that holds: over a time of
    mean H, exponentially distributed, n machines do g_n H and m, which begin k later,
    g_m H exp(−k / H).

    It holds until one of the m leaves, and until more machines make a further step from count to
    count possible: who takes in j steps by one restart lets them wait for (j + 1) / 2 more of
    them on average (the economic order quantity, Harris 1913). So 1 / H is m × the rate of leaving
    + 2 / (j + 1) × the rate of steps. Each of the two is at most 1 / the time since the last such
    event, for a cluster's nights are not as its days: so waiting never loses much more than the
    restart that it saves.

    What stands still for a loss, or will for an announced one, restarts anyway: no k then.

    Raises:
      ValueError: names the field that cannot be, and what would be right.
    """
    _check(job)
    n, there, kept = job.machines, job.available, _kept(job)
    choices = {m: score for m, score in _choices(job, kept).items() if needs(job, m) <= there}
    save = bool(n) and not job.lost and job.unsaved > job.costs.save
    if not choices:
        why = f"waits: {there} machines are there, it needs {min(job.speeds)}"
        return Decision(0, False, save, there, math.inf, why)
    best = max(choices, key=choices.get)
    spares = _spares(job, best, kept)
    if best == n and not job.lost:
        save, again, why = _checkpoint(job)
        return Decision(n, False, save, spares, again, why)
    if not n:
        why = f"starts on {best} of {there} machines"
    elif job.lost:
        why = f"{job.lost} of {n} machines lost: restarts on {best} of {there}"
    else:
        gain = job.speeds[best] / job.speeds[n] - 1
        anyway = ", which is due anyway" if job.leaving else ""
        why = f"from {n} to {best} machines: {gain:+.0%} for a restart of {_restart(job):.0f} s"
        why += anyway
    return Decision(best, True, save, spares, math.inf, why)


def divide(jobs: Sequence[Job], machines: int) -> list[int]:
    """How many machines each job should run on, 0 for none.

    The exact maximum of Σ weight × score, where `decide` has the score: proportional fairness
    (Kelly 1997). A machine goes where it adds the greatest share of a job's own speed, weighted,
    so that tokens of a small and of a large model need not be compared; no job loses its least
    count while another has more; and a machine moves from job to job only if that pays for both
    restarts.

    Args:
      jobs: their `available` does not count.
      machines: in all that nobody has announced to leave, the jobs' own included.

    Raises:
      ValueError: as `decide`.
    """
    plans = {0: (0.0, ())}  # machines used: the best score, and the counts that reach it
    for job in jobs:
        _check(job)
        # ln of no speed at all: to stop is what happens only where nothing else fits.
        choices = _choices(job, _kept(job))
        if not (job.machines and job.saving):
            choices = choices | {0: -1e3}
        found = {}
        for used, (score, counts) in plans.items():
            for count, more in choices.items():
                total = used + needs(job, count)
                value = score + job.weight * more
                if total <= machines and (total not in found or value > found[total][0]):
                    found[total] = (value, (*counts, count))
        plans = found
    return list(max(plans.values())[1])


def needs(job: Job, count: int) -> int:
    """Machines that stay which a job takes to run on so many: to go on, none for those leaving."""
    return count - job.leaving if count == job.machines and not job.lost else count


def _check(job: Job) -> None:
    costs, speeds = job.costs, job.speeds
    finite = all(0 < speed < math.inf for speed in speeds.values())
    if not speeds or min(speeds) < 1 or not finite:
        raise ValueError(
            f"speeds={dict(speeds)} must give tokens/s above 0 at one or more counts of machines."
        )
    if not 0 < job.weight < math.inf:
        raise ValueError(f"weight={job.weight} must be a positive number.")
    if not 0 < costs.pause <= costs.save or costs.restart <= 0:
        raise ValueError(f"{costs}: restart and pause must be positive, and save at least pause.")
    if job.machines and job.machines not in speeds:
        known = ", ".join(map(str, sorted(speeds)))
        raise ValueError(f"machines={job.machines} must be 0 or a count that has a speed: {known}.")
    if job.lost + job.leaving > job.machines or min(job.lost, job.leaving, job.available) < 0:
        raise ValueError(
            f"lost={job.lost} and leaving={job.leaving} are of machines={job.machines}, and none"
            f" of these, nor available={job.available}, is negative."
        )


def _kept(job: Job) -> dict[int, float]:
    """By count of machines: the logarithm of the speed that is kept in the long run."""
    counts = np.array(sorted(job.speeds))
    failures, departures = counts * job.rates.failures, counts * job.rates.departures
    shares = log_efficiency(job.costs, failures, departures).tolist()
    return {
        count: math.log(job.speeds[count]) + share
        for count, share in zip(counts.tolist(), shares, strict=True)
    }


def _restart(job: Job) -> float:
    return job.costs.restart + min(job.costs.save, job.unsaved)


def _choices(job: Job, kept: dict[int, float]) -> dict[int, float]:
    """Counts of machines and their scores; to stay comes first."""
    n = job.machines
    if not n or job.lost:
        return kept
    if job.saving:
        return {n: kept[n]}
    k = 0.0 if job.leaving else job.patience * _restart(job)
    leave, counts = job.rates.failures + job.rates.departures, list(kept)

    def ends(m: int) -> float:
        """1 / H."""
        larger = [count for count in counts if count > m]
        grows = job.rates.arrivals / (larger[0] - m) if larger else 0.0
        steps = max(counts.index(m) - counts.index(n), 0)
        leaves = min(m * leave, 1 / max(job.since_left, 1.0))
        return leaves + min(2 / (steps + 1) * grows, 1 / max(job.since_came, 1.0))

    return {n: kept[n]} | {m: kept[m] - k * ends(m) for m in kept if m != n}


def _checkpoint(job: Job) -> tuple[bool, float, str]:
    """Of a job that goes on: whether a checkpoint is due, when to ask again, and why."""
    save = job.costs.save
    if job.saving:
        return False, math.inf, "a checkpoint is being written"
    last = job.notice - 1.1 * save  # a tenth for safety
    if last <= 1e-6 and job.unsaved and job.notice >= save:
        return True, math.inf, f"checkpoint: a machine leaves in {job.notice:.0f} s"
    interval = job.save_every or best_interval(job.costs.pause, job.machines * job.rates.failures)
    due = max(interval, save) - job.unsaved  # one at a time
    if last < max(due, 0) + save:  # no other is ready before
        return False, last if last > 1e-6 else math.inf, "goes on until a machine leaves"
    if due <= 1e-6:
        return True, math.inf, f"checkpoint: {job.unsaved:.0f} s after the last"
    return False, due, "goes on"


def _spares(job: Job, machines: int, kept: dict[int, float]) -> int:
    """Machines to hold beside those that it runs on.

    Those that it would take in at its next restart. Beyond them the first, second, … as long as
    what they save on average (the speed that one loss costs, × the chance that so many are lost
    before another comes) is the speed of one machine.
    """
    own = needs(job, machines)
    free = max(job.available - own, 0)
    best = max((m for m in kept if m <= own + free), key=kept.get, default=machines)
    below = max((math.exp(kept[m]) for m in kept if m < best), default=0.0)
    whole = math.exp(kept[best])
    leave = best * (job.rates.failures + job.rates.departures)
    likely = leave / (leave + job.rates.arrivals) if leave else 0.0
    more = sum(likely**i * (whole - below) >= whole / best for i in range(1, free + 1))
    return min(max(best - own, 0) + more, free)
