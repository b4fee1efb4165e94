"""Baichuan 1 7B: the Baichuan 2 7B with 64,000 tokens and neither NormHead nor max-z loss.

7,000,559,616 parameters (the Baichuan-7B release; the paper compares with it in Tables
1 and 2). Trained on 1.2 T tokens: 290,000 steps of 1,024 rows.

Command:
  python -m experiments.pretrain --config=configs/baichuan1_7b.py --workdir=DIR \
    '--config.data.sources=/data/*.jsonl.zst' --config.data.tokenizer=/data/tokenizer.model

Hardware: as configs/baichuan2_7b.py. Not yet run at this size by this project.

Expected: MMLU 42.3, C-Eval 42.8 (Table 1); training loss about 1.8 nats after 1.2 T tokens.
"""

from baichuan_jax.config import Config
from configs import baichuan2_7b


def get_config() -> Config:
    config = baichuan2_7b.get_config()
    config.model.vocab_size = 64_000
    config.model.norm_head = False
    config.model.version = 1
    config.training.max_z_weight = 0.0
    config.training.num_steps = 290_000
    return config
