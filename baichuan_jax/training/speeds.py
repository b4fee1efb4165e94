"""How fast jobs train on each count of machines: by the planner, or as a file says."""

import dataclasses
import json
import math

from etils import epath

from baichuan_jax.config import Config
from baichuan_jax.parallel import cost, plan
from baichuan_jax.parallel.layout import Job
from baichuan_jax.parallel.topology import Topology


def planned(config: Config, topology: Topology) -> dict[int, float]:
    """Tokens/s by count of machines, of the planner's best layout for each.

    Machines are the topology's nodes or slices. A count is left out where no mesh divides the
    batch, or nothing fits.

    Raises:
      ValueError: that is so at every count; says why, of the whole topology.
    """
    field = "slices" if topology.platform == "tpu" else "shape"
    assumptions = cost.Assumptions.of(topology.chip)
    speeds, refusal = {}, None
    for count in range(1, topology.granules + 1):
        size = count if field == "slices" else (count, topology.shape[1])
        machine = dataclasses.replace(topology, **{field: size})
        try:
            found = plan.search(Job.of(config), machine, assumptions)
        except plan.DoesNotFit as error:
            refusal = error
        else:
            speeds[count] = found.tokens_per_second
    if not speeds:
        raise refusal
    return speeds


def read(path: epath.PathLike) -> dict[str, tuple[dict[int, float], float]]:
    """Speeds and weight of each job in a JSON file.

    Its form is {"NAME": {"speeds": {"1": 17000, "2": 33500}, "weight": 1}, …}.

    Raises:
      ValueError: names the file and what it should hold.
      FileNotFoundError: there is none.
    """
    try:
        jobs = {}
        for name, fields in json.loads(epath.Path(path).read_text()).items():
            speeds = {int(count): float(speed) for count, speed in fields["speeds"].items()}
            jobs[name] = (speeds, float(fields.get("weight", 1)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        form = '{"NAME": {"speeds": {"1": 17000, "2": 33500}, "weight": 1}, …}'
        raise ValueError(f"{path} should be {form}, speeds in tokens/s: {error!r}.") from error
    if not jobs:
        raise ValueError(f"{path} holds no job.")
    for name, (speeds, weight) in jobs.items():
        fields = {f"speeds.{count}": speed for count, speed in speeds.items()} | {"weight": weight}
        wrong = [f"{field}={value}" for field, value in fields.items() if not 0 < value < math.inf]
        if wrong:
            raise ValueError(f"{path}: {name}.{wrong[0]} should be a positive number.")
        if not speeds or min(speeds) < 1:
            raise ValueError(f"{path}: {name}.speeds={speeds} should be of one machine or more.")
    return jobs
