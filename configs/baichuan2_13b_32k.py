"""Baichuan 2 13B, trained on with 32,768 tokens (the paper's has 4,096, §2.2): ALiBi as it is.

Command:
  python -m experiments.pretrain --config=configs/baichuan2_13b_32k.py --workdir=DIR \
    --config.checkpoint.init_from=/models/Baichuan2-13B-Base \
    '--config.data.sources=/data/books/*.jsonl.zst'

ALiBi has no parameter of the length, so the model of the 13B reads 32,768 tokens untrained, too;
all else is as in configs/baichuan2_7b_32k.py.

Hardware: 207 GiB for weights and AdamW state over all devices, as the 13B, and the activations of a
row. `python -m experiments.plan --config=configs/baichuan2_13b_32k.py --topology=h100:128x8` finds
a layout of eight devices for each row (tensor=8); two nodes of eight H100 are enough, in 16
micro-batches. Not yet run at this size by this project.

Expected: the paper has no such model. The loss stays level beyond 4,096 tokens. It need not fall:
the flattest of the 40 heads takes one from a logit for every 256 tokens of distance, so what lies
many thousands back has no weight, however long the text.
"""

from baichuan_jax.config import Config
from configs import baichuan2_7b_32k, baichuan2_13b


def get_config() -> Config:
    config = baichuan2_7b_32k.get_config()
    config.model = baichuan2_13b.get_config().model
    return config
