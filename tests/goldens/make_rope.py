"""Writes rope.npz: the frequencies of RoPE as transformers computes them, for several settings.

pip install -e '.[oracle]' && python -m tests.goldens.make_rope
"""

from pathlib import Path

import numpy as np

from baichuan_jax.config import ModelConfig


def config(head_size: int, **fields) -> ModelConfig:
    return ModelConfig(hidden_size=2 * head_size, num_heads=2, **fields)


# By name. 'ntk' is transformers' 'dynamic' at one length of the text: see `rope_of_transformers`.
CASES = {
    "as_released": config(128),
    "base": config(128, rope_base=500_000.0),
    "linear": config(128, rope_scaling="linear", rope_factor=8.0),
    "ntk": config(128, rope_scaling="ntk", rope_factor=8.0),
    "ntk_small": config(32, rope_scaling="ntk", rope_factor=2.5, rope_base=5_000.0),
    "yarn": config(128, rope_scaling="yarn", rope_factor=8.0),
    "yarn_small": config(64, rope_scaling="yarn", rope_factor=4.0, rope_original_length=1_024),
    "yarn_betas": config(
        *(128,),
        rope_scaling="yarn",
        rope_factor=2.5,
        rope_original_length=2_048,
        yarn_beta_fast=16.0,
        yarn_beta_slow=2.0,
        rope_base=500_000.0,
    ),
    # Both ends of the ramp are one pair.
    "yarn_one_pair": config(8, rope_scaling="yarn", rope_factor=4.0, rope_original_length=4),
}


def rope_of_transformers(case: ModelConfig) -> np.ndarray:
    """Float32 frequencies of the pairs, and the attention factor behind them."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = {"": "default", "ntk": "dynamic"}.get(case.rope_scaling, case.rope_scaling)
    rope = {"rope_type": kind, "rope_theta": case.rope_base}
    length, longest = 4_096, 4_096  # of the model, and of the text
    if kind == "dynamic":
        # With its factor f, a text of n times the model's length has the base of an NTK factor of
        # n·f - (f - 1); here f is 2.
        rope["factor"] = 2.0
        longest = round((case.rope_factor + 1) / 2 * length)
    elif kind != "default":
        rope["factor"] = case.rope_factor
    if kind == "yarn":
        rope["original_max_position_embeddings"] = case.rope_original_length
        rope |= {"beta_fast": case.yarn_beta_fast, "beta_slow": case.yarn_beta_slow}
        length = round(case.rope_original_length * case.rope_factor)
    module = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=case.hidden_size,
            num_attention_heads=case.num_heads,
            max_position_embeddings=length,
            rope_parameters=rope,
        )
    )
    module(torch.zeros(1), torch.arange(longest)[None])  # 'dynamic' looks at the positions
    return np.append(module.inv_freq.numpy(), np.float32(module.attention_scaling))


if __name__ == "__main__":
    np.savez_compressed(
        Path(__file__).with_name("rope.npz"),
        **{name: rope_of_transformers(case) for name, case in CASES.items()},
    )
