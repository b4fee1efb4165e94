"""The seven models of the scaling law (paper §2.6, Table 10), chosen by hidden size.

Command, for the smallest:
  python -m experiments.pretrain --config=configs/ladder.py:384 --workdir=DIR \
    '--config.data.sources=/data/*.jsonl.zst' --config.data.tokenizer=/data/tokenizer.model

Sizes: 384, 704, 832, 1216, 1792, 2240, 2880 (11.5 M to 3.0 B non-embedding parameters;
here the feed-forward size is three times the hidden size). Each is trained on up to 1 T
tokens with the hyper-parameters of the 7B: 240,000 steps of 1,024 rows.

Hardware: the smallest three on one GPU of 24 GB or one TPU v5e chip, the largest on eight
(54 GB of weights, gradients and AdamW state). Not yet run at full length by this project.

Expected: final losses on the curve L = a·C^b + L_inf (the paper does not print them).
"""

from baichuan_jax.config import Config
from configs import baichuan2_7b

# hidden size: (layers, heads)
LADDER = {
    384: (6, 6),
    704: (8, 8),
    832: (12, 8),
    1_216: (16, 8),
    1_792: (20, 14),
    2_240: (24, 14),
    2_880: (28, 20),
}


def get_config(hidden_size: str = "384") -> Config:
    if not hidden_size.isdigit() or int(hidden_size) not in LADDER:
        raise ValueError(f"configs/ladder.py:{hidden_size}: choose one of {sorted(LADDER)}.")
    config = baichuan2_7b.get_config()
    model = config.model
    model.hidden_size = int(hidden_size)
    model.intermediate_size = 3 * model.hidden_size
    model.num_layers, model.num_heads = LADDER[model.hidden_size]
    config.training.num_steps = 240_000
    config.training.micro_batches = 128  # 8 rows at a time
    return config
