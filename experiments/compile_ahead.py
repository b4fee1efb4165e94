"""Compiles the training step for a machine that is not there (paper §2.7).

  python -m experiments.compile_ahead --config=configs/baichuan2_13b.py --topology=h200:1x8
  python -m experiments.compile_ahead --config=configs/baichuan2_13b.py --topology=v5p:8x8x16 \
    --config.mesh.replica=1 --config.mesh.fsdp=1024 --text=step.hlo

Prints the compiler's memory per device beside the plan's; each kind of collective with its bytes
beside the formula's, and the share of them that overlaps compute in the schedule (NVIDIA); and
whether a buffer of full logits or of T × T is anywhere. Exits with 1 where the step does not fit.
TPUs need `pip install -e '.[aot]'`, NVIDIA's GPUs `pip install -e '.[cuda]'`, and no device.
"""

import pathlib
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from baichuan_jax.config import validate
from baichuan_jax.parallel import topology
from baichuan_jax.parallel.flags import describe_network
from baichuan_jax.training import ahead
from baichuan_jax.training.metrics import quiet_logs
from experiments.errors import in_one_line
from experiments.recipe_flags import parse_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/ladder.py:384.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:SHAPE, as h200:1x8 or v5e:16x16; 'list'.")
_TEXT = flags.DEFINE_string("text", "", "Where to write the program's text; empty: nowhere.")
flags.mark_flag_as_required("topology")


@in_one_line()
def main(_):
    quiet_logs()
    if _TOPOLOGY.value == "list":
        print("\n".join(topology.listing()))
        return
    config, machine = _CONFIG.value, topology.parse(_TOPOLOGY.value)
    if config is None:
        raise ValueError("--config=RECIPE is missing: what to compile.")
    validate(config)
    if _TEXT.value:
        text = pathlib.Path(_TEXT.value)
        text.parent.mkdir(parents=True, exist_ok=True)
        text.open("a").close()  # what cannot be written is refused now
    if machine.platform == "gpu":
        describe_network(machine.shape[1], machine.chip.across.bandwidth)
    jax.config.update("jax_platforms", "cpu")  # the machine here is not asked
    print(f"Compiling for {machine.name}: a minute for GPUs, several for TPUs.", flush=True)
    compiled = ahead.compile_step(config, machine)
    for line in ahead.lines(config, machine, compiled):
        print(line, flush=True)
    if _TEXT.value:
        text.write_text(compiled.text, encoding="utf-8")
    if not compiled.fits:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
