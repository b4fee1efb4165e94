"""Baichuan 2 7B, trained on with 32,768 tokens (the paper's has 4,096, §2.2): RoPE by YaRN.

Command:
  python -m experiments.pretrain --config=configs/baichuan2_7b_32k.py --workdir=DIR \
    --config.checkpoint.init_from=/models/Baichuan2-7B-Base \
    '--config.data.sources=/data/books/*.jsonl.zst'

A step has as many tokens as one of the 7B, in 128 rows. Short documents share a row and do not see
each other, so it takes long ones to learn from. Steps, learning rate, warm-up and weight decay are
those with which YaRN's authors lengthened Llama 2 (arXiv 2309.00071, §4.1: 400 steps of 4.2 M
tokens, too); they name no decay of the learning rate.
`--config.model.rope_scaling=linear` or `ntk` scales RoPE otherwise.

Hardware: 112 GiB for weights and AdamW state over all devices, as the 7B, and the activations of a
row. `python -m experiments.plan --config=configs/baichuan2_7b_32k.py --topology=h100:128x8` finds a
layout of eight devices for each row (tensor=8); two nodes of eight H100 are enough, in 16
micro-batches. Not yet run at this size by this project.

Expected: the paper has no such model. By YaRN's authors, the loss goes on falling with the position
up to the new length, and short texts lose next to nothing.
"""

from baichuan_jax.config import Config
from configs import baichuan2_7b

LENGTHENED = 8


def get_config() -> Config:
    config = baichuan2_7b.get_config()
    model, data, training, optimizer = config.model, config.data, config.training, config.optimizer
    model.rope_scaling, model.rope_factor = "yarn", float(LENGTHENED)
    model.rope_original_length = data.sequence_length
    data.sequence_length *= LENGTHENED
    training.batch_size //= LENGTHENED
    training.micro_batches //= LENGTHENED  # 16 rows at a time
    training.num_steps = 400
    training.eval_every, training.eval_batches = 100, 4
    optimizer.learning_rate, optimizer.final_learning_rate = 2e-5, 2e-6
    optimizer.warmup_steps, optimizer.weight_decay = 20, 0.0
    config.checkpoint.every_steps = 100
    return config
