"""Simulates training jobs on a cluster whose machines come and go (§2.7), by several policies.

  python -m experiments.simulate_schedule --out=goodput.png
  python -m experiments.simulate_schedule --config=configs/baichuan2_7b.py --topology=h100:16x8
  python -m experiments.simulate_schedule --jobs=jobs.json --machines=64

The job is --config with the planner's speed on 1, 2, … machines (nodes or slices) of --topology, or
those of a file: {"NAME": {"speeds": {"1": 17000, "2": 33500}, "weight": 1}}, in tokens/s. Prints,
by policy and by the time between checkpoints, goodput: tokens kept / tokens of the same time if no
machine ever left; and the share of the machines' time that a policy leaves to others. A few minutes
unless --days or --seeds are fewer.
"""

import functools

from absl import app, flags
from ml_collections import config_flags

from baichuan_jax.parallel import topology
from baichuan_jax.training import compare_policies, speeds
from baichuan_jax.training.cluster import Work
from baichuan_jax.training.metrics import quiet_logs
from baichuan_jax.training.scheduling import Costs
from baichuan_jax.training.traces import KINDS
from experiments.errors import in_one_line
from experiments.recipe_flags import parse_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe; the 13B unless told.")
_TOPOLOGY = flags.DEFINE_string("topology", "a800:32x8", "The cluster, as experiments.plan has it.")
_JOBS = flags.DEFINE_string("jobs", "", "JSON file of jobs and their speeds, instead.")
_MACHINES = flags.DEFINE_integer("machines", 32, "Of the cluster, with --jobs.", lower_bound=1)
_DAYS = flags.DEFINE_float("days", 10, "Of each trace.", lower_bound=0)
_SEEDS = flags.DEFINE_integer("seeds", 6, "Traces of each kind.", lower_bound=1)
_KINDS = flags.DEFINE_multi_enum("kind", list(KINDS), list(KINDS), "Of traces; may be repeated.")
_RESTART = flags.DEFINE_float("restart", 300, "Seconds: to notice, load and compile.")
_PAUSE = flags.DEFINE_float("pause", 15, "Seconds that a checkpoint stops training.")
_SAVE = flags.DEFINE_float("save", 60, "Seconds until a checkpoint is written.")
_OUT = flags.DEFINE_string("out", "", "PNG to draw.")


def main(_):
    quiet_logs()
    if _JOBS.value:
        jobs, machines = speeds.read(_JOBS.value), _MACHINES.value
    else:
        cluster = topology.parse(_TOPOLOGY.value)
        jobs, machines = {"job": (speeds.planned(_CONFIG.value, cluster), 1.0)}, cluster.granules
    costs = Costs(_RESTART.value, _PAUSE.value, _SAVE.value)
    works = []
    for name, (by_count, weight) in jobs.items():
        works.append(Work(by_count, costs, weight))
        each = ", ".join(f"{n}: {speed:,.0f}" for n, speed in by_count.items())
        print(f"{name}, tokens/s by machines: {each}", end="\n\n", flush=True)
    asked = (works, _KINDS.value, machines, _DAYS.value, _SEEDS.value)
    found, given_back = compare_policies.compare(*asked)
    print(compare_policies.table("goodput, %", found), end="\n\n", flush=True)
    print(compare_policies.table("given back, %", given_back), end="\n\n", flush=True)
    if _OUT.value:
        compare_policies.plot(found, _OUT.value)
    print(compare_policies.table("checkpoints every", compare_policies.compare_intervals(*asked)))


if __name__ == "__main__":
    parse = functools.partial(parse_flags, default="configs/baichuan2_13b.py")
    app.run(in_one_line()(main), flags_parser=parse)
