"""The decision function: published and brute-force optima, and what it must never do."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from baichuan_jax.training.scheduling import (
    Costs,
    History,
    Job,
    Rates,
    best_interval,
    decide,
    divide,
    log_efficiency,
)

HOUR = 3_600.0
COSTS = Costs(restart=300.0, pause=15.0, save=60.0)
QUIET = Rates(failures=1e-9, departures=0.0, arrivals=1e-9)
SPEEDS = {n: 1_000.0 * n for n in (1, 2, 3, 4, 6, 8)}


def job(**fields) -> Job:
    return Job(**{"speeds": SPEEDS, "costs": COSTS, "rates": QUIET, **fields})


def random_job(rng) -> Job:
    counts = sorted(rng.choice(np.arange(1, 17), 5, replace=False).tolist())
    costs = Costs(rng.uniform(10, 2_000), rng.uniform(1, 50), rng.uniform(50, 200))
    return Job(
        speeds={n: float(n ** rng.uniform(0.7, 1)) for n in counts},
        costs=costs,
        rates=Rates(*(10 ** rng.uniform(-8, -5, 2)), 10 ** rng.uniform(-6, -3)),
        machines=int(rng.choice(counts)),
        unsaved=float(rng.uniform(0, 300)),
        since_left=float(rng.uniform(0, 5_000)),
        since_came=float(rng.uniform(0, 5_000)),
    )


@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_best_interval_is_dalys(mtbf, minutes):
    """Figures 3 to 5 of Daly 2006: checkpoints of five minutes."""
    assert best_interval(5, 1 / mtbf) == pytest.approx(minutes, rel=1e-2)


def test_best_interval_loses_least_and_nears_youngs():
    pause, rate = 60.0, 1 / (6 * HOUR)
    taus = np.linspace(600, 3_000, 24_001)
    kept = taus / np.expm1(rate * (taus + pause))
    assert best_interval(pause, rate) == pytest.approx(taus[np.argmax(kept)], abs=0.2)
    assert best_interval(1, 1e-6) == pytest.approx(math.sqrt(2 / 1e-6), rel=1e-3)
    assert best_interval(pause, 0) == math.inf
    for rate_of_few in (1e-9, 1e-12, 1e-15):  # where 1 + W cancels
        expected = pytest.approx(math.sqrt(2e-5 / rate_of_few), rel=1e-5)
        assert best_interval(1e-5, rate_of_few) == expected
        rates = np.array([rate_of_few]), np.array([0.0])
        assert -1e-6 < log_efficiency(Costs(1e-3, 1e-5, 1e-5), *rates) < 0
    share = np.exp(log_efficiency(Costs(300, pause, pause), np.array([rate]), np.array([0.0])))
    assert share == pytest.approx(rate * kept.max() * math.exp(-rate * 300), rel=1e-6)


def test_history_begins_with_a_belief_and_learns():
    history, month = History(), 30 * 24 * HOUR
    assert dataclasses.astuple(history.rates(COSTS)) == (pytest.approx(1 / month),) * 3
    history.seconds, history.machine_seconds, history.came = 1_000 * HOUR, 8_000 * HOUR, 500
    history.left.update({0.0: 1_000, COSTS.save: 500})
    rates = history.rates(COSTS)
    assert rates.failures == pytest.approx(1 / (8 * HOUR), rel=0.01)
    assert rates.departures == pytest.approx(1 / (16 * HOUR), rel=0.01)
    assert rates.arrivals == pytest.approx(1 / (2 * HOUR), rel=0.1)
    # For a job whose checkpoint takes longer than the notice, all were failures.
    slow = history.rates(dataclasses.replace(COSTS, save=COSTS.save + 1))
    assert slow.failures == pytest.approx(1.5 / (8 * HOUR), rel=0.01)


def test_grows_only_where_that_trains_more_until_it_ends():
    """The expected tokens, by drawing when it ends; machines leave too rarely to count else."""
    rng = np.random.default_rng(0)
    grown = 0
    for _ in range(300):
        ends = rng.uniform(500, 5_000)
        rates = Rates(failures=1e-12, departures=0.0, arrivals=1 / ends)
        costs = Costs(rng.uniform(50, 2_000), 1e-3, 1e-3)
        speeds = {4: 4.0, 5: 4.0 + rng.uniform(0.2, 3), 6: 1e-3}
        got = decide(job(speeds=speeds, costs=costs, rates=rates, machines=4, available=5))
        times = -ends * np.log1p(-(np.arange(20_000) + 0.5) / 20_000)
        gains = np.maximum(times - costs.restart, 0).mean() * speeds[5] / (times.mean() * 4)
        if abs(gains - 1) > 0.02:
            assert got.restart == (gains > 1) and got.machines == (5 if gains > 1 else 4), gains
            grown += got.restart
    assert 50 < grown < 250


def test_of_a_lower_cost_more_is_made():
    rng, seen = np.random.default_rng(1), set()
    for _ in range(200):
        asked = random_job(rng)
        grew = []
        for restart in (1, 10, 100, 1e3, 1e4, 1e5):
            costs = dataclasses.replace(asked.costs, restart=restart)
            # A fixed long-run speed: else dearer restarts may make fewer machines the better ones.
            rates = dataclasses.replace(asked.rates, failures=1e-12, departures=0.0)
            got = decide(dataclasses.replace(asked, costs=costs, rates=rates, available=16))
            grew.append(got.restart)
        assert grew == sorted(grew, reverse=True)
        seen.add(sum(grew))
    assert len(seen) > 3


def test_long_quiet_makes_it_grow():
    often = Rates(failures=1e-7, departures=0.0, arrivals=3e-3)
    asked = job(rates=often, machines=3, available=4)
    assert decide(asked).machines == 3
    assert decide(dataclasses.replace(asked, since_came=2 * HOUR)).machines == 4
    often = Rates(failures=0.0, departures=1e-3, arrivals=1e-9)
    asked = job(rates=often, costs=Costs(100, 1, 1), machines=3, available=4)
    assert decide(asked).machines == 3
    assert decide(dataclasses.replace(asked, since_left=2 * HOUR)).machines == 4


def test_waits_for_those_to_come_only_where_they_would_be_taken():
    often = Rates(failures=1e-9, departures=0.0, arrivals=3e-3)
    assert decide(job(rates=often, machines=6, available=8)).machines == 8  # no more would be
    more = SPEEDS | {9: 9_000.0}
    assert decide(job(speeds=more, rates=often, machines=6, available=8)).machines == 6


def test_chooses_only_what_there_is():
    rng = np.random.default_rng(2)
    for _ in range(500):
        asked, there = random_job(rng), int(rng.integers(0, 17))
        lost = int(rng.integers(0, asked.machines + 1))
        if not lost and asked.machines > there:
            continue
        got = decide(dataclasses.replace(asked, lost=lost, available=there))
        fitting = [n for n in asked.speeds if n <= there]
        assert got.machines in fitting if fitting else got.machines == 0
        assert 0 <= got.spares <= there - got.machines
        if lost:
            assert got.restart == bool(fitting) and not got.save


@pytest.mark.parametrize(("there", "runs"), [(7, 6), (5, 4), (1, 1), (0, 0)])
def test_shrinks_when_it_must(there, runs):
    got = decide(job(machines=8, lost=8 - there, available=there))
    assert (got.machines, got.restart) == (runs, runs > 0)
    assert "lost" in got.why if runs else "needs 1" in got.why


def test_a_spare_stands_in_for_a_lost_one():
    got = decide(job(machines=6, lost=1, available=6))
    assert (got.machines, got.restart) == (6, True)


def test_more_machines_than_pay_are_not_taken():
    slower = {2: 10.0, 4: 19.0, 8: 18.0}
    assert decide(job(speeds=slower, available=8)).machines == 4
    hopeless = Rates(failures=1.0, departures=0.0, arrivals=1e-3)
    assert decide(job(rates=hopeless, available=8)).machines == 1
    # Each machine fails every hour: eight of them never get through a restart and a checkpoint.
    failing = Rates(failures=1 / HOUR, departures=0.0, arrivals=1e-3)
    assert decide(job(rates=failing, costs=Costs(900, 60, 60), available=8)).machines < 6


def test_checkpoints_are_due_by_the_rate_of_the_machines_in_use():
    rates = Rates(failures=1e-6, departures=1.0, arrivals=1e-9)
    interval = best_interval(COSTS.pause, 4e-6)
    early = decide(job(rates=rates, machines=4, available=4, unsaved=interval - 10))
    assert not early.save and early.again == pytest.approx(10)
    assert decide(job(rates=rates, machines=4, available=4, unsaved=interval)).save
    assert not decide(job(machines=4, available=4, unsaved=1e9, saving=True)).save
    assert decide(job(machines=4, available=4, unsaved=500, save_every=500)).save


def test_a_warning_is_answered_as_late_as_there_is_time():
    warned = job(machines=4, leaving=1, available=3, unsaved=500)
    early = decide(dataclasses.replace(warned, notice=600))
    assert not early.save and not early.restart
    assert early.again == pytest.approx(600 - 1.1 * COSTS.save)
    late = decide(dataclasses.replace(warned, notice=600 - early.again))
    assert late.save and not late.restart and "leaves in 66 s" in late.why
    vain = decide(dataclasses.replace(warned, notice=COSTS.save - 1))
    assert not vain.save and not vain.restart
    # As the restart is due anyway, more machines cost nothing.
    dear = dataclasses.replace(warned, costs=Costs(1e5, 15, 60), notice=600)
    assert decide(dataclasses.replace(dear, available=6)).machines == 6
    assert decide(dataclasses.replace(dear, available=4)).machines == 4
    assert not decide(dataclasses.replace(dear, available=4)).restart


def test_growing_saves_what_is_worth_it():
    for unsaved, saves in ((COSTS.save - 1, False), (COSTS.save + 1, True)):
        got = decide(job(machines=4, available=8, unsaved=unsaved))
        assert (got.machines, got.restart, got.save) == (8, True, saves)


def test_spares_are_held_while_they_pay():
    """One loss of four costs two machines' speed, at even odds that it comes before a machine."""
    rates = Rates(failures=1e-5, departures=0.0, arrivals=3.9e-5)
    speeds, costs = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, Costs(1e-3, 1e-6, 1e-6)
    assert decide(job(speeds=speeds, costs=costs, rates=rates, available=7)).spares == 1
    rare = dataclasses.replace(rates, failures=1e-6)
    assert decide(job(speeds=speeds, costs=costs, rates=rare, available=7)).spares == 0
    # What the next restart will take in is held.
    dear = job(rates=rates, costs=Costs(HOUR, 15, 60), machines=6, available=8)
    assert (decide(dear).machines, decide(dear).spares) == (6, 2)


