"""The simulator beside closed forms and hand-made traces; the policy beside the others."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from baichuan_jax.training.cluster import Work, bound, goodputs, ideal_counts, simulate
from baichuan_jax.training.compare_policies import BOUND, compare, plot, table
from baichuan_jax.training.scheduling import Costs
from baichuan_jax.training.traces import DAY, KINDS, Change, Trace, draw

COSTS = Costs(restart=300.0, pause=60.0, save=60.0)


def gone(*spans, notice=0.0):
    """Changes of (machine, leaves, comes)."""
    changes = [Change(leaves, machine, False, notice) for machine, leaves, _ in spans]
    changes += [Change(comes, machine, True) for machine, _, comes in spans]
    return tuple(sorted(changes, key=lambda change: (change.time, change.comes)))


@pytest.mark.parametrize("interval", [1_200.0, 3_600.0])
def test_one_machine_beside_dalys_formula(interval):
    """Failures at 1 / mtbf, back at once: τ / E(time of a segment), Daly 2006."""
    mtbf, days = 7_200.0, 60
    times = np.cumsum(np.random.default_rng(0).exponential(mtbf, 2 * days * 12))
    times = times[times < days * DAY]
    trace = Trace(1, days * DAY, gone(*((0, time, time) for time in times)))
    work = Work({1: 2.0}, COSTS, save_every=interval)
    [outcome] = simulate(trace, [work]).jobs
    segment = mtbf * math.exp(300 / mtbf) * math.expm1((interval + 60) / mtbf)
    error = 3 * math.sqrt(len(times)) / len(times)  # of the loss
    expected = interval / segment
    assert abs(outcome.tokens / 2 / trace.seconds - expected) < error * (1 - expected)
    assert outcome.restarts == len(times) + 1
    assert sum(outcome.seconds.values()) == pytest.approx(trace.seconds)


def test_without_events_only_checkpoints_cost():
    trace = Trace(2, 300 + 10 * 1_060.0, ())
    work = Work({2: 5.0}, COSTS, save_every=1_000)
    [outcome] = simulate(trace, [work]).jobs
    assert outcome.tokens == pytest.approx(5 * 10_000)
    assert (outcome.restarts, outcome.checkpoints) == (1, 10)
    assert goodputs([outcome], [work], trace) == [pytest.approx(10_000 / trace.seconds)]
    assert bound([work], trace) == 1


def test_a_failure_costs_what_was_not_saved():
    """Of two machines one fails at 2,000 s and comes back at 2,100 s, into the restart."""
    trace = Trace(2, 4_000.0, gone((1, 2_000, 2_100)))
    [outcome] = simulate(trace, [Work({2: 2.0}, COSTS, save_every=1_000)]).jobs
    # Start, train, checkpoint until 1,360; 640 s in vain; wait 100, restart 300, then to the end:
    # 1,000 s, a checkpoint, 540 s.
    assert outcome.seconds == {
        "trains": pytest.approx(1_000 + 1_000 + 540),
        "lost": pytest.approx(640),
        "saves": pytest.approx(60 + 60),
        "restarts": pytest.approx(600),
        "waits": pytest.approx(100),
    }
    assert outcome.tokens == pytest.approx(2 * 2_540)


def test_shrinks_and_grows():
    trace = Trace(2, 20_000.0, gone((1, 2_000, 2_400)))
    work = Work({1: 1.0, 2: 2.0}, COSTS, save_every=1_000, patience=0)
    [outcome] = simulate(trace, [work]).jobs
    # On one machine from 2,300 on; after 100 s it grows, saves first, and is back at 2,760.
    assert [round(time) for time, _ in outcome.log] == [0, 2_000, 2_400]
    rest = 20_000 - 2_760
    trained = rest // 1_060 * 1_000 + rest % 1_060
    assert outcome.tokens == pytest.approx(2 * 1_000 + 100 + 2 * trained)


def test_a_warning_saves_the_work():
    trace = Trace(2, 4_000.0, gone((1, 2_000, 9_999), notice=120.0))
    work = Work({1: 1.0, 2: 2.0}, COSTS, save_every=1e9)
    [outcome] = simulate(trace, [work]).jobs
    # Until 66 s before; then 60 s of checkpoint, 6 s in vain, a restart, one machine.
    assert outcome.tokens == pytest.approx(2 * (2_000 - 66 - 300) + 4_000 - 2_300)
    assert outcome.seconds["lost"] == pytest.approx(6)
    short = dataclasses.replace(trace, changes=gone((1, 2_000, 9_999), notice=50.0))
    [outcome] = simulate(short, [work]).jobs
    assert outcome.tokens == pytest.approx(4_000 - 2_300)


def test_an_asynchronous_checkpoint_counts_when_it_is_written():
    costs = Costs(restart=300, pause=10, save=200)
    work = Work({1: 1.0}, costs, save_every=1_000)
    for fails, kept in ((1_499.0, 0), (1_501.0, 1_000)):  # begun at 1,300
        trace = Trace(1, 1_600.0, gone((0, fails, fails)))
        assert simulate(trace, [work]).jobs[0].tokens == pytest.approx(kept)


def test_a_spare_stands_in_and_other_jobs_go_on():
    speeds = {n: float(n) for n in range(1, 4)}
    works = [Work(speeds, COSTS, save_every=1e9), Work(speeds, COSTS, save_every=1e9)]
    trace = Trace(6, 5_000.0, gone((0, 2_000, 9_999)))
    first, second = simulate(trace, works).jobs
    assert (first.restarts, second.restarts) == (2, 1)
    assert second.tokens == pytest.approx(3 * 4_700)
    assert first.tokens == pytest.approx(2 * (5_000 - 2_300))
    fixed = [dataclasses.replace(work, speeds={2: 2.0}) for work in works]
    result = simulate(trace, fixed)
    assert result.jobs[0].tokens == pytest.approx(2 * (5_000 - 2_300))  # on a spare
    assert result.present == pytest.approx(6 * 5_000 - 3_000)
    assert result.given_back == 0  # without a spare a loss stops it


def test_machines_that_gain_nothing_are_given_back():
    result = simulate(Trace(4, 5_000.0, ()), [Work({1: 1.0, 2: 2.0}, COSTS)])
    assert (result.present, result.given_back) == (20_000, 10_000)


def test_a_job_that_shrinks_hands_over_when_it_has_saved():
    """Machines are too few for both: the second job's start takes one from the first."""
    works = [Work({1: 1.0, 2: 2.0}, COSTS, save_every=1e9), Work({1: 1.0}, COSTS, save_every=1e9)]
    trace = Trace(3, 5_000.0, gone((2, 2_000, 9_999)))
    first, second = simulate(trace, works).jobs
    assert (first.restarts, second.restarts) == (2, 2)
    assert first.tokens == pytest.approx(2 * 1_700 + 5_000 - 2_360)
    assert second.tokens == pytest.approx(5_000 - 2_360)  # its own machine was lost


