"""The planner's memory beside the compilers', for both models on several machines."""

import copy
import dataclasses
import pathlib
from collections.abc import Iterator

import jax

from baichuan_jax.config import Config
from baichuan_jax.parallel import plan, plan_plot, topology
from baichuan_jax.parallel.chips import GIB
from baichuan_jax.training import ahead

MACHINES = (
    *("v5e:16x16", "v6e:16x16", "v5p:4x4x8", "v5p:8x8x16", "v5p:8x8x8,slices=2"),
    *("h200:1x8", "h100:128x8"),
)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One model on one machine, laid out as planned.

    Attributes:
      model: its name.
      compiler: bytes of a device's memory by the compiler.
    """

    model: str
    plan: plan.Plan
    compiler: float

    @property
    def error(self) -> float:
        """The planner's bytes, by how much they are more than the compiler's."""
        return float(self.plan.memory.peak) / self.compiler - 1


def compare(recipes: dict[str, Config], machines=MACHINES) -> Iterator[Compared]:
    """Plans and compiles each recipe for each machine; a minute each for TPUs, seconds for GPUs.

    Raises:
      ValueError: a compiler is not installed; names the extra. Or a recipe does not fit a machine.
    """
    for machine in map(topology.parse, machines):
        for name, recipe in recipes.items():
            config = copy.deepcopy(recipe)
            found = plan.plan(config, machine)
            found.layout.apply(config)
            yield Compared(name, found, ahead.compile_step(config, machine).peak)


def report(recipes: dict[str, Config], plot: str = "") -> Iterator[str]:
    """A table, line by line as the compilers are done, and a picture, FILE.png, if asked for."""
    jax.config.update("jax_platforms", "cpu")  # the machine here is not asked
    yield (
        f"{'':6}{'machine':20}{'mesh':>10}{'micro':>7}{'remat':>11}{'placement':>15}"
        f"{'plan, GiB':>11}{'compiler':>10}{'':>8}"
    )
    rows = []
    for row in compare(recipes):
        rows.append(row)
        layout = row.plan.layout
        layers = "+".join(map(str, layout.layers))
        placement = f"{layout.embedding[0]} {layers} {layout.head[0]}"
        yield (
            f"{row.model:6}{row.plan.topology.name:20}{'×'.join(map(str, layout.mesh)):>10}"
            f"{layout.micro_batches:7}{layout.remat:>11}{placement:>15}"
            f"{float(row.plan.memory.peak) / GIB:11.2f}{row.compiler / GIB:10.2f}{row.error:+8.1%}"
        )
    yield (
        "placement: of the embedding (its initial), of the layers (replicated + hierarchical +"
        " full), of the head"
    )
    if plot:
        yield f"Picture: {plan_plot.draw_compared(rows, pathlib.Path(plot))}"
