"""Our parameters and those of the released checkpoints, tensor by tensor.

Two layouts hold the same numbers: 'baichuan' has the official names, with Q, K and V as
the three blocks of rows of one matrix `W_pack`; 'llama' has the names of Llama, with three
matrices. Both store a projection as [out, in], we as [in, out], and we stack the layers.

Legend: D model, F feed-forward, H heads, K head width, L layers, V vocabulary; P rows or
layers of a piece.
"""

from collections.abc import Mapping

import jax
import numpy as np

from baichuan_jax.config import ModelConfig
from baichuan_jax.convert.stored import StoredTensor, check_finite
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.training.checkpoint import by_name

LAYOUTS = ("baichuan", "llama")

EMBEDDING = "model.embed_tokens.weight"
_TABLES = {"embedding": EMBEDDING, "norm.gain": "model.norm.weight", "head": "lm_head.weight"}
_QKV = {
    "baichuan": ("self_attn.W_pack",),
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
_LAYER = {
    "attention_norm.gain": ("input_layernorm",),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm.gain": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
# A constant that Baichuan-7B stores in each layer; we compute it.
INV_FREQ = "rotary_emb.inv_freq"

PIECE_BYTES = 1 << 23  # of a stack or a table that are in memory at one time; a layer at least


def abstract_model(model: ModelConfig) -> Transformer:
    """Shapes and dtypes of the parameters, in the model's tree."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.eval_shape(lambda: Transformer(jax.random.key(0), model))


def our_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameters' names, as checkpoints have them, and shapes."""
    return {name: leaf.shape for name, leaf in by_name(abstract_model(model)).items()}


def their_names(name: str, model: ModelConfig, layout: str) -> list[list[str]]:
    """Names in the released layout of what our parameter holds: by layer, then in order."""
    if name in _TABLES:
        return [[_TABLES[name]]]
    inside = name.removeprefix("layers.")
    parts = _QKV[layout] if inside == "attention.qkv" else _LAYER[inside]
    layers = range(model.num_layers)
    return [[f"model.layers.{layer}.{part}.weight" for part in parts] for layer in layers]


def their_shapes(model: ModelConfig, layout: str) -> dict[str, tuple[int, ...]]:
    """The released layout's names, in the order of the network, and shapes."""
    V, D, F = model.vocab_size, model.hidden_size, model.intermediate_size
    rows = {"W_pack": 3 * D, "gate_proj": F, "up_proj": F}
    names = [EMBEDDING]
    for layer in range(model.num_layers):
        for inside in ("attention.qkv", *_LAYER):
            names += their_names(f"layers.{inside}", model, layout)[layer]
    shapes = {}
    for name in [*names, _TABLES["norm.gain"], _TABLES["head"]]:
        part = name.split(".")[-2]
        if "norm" in part:
            shapes[name] = (D,)
        elif name in _TABLES.values():
            shapes[name] = (V, D)
        else:
            shapes[name] = (rows.get(part, D), F if part == "down_proj" else D)
    return shapes


def _fill(name: str, out: np.ndarray, tensors: list[StoredTensor], model: ModelConfig) -> None:
    """Writes one layer of our parameter into `out`, holding one released matrix at a time."""
    D, H, K = model.hidden_size, model.num_heads, model.head_size
    match name.removeprefix("layers."):
        case "attention.qkv":
            for c in range(3):
                packed = len(tensors) == 1
                block = tensors[0].read(c * D, (c + 1) * D) if packed else tensors[c].read()
                out[:, c] = block.reshape(H, K, D).transpose(2, 0, 1)
        case "attention.out":
            out[...] = tensors[0].read().T.reshape(H, K, D)
        case "mlp.gate_up":
            for c, tensor in enumerate(tensors):
                out[:, c] = tensor.read().T
        case "mlp.down":
            out[...] = tensors[0].read().T
        case _:
            out[...] = tensors[0].read()


def to_theirs(name: str, x: np.ndarray, model: ModelConfig, layout: str) -> list[np.ndarray]:
    """The released tensors of one layer from that layer of our parameter."""
    D = model.hidden_size
    match name.removeprefix("layers."):
        case "attention.qkv":
            pack = x.transpose(1, 2, 3, 0).reshape(3 * D, D)
            return [pack] if layout == "baichuan" else list(pack.reshape(3, D, D))
        case "attention.out":
            return [x.reshape(D, D).T]
        case "mlp.gate_up":
            return [x[:, 0].T, x[:, 1].T]
        case "mlp.down":
            return [x.T]
        case _:
            return [x]


def piece_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """How many rows (of a table) or layers (of a stack) make a piece."""
    row = int(np.prod(shape[1:])) * itemsize
    return min(shape[0], max(1, PIECE_BYTES // row))


def read_piece(
    name: str,
    start: int,
    shape: tuple[int, ...],
    tensors: Mapping[str, StoredTensor],
    model: ModelConfig,
    layout: str,
    dtype: np.dtype,
) -> np.ndarray:
    """A piece of our parameter, rows or layers from `start` on; padding rows are 0.

    Args:
      shape: of the piece.
      tensors: by their released names.

    Raises:
      ValueError, OSError: see `StoredTensor.read`; or a number does not fit `dtype`.
    """
    out = np.zeros(shape, dtype)
    released = [[tensors[part] for part in parts] for parts in their_names(name, model, layout)]
    table = name in _TABLES
    released = released if table else released[start : start + shape[0]]
    with np.errstate(over="ignore"):  # is told below
        if table:
            x = released[0][0].read(start, start + shape[0])
            out[: len(x)] = x
        else:
            for layer, parts in enumerate(released):
                _fill(name, out[layer], parts, model)
    converted = [tensor for parts in released for tensor in parts if tensor.dtype != dtype]
    if converted:  # of some, the dtype may be the same
        check_finite(out, f"{converted[0].file}: {name} as {dtype}", start)
    return out