def test_a_job_that_gives_way_saves_first():
    """With one machine the light job runs alone; when two are there the heavy one takes both."""
    light = Work({1: 1.0}, COSTS, save_every=1e9)
    heavy = Work({2: 2.0}, COSTS, save_every=1e9, weight=2.0)
    trace = Trace(3, 5_000.0, gone((2, 2_000, 3_000), (0, 2_000, 9_999)))
    first, second = simulate(trace, [heavy, light]).jobs
    assert [why.split(":")[0] for _, why in first.log] == [
        "starts on 2 of 2 machines",
        "waits",
        "starts on 2 of 2 machines",
    ]
    # Both lose what they did until 2,000 s; what the light one did after 2,300 s is saved.
    assert first.tokens == pytest.approx(2 * (5_000 - 3_360))
    assert (second.tokens, second.seconds["lost"]) == (700, 1_700)
    assert second.checkpoints == 1


@pytest.mark.parametrize("kind", KINDS)
def test_traces(kind):
    trace = draw(kind, 12, 20, seed=3)
    assert trace == draw(kind, 12, 20, seed=3) != draw(kind, 12, 20, seed=4)
    times = [change.time for change in trace.changes]
    assert times == sorted(times) and times[0] >= 0 and times[-1] < trace.seconds
    for machine in range(12):
        comes = [change.comes for change in trace.changes if change.machine == machine]
        assert comes == [bool(i % 2) for i in range(len(comes))]
    leaves = [change for change in trace.changes if not change.comes]
    # Of machines that age, more than 1.2: at the start all are fresh.
    per_day = {"stable": 0.4, "ageing": 1.5, "spot": 29, "spot, no notice": 29, "diurnal": 6.4}
    assert len(leaves) / 20 == pytest.approx(per_day[kind], rel=0.1, abs=0.5)
    assert any(change.notice for change in leaves) == (kind in ("spot", "diurnal"))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'windy' must be one of stable"):
        draw("windy", 4, 1, 0)
    with pytest.raises(ValueError, match="machines=0"):
        draw("stable", 0, 1, 0)
    with pytest.raises(ValueError, match="3 machines are too few: the jobs need 4"):
        ideal_counts([Work({2: 1.0}, COSTS)] * 2, 3)


@pytest.fixture(scope="module")
def compared():
    """Ten machines, any count of them; two days of each kind, two seeds. Goodput in percent."""
    work = Work({n: float(n) for n in range(1, 11)}, Costs(restart=600, pause=15, save=60))
    return compare([work], list(KINDS), machines=10, days=2, seeds=2)[0]


def test_the_policy_is_no_worse_than_any_other(compared):
    means = {(p, k): np.mean(x) for p, by_kind in compared.items() for k, x in by_kind.items()}
    for policy, kind in itertools.product(compared, KINDS):
        ours = means["the policy", kind]
        if policy == BOUND:
            assert ours < means[policy, kind] <= 100
        else:
            assert ours >= means[policy, kind] - 0.3, (policy, kind)
    for kind in ("spot", "spot, no notice"):  # and better where restarts are many
        assert means["the policy", kind] > 1.04 * means["grows at once", kind]


def test_what_has_too_few_machines_trains_nothing(capsys):
    """A job that runs on all four or not at all leaves no spare."""
    work = Work({4: 1.0}, COSTS)
    kept, given_back = compare([work], ["stable"], machines=4, days=1, seeds=1)
    assert kept["fixed, all machines"]["stable"] == kept["the policy"]["stable"] > [50]
    assert given_back["fixed, all machines"]["stable"] == [0]
    for policy in ("fixed, an eighth spare", "fixed, half spare"):
        assert (kept[policy]["stable"], given_back[policy]["stable"]) == ([0], [100])
    assert "policies   1/1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="3 machines are too few: the jobs need 4"):
        compare([work], ["stable"], machines=3, days=1, seeds=1)


def test_table_and_plot(compared, tmp_path):
    lines = table("goodput, %", compared).splitlines()
    assert len(lines) == 2 + len(compared)
    mean, spread = (float(x) for x in lines[-1].split("|")[2].split("±"))
    stable = compared[BOUND]["stable"]
    assert (mean, spread) == (round(np.mean(stable), 1), round(np.std(stable), 1))
    plot(compared, tmp_path / "goodput.png")
    assert (tmp_path / "goodput.png").read_bytes().startswith(b"\x89PNG")
