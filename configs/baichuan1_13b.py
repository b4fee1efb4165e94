"""Baichuan 1 13B: the Baichuan 2 13B with 64,000 tokens and neither NormHead nor max-z loss.

13,264,901,120 parameters (the Baichuan-13B release; the paper compares with it in
Tables 1 and 2). Trained on 1.4 T tokens: 340,000 steps of 1,024 rows.

Command:
  python -m experiments.pretrain --config=configs/baichuan1_13b.py --workdir=DIR \
    '--config.data.sources=/data/*.jsonl.zst' --config.data.tokenizer=/data/tokenizer.model

Hardware: as configs/baichuan2_13b.py. Not yet run at this size by this project.

Expected: MMLU 51.6, C-Eval 52.4 (Table 1).
"""

from baichuan_jax.config import Config
from configs import baichuan2_13b


def get_config() -> Config:
    config = baichuan2_13b.get_config()
    config.model.vocab_size = 64_000
    config.model.norm_head = False
    config.model.version = 1
    config.training.max_z_weight = 0.0
    config.training.num_steps = 340_000
    return config
