"""A Baichuan 2 of 4 million parameters on text that every machine has (paper §2, in small).

Command:
  python -m experiments.quickstart

Hardware: a laptop; under ten minutes on two cores.

Expected: held-out loss near 3.8 nats per token after a million tokens, seven tenths of the
bits per byte of gzip; arithmetic and small talk in Chinese and English that read like the
training text and are often wrong.
"""

from baichuan_jax.config import Config


def get_config() -> Config:
    config = Config()
    model, data, training = config.model, config.data, config.training
    model.vocab_size = 4_096
    model.hidden_size, model.intermediate_size = 192, 512
    model.num_layers = model.num_heads = 6
    data.sources = "embedded:4500000"
    data.eval_fraction = 0.04
    data.sequence_length = 256
    config.optimizer.learning_rate = 4e-3
    config.optimizer.final_learning_rate = 4e-4
    config.optimizer.warmup_steps = 20
    training.num_steps = 256
    training.batch_size = 16
    training.compute_dtype = "float32"  # bfloat16 is slower than float32 on most CPUs
    training.remat = "none"
    training.log_every = 1
    training.eval_every = 64
    training.eval_batches = 0
    config.checkpoint.every_steps = 64
    return config
