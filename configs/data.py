"""The data system with its recommended settings (paper §2.1).

Command:
  python -m experiments.prepare_data --config=configs/data.py --workdir=DIR \
    '--config.sources=zh=/data/zh/*.jsonl.gz,en=/data/en'

Hardware: a laptop; for more than some tens of gigabytes a cluster, by --runner.

Expected: DIR/report.md with the funnel of Figure 2. The paper kept 31.68 % of its raw text; what
stays of yours depends on how often it repeats itself. experiments/LOG.md has a run on 60 MB.
"""

from baichuan_jax.data.prepare.config import PrepareConfig


def get_config() -> PrepareConfig:
    return PrepareConfig()
