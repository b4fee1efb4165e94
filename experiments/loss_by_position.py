"""Loss against position of runs that read longer texts than they were trained with.

python -m experiments.loss_by_position --checkpoints=runs/rope,runs/alibi --length=4096 \
    --plot=loss_by_position.png

A run with RoPE is read with each of --scalings, by the factor of --length to what it was trained
with; one with ALiBi as it is. Read are the long ones of the documents that the runs held out.
"""

import pathlib

from absl import app, flags

from baichuan_jax.config import ROPE_SCALINGS
from baichuan_jax.inference import loss_by_position
from baichuan_jax.model import cpu
from baichuan_jax.training.metrics import quiet_logs
from experiments.errors import in_one_line

_NAMES = [loss_by_position.AS_TRAINED, *ROPE_SCALINGS[1:]]
_CHECKPOINTS = flags.DEFINE_list("checkpoints", None, "Folders of runs.", required=True)
_LENGTH = flags.DEFINE_integer("length", 4_096, "Tokens that are read at a time.", 2)
_SCALINGS = flags.DEFINE_list("scalings", _NAMES, f"Of RoPE: some of {','.join(_NAMES)}.")
_SOURCES = flags.DEFINE_string("sources", "", "Text: NAME=PATH or PATH,…; '': what was held out.")
_MAX_ROWS = flags.DEFINE_integer("max_rows", 0, "Rows of --length tokens at most; 0: all.", 0)
_PLOT = flags.DEFINE_string("plot", "", "FILE.png to draw.")


@in_one_line()
def main(_):
    quiet_logs()
    cpu.keep_memory()
    options = {"text": _SOURCES.value, "max_rows": _MAX_ROWS.value}
    curves = loss_by_position.read(_CHECKPOINTS.value, _LENGTH.value, _SCALINGS.value, **options)
    print(*loss_by_position.table(curves), sep="\n")
    if _PLOT.value:
        loss_by_position.draw(curves, pathlib.Path(_PLOT.value))


if __name__ == "__main__":
    app.run(main)
