"""Baichuan 2 7B (paper §2.2–2.6, Table 1): 7,505,973,248 parameters, RoPE, 4,096 tokens.

Command:
  python -m experiments.pretrain --config=configs/baichuan2_7b.py --workdir=DIR \
    '--config.data.sources=zh=/data/zh/*.jsonl.zst,en=/data/en/*.parquet' \
    --config.data.tokenizer=/data/tokenizer.model

Hardware: weights and AdamW state take 112 GiB over all devices (16 bytes a parameter,
gradients included). `python -m experiments.plan` says what fits on a machine and how fast, and
writes a recipe for it; as it stands a micro-batch has 16 rows, and more than 16 devices take fewer
`config.training.micro_batches`. Compiled for up to 1,024 devices, not yet run at this size.

Expected: the paper trains on 2.6 T tokens to MMLU 54.2, C-Eval 54.0 (Table 1). Its batch
size is not published; 1,024 rows are 4.2 M tokens, so 2.6 T tokens are 620,000 steps.
"""

from baichuan_jax.config import Config


def get_config() -> Config:
    config = Config()  # the defaults are this model
    config.training.num_steps = 620_000
    config.training.micro_batches = 64  # 16 rows at a time: 1 or 2 on each of 16 or 8 devices
    return config