def test_divide_is_the_exact_optimum():
    rng = np.random.default_rng(3)
    never = Rates(0.0, 0.0, 0.0)
    for _ in range(30):
        jobs = [
            dataclasses.replace(random_job(rng), machines=0, rates=never, weight=rng.uniform(1, 3))
            for _ in range(3)
        ]
        machines = int(rng.integers(sum(min(j.speeds) for j in jobs), 40))
        values = {
            counts: sum(j.weight * math.log(j.speeds[n]) for j, n in zip(jobs, counts, strict=True))
            for counts in itertools.product(*(j.speeds for j in jobs))
            if sum(counts) <= machines
        }
        got = tuple(divide(jobs, machines))
        assert values[got] == pytest.approx(max(values.values()), abs=1e-9)


def test_divide_by_weight_and_leaves_alone_what_runs():
    speeds = {n: float(n) for n in range(1, 9)}
    small, large = job(speeds=speeds), job(speeds={n: v / 100 for n, v in speeds.items()})
    assert divide([small, large], 8) == [4, 4]
    assert divide([dataclasses.replace(small, weight=3.0), large], 8) == [6, 2]
    busy = Rates(failures=1e-5, departures=0.0, arrivals=1e-4)
    runs = [dataclasses.replace(j, machines=4, rates=busy) for j in (small, large)]
    lost = dataclasses.replace(runs[0], lost=1)
    assert divide([lost, runs[1]], 7) == [3, 4]  # not 4 and 3, with two restarts
    lost = dataclasses.replace(runs[0], lost=3)
    assert divide([lost, runs[1]], 5) in ([2, 3], [3, 2])  # one and four are worth both
    fresh = dataclasses.replace(runs[0], machines=0)
    assert divide([fresh, runs[1]], 4) in ([1, 3], [2, 2])  # everybody has the least
    assert divide([fresh, dataclasses.replace(runs[1], saving=True)], 4) == [0, 4]
    assert divide([job(speeds={4: 1.0}), job(speeds={3: 1.0})], 4) in ([4, 0], [0, 3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speeds": {}}, "speeds={} must give tokens/s"),
        ({"speeds": {2: 0.0}}, "speeds="),
        ({"speeds": {1: 1.0, 2: math.nan}}, "speeds="),
        ({"weight": 0.0}, "weight=0.0 must be a positive number"),
        ({"costs": Costs(300, 0, 60)}, "restart and pause must be positive"),
        ({"costs": Costs(300, 90, 60)}, "save at least pause"),
        ({"machines": 5}, "a count that has a speed: 1, 2, 3, 4, 6, 8"),
        ({"machines": 2, "lost": 2, "leaving": 1}, "lost=2 and leaving=1 are of machines=2"),
    ],
)
def test_refuses_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        decide(job(**fields))
