"""Turns documents into token shards: deduplicated, filtered, scored, sampled, packed (paper §2.1).

  python -m experiments.prepare_data --workdir=DIR --config.vocab_size=8192 \
    '--config.sources=zh=/data/zh/*.jsonl.gz,en=/data/en' --config.tokens.sequence_length=256
  python -m experiments.pretrain --config=configs/quickstart.py --workdir=runs/mine \
    --config.data.shards=DIR --config.model.vocab_size=8192

Run again with the same --workdir, it goes on from where it was. DIR/report.md tells what was
dropped and why. On a cluster, with `pip install -e '.[beam]'`, flags of Beam behind --beam:

  ... --runner=dataflow --workdir=gs://B/prepared --beam=--project=P --beam=--region=R \
    --beam=--temp_location=gs://B/tmp
"""

import functools
import os
import sys

from absl import app, flags
from ml_collections import config_flags

from baichuan_jax.data.prepare import engine
from baichuan_jax.data.prepare.config import PrepareConfig, to_json

# What needs JAX is imported further down: the workers import this file, too, and do without.

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe; configs/data.py unless told.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Where the prepared data goes.")
_RUNNER = flags.DEFINE_enum(
    "runner",
    "local",
    ["local", "direct", "dask", "dataflow", "flink", "spark"],
    "local: processes of this machine; the others: Apache Beam.",
)
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Local processes.", lower_bound=1)
_SHOW = flags.DEFINE_bool("show", False, "Only print all settings, as they are resolved.")
_BEAM = flags.DEFINE_multi_string("beam", [], "A further flag of Beam; may be given again.")


def _engine(folder, progress):
    if _RUNNER.value == "local":
        return engine.Local(folder, _WORKERS.value, progress)
    try:
        from baichuan_jax.data.prepare import beam
    except ImportError:
        raise ValueError(
            f"--runner={_RUNNER.value} needs Apache Beam: pip install -e '.[beam]'."
        ) from None
    return beam.Beam(folder, _RUNNER.value, _BEAM.value)


def main(_):
    from baichuan_jax.data.prepare.pipeline import prepare
    from baichuan_jax.inference.load import load
    from baichuan_jax.training.metrics import Phases, quiet_logs

    quiet_logs()
    if _SHOW.value:
        print(to_json(_CONFIG.value))
        return
    if not _WORKDIR.value:
        raise ValueError("--workdir=DIR is missing: where the prepared data goes.")
    if _RUNNER.value == "dataflow" and "://" not in _WORKDIR.value:
        raise ValueError(
            f"--workdir={_WORKDIR.value} must be one that Dataflow's workers see, such as gs://…"
        )
    with Phases() as phases:
        make_engine = functools.partial(_engine, progress=phases)
        load_model = functools.partial(load, dtype="float32")
        try:
            report = prepare(_CONFIG.value, _WORKDIR.value, make_engine, load_model)
        except KeyboardInterrupt:
            sys.exit("Interrupted. The same command goes on from here.")
    print(f"{report} is written.")


if __name__ == "__main__":
    from experiments.errors import in_one_line
    from experiments.recipe_flags import parse_flags

    parse = functools.partial(parse_flags, config=PrepareConfig, default="configs/data.py")
    app.run(in_one_line()(main), flags_parser=parse)
