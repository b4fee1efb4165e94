"""Pre-trains a model of the family on your own text (paper §2).

  python -m experiments.pretrain --config=configs/baichuan2_7b.py --workdir=DIR \
    '--config.data.sources=zh=/data/zh/*.jsonl.gz,en=/data/en' \
    --config.data.tokenizer=/data/tokenizer.model

Run again with the same --workdir, it goes on from where it was. On several hosts,
experiments/launch/ has scripts for TPU VMs, GKE and Slurm; elsewhere start the same command on
each with --coordinator=auto, or with --coordinator, --num_processes and --process_id.
"""

import jax
from absl import app, flags
from ml_collections import config_flags

from baichuan_jax.model import cpu
from baichuan_jax.parallel.flags import prepare_process
from baichuan_jax.parallel.mesh import start_processes
from baichuan_jax.training.metrics import plot, quiet_logs
from baichuan_jax.training.pretrain import pretrain
from experiments.errors import in_one_line
from experiments.recipe_flags import parse_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/ladder.py:384.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder, local or gs://.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, or 'auto'.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Number of this process.")
flags.mark_flags_as_required(["config", "workdir"])


@in_one_line()
def main(_):
    quiet_logs()
    cpu.keep_memory()
    prepare_process()
    start_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    pretrain(_CONFIG.value, _WORKDIR.value)
    if jax.process_index() == 0:
        plot(_WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
