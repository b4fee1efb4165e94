"""Says what a run of so many tokens takes, before anything is run.

python -m experiments.plan --what=data --tokens=1e12
python -m experiments.plan --what=data --tokens=2.6e12 --cores=4096 --accelerator=v5p --kept=0.4

Preparing data (§2.1): core-hours, shuffle, memory and accelerator-hours of every stage.
"""

import dataclasses
import sys

from absl import app, flags

from baichuan_jax.data.prepare import plan

_WHAT = flags.DEFINE_enum("what", "data", ["data"], "What to plan.")
_TOKENS = flags.DEFINE_float("tokens", 1e12, "Raw tokens.")
_CORES = flags.DEFINE_integer("cores", 1_000, "To spread the work over.")
_ACCELERATOR = flags.DEFINE_enum("accelerator", "h100", list(plan.ACCELERATORS), "Its kind.")
_FIELDS = dataclasses.fields(plan.Assumptions)
for _field in _FIELDS:
    _define = flags.DEFINE_integer if isinstance(_field.default, int) else flags.DEFINE_float
    _define(_field.name, _field.default, f"Assumed: {_field.metadata['meaning']}.")


def main(_: list[str]) -> None:
    values = {field.name: flags.FLAGS[field.name].value for field in _FIELDS}
    assumptions = plan.Assumptions(**values)
    try:
        lines = plan.lines(_TOKENS.value, _CORES.value, assumptions, accelerator=_ACCELERATOR.value)
        print("\n".join(lines))
    except ValueError as error:
        sys.exit(f"ValueError: --{error}")


if __name__ == "__main__":
    app.run(main)
