"""Writes llama.npz: logits and generated tokens of Hugging Face's LlamaForCausalLM, seeded weights.

The 7B is a Llama whose Q, K, V are one matrix and whose head is normalised.

  pip install -e '.[oracle]' && python -m tests.goldens.make_llama
"""

from pathlib import Path

import numpy as np

from baichuan_jax.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=160, hidden_size=64, intermediate_size=176, num_layers=3, num_heads=4
)
NEW_TOKENS = 48
PENALTY = 1.3


def weights() -> dict[str, np.ndarray]:
    """Float32 weights by our names, from a fixed seed."""
    rng = np.random.default_rng(2309_10305)
    L, D, F = CONFIG.num_layers, CONFIG.hidden_size, CONFIG.intermediate_size
    H, K, V = CONFIG.num_heads, CONFIG.head_size, CONFIG.padded_vocab_size
    shapes = {
        "embedding": (V, D),
        "layers.attention_norm.gain": (L, D),
        "layers.attention.qkv": (L, D, 3, H, K),
        "layers.attention.out": (L, H, K, D),
        "layers.mlp_norm.gain": (L, D),
        "layers.mlp.gate_up": (L, D, 2, F),
        "layers.mlp.down": (L, F, D),
        "norm.gain": (D,),
        "head": (V, D),
    }
    arrays = {name: 0.2 * rng.standard_normal(shape) for name, shape in shapes.items()}
    return {
        name: (array + 1 if name.endswith("gain") else array).astype(np.float32)
        for name, array in arrays.items()
    }


def tokens() -> np.ndarray:
    return np.random.default_rng(7).integers(0, CONFIG.vocab_size, (2, 40)).astype(np.int32)


def prompts() -> list[list[int]]:
    """Of several lengths, for `generated`."""
    rng = np.random.default_rng(11)
    return [rng.integers(3, CONFIG.vocab_size, n).tolist() for n in (1, 7, 64, 65, 130)]


def logits() -> np.ndarray:
    """Float32 logits [B, T, V] by transformers."""
    import torch

    with torch.no_grad():
        return llama()(torch.tensor(tokens(), dtype=torch.long)).logits.numpy()


def generated(repetition_penalty: float = 1.0) -> np.ndarray:
    """The `NEW_TOKENS` likeliest ids that transformers' generate finds after each prompt."""
    import torch

    model = llama()
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0, "repetition_penalty": repetition_penalty}
    rows = [model.generate(torch.tensor([prompt]), **options) for prompt in prompts()]
    return np.stack([row[0, -NEW_TOKENS:].numpy() for row in rows]).astype(np.int32)


def llama():
    """transformers' model with our weights, the head normalised."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.hidden_size,
            intermediate_size=CONFIG.intermediate_size,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            rms_norm_eps=CONFIG.norm_epsilon,
            rope_theta=CONFIG.rope_base,
            max_position_embeddings=4_096,
            tie_word_embeddings=False,
        )
    ).float()
    w, D = weights(), CONFIG.hidden_size
    V = CONFIG.vocab_size
    head = w["head"][:V]
    state = {
        "model.embed_tokens.weight": w["embedding"][:V],
        "model.norm.weight": w["norm.gain"],
        "lm_head.weight": head / np.linalg.norm(head, axis=1, keepdims=True),
    }
    for n in range(CONFIG.num_layers):
        layer = {name[7:]: value[n] for name, value in w.items() if name.startswith("layers.")}
        prefix = f"model.layers.{n}."
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            projection = layer["attention.qkv"][:, index].reshape(D, D).T
            state[f"{prefix}self_attn.{name}.weight"] = projection
        state[prefix + "self_attn.o_proj.weight"] = layer["attention.out"].reshape(D, D).T
        state[prefix + "mlp.gate_proj.weight"] = layer["mlp.gate_up"][:, 0].T
        state[prefix + "mlp.up_proj.weight"] = layer["mlp.gate_up"][:, 1].T
        state[prefix + "mlp.down_proj.weight"] = layer["mlp.down"].T
        state[prefix + "input_layernorm.weight"] = layer["attention_norm.gain"]
        state[prefix + "post_attention_layernorm.weight"] = layer["mlp_norm.gain"]
    tensors = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()}
    model.load_state_dict(tensors)
    return model


if __name__ == "__main__":
    np.savez_compressed(
        Path(__file__).with_name("llama.npz"),
        logits=logits(),
        greedy=generated(),
        penalized=generated(PENALTY),
    )
