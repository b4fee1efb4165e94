"""Baichuan 2 13B (paper §2.2–2.6, Table 1): 13,896,668,160 parameters, ALiBi, 4,096 tokens.

Command:
  python -m experiments.pretrain --config=configs/baichuan2_13b.py --workdir=DIR \
    '--config.data.sources=zh=/data/zh/*.jsonl.zst,en=/data/en/*.parquet' \
    --config.data.tokenizer=/data/tokenizer.model

Hardware: weights and AdamW state take 207 GiB over all devices (16 bytes a parameter,
gradients included). `python -m experiments.plan` says what fits on a machine and how fast, and
writes a recipe for it; as it stands a micro-batch has 16 rows, and more than 16 devices take fewer
`config.training.micro_batches`. Compiled for up to 1,024 devices, not yet run at this size.

Expected: the paper trains on 2.6 T tokens to MMLU 59.2, C-Eval 58.1 (Table 1). Its batch
size is not published; 1,024 rows are 4.2 M tokens, so 2.6 T tokens are 620,000 steps.
"""

from baichuan_jax.config import Config
from configs import baichuan2_7b


def get_config() -> Config:
    config = baichuan2_7b.get_config()
    model = config.model
    model.hidden_size, model.intermediate_size = 5_120, 13_696
    model.num_layers = model.num_heads = 40
    model.position = "alibi"
    config.optimizer.learning_rate = 1.5e-4
    config.optimizer.final_learning_rate = 1.5e-5
    return config
