"""Says what a run takes, before anything is run: memory, time, and the settings for a machine.

  python -m experiments.plan --config=configs/baichuan2_13b.py --topology=h100:128x8
  python -m experiments.plan --config=configs/baichuan2_7b.py --topology=v5e:16x16 --apply=7b.py
  python -m experiments.plan --topology=list
  python -m experiments.plan --tokens=2.6e12 --cores=4096 --accelerator=v5p --kept=0.4

With --config or --topology it plans a training run (§2.7), else how so many raw --tokens are
prepared (§2.1); --what says so outright. A run's layout is searched, but for the settings in --fix;
--as_is takes the config's own. --apply writes the config with that layout, for
`experiments.pretrain`. It exits with 1 where nothing fits.
"""

import dataclasses
import pathlib
import re
import shlex
import sys

from absl import app, flags
from ml_collections import config_flags

from baichuan_jax.data.prepare import plan as preparing
from experiments.errors import in_one_line
from experiments.recipe_flags import parse_flags

_WHAT = flags.DEFINE_enum("what", None, ["run", "data"], "What to plan; see above.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/ladder.py:384.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "CHIP:SHAPE or FILE.json; list: chips by name.")
_FIX = flags.DEFINE_string("fix", "", "To keep, as mesh.tensor=2,training.remat=qkv,gate_up.")
_AS_IS = flags.DEFINE_boolean("as_is", False, "Takes the config's layout; searches nothing.")
_ASSUME = flags.DEFINE_list("assume", [], "Other rates, as products=0.6,logit_bytes=0.")
_PLOT = flags.DEFINE_string("plot", "", "Folder for memory.png and time.png.")
_APPLY = flags.DEFINE_string("apply", "", "FILE.py to write.")
_TOKENS = flags.DEFINE_float("tokens", 1e12, "Raw tokens.")
_CORES = flags.DEFINE_integer("cores", 1_000, "To spread the work over.")
_ACCELERATOR = flags.DEFINE_enum("accelerator", "h100", list(preparing.ACCELERATORS), "Its kind.")
_FIELDS = dataclasses.fields(preparing.Assumptions)
for _field in _FIELDS:
    _define = flags.DEFINE_integer if isinstance(_field.default, int) else flags.DEFINE_float
    _define(_field.name, _field.default, f"Assumed: {_field.metadata['meaning']}.")


def _data():
    assumptions = preparing.Assumptions(**{f.name: flags.FLAGS[f.name].value for f in _FIELDS})
    asked = (_TOKENS.value, _CORES.value, assumptions)
    try:
        yield from preparing.lines(*asked, accelerator=_ACCELERATOR.value)
    except ValueError as error:
        raise ValueError(f"--{error}") from error  # it begins with the name


def _run():
    # These import JAX, which preparing does without.
    from baichuan_jax.parallel import plan, plan_plot, plan_table, recipe, topology

    if _TOPOLOGY.value == "list":
        yield from topology.listing()
        return
    if not (_CONFIG.value and _TOPOLOGY.value):
        raise ValueError("--topology=CHIP:SHAPE and --config=RECIPE are both needed.")
    if pathlib.Path(_PLOT.value).is_file():
        raise ValueError(f"--plot={_PLOT.value} is a file, and should be a folder.")
    if _APPLY.value:
        recipe.check(pathlib.Path(_APPLY.value))
    machine = topology.parse(_TOPOLOGY.value)
    fixed = re.split(r",(?=\w+\.\w+=)", _FIX.value) if _FIX.value else []
    found = plan.plan(_CONFIG.value, machine, _AS_IS.value, fixed, _ASSUME.value)
    yield from plan_table.lines(found)
    if _PLOT.value:
        yield f"Pictures: {', '.join(map(str, plan_plot.draw(found, pathlib.Path(_PLOT.value))))}"
    if not found.fits:
        raise plan.DoesNotFit(found.nearest())
    if _APPLY.value:
        command = shlex.join(["python", "-m", "experiments.plan", *sys.argv[1:]])
        recipe.write(found, _CONFIG.value, pathlib.Path(_APPLY.value), command)
        yield f"Written: {_APPLY.value}"


@in_one_line()
def main(_: list[str]) -> None:
    training = _WHAT.value == "run" or (not _WHAT.value and (_CONFIG.value or _TOPOLOGY.value))
    for line in _run() if training else _data():
        print(line)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
