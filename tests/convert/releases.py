"""Makes tiny random checkpoints in every form in which Baichuan models were released.

`make_release` writes a folder and returns its tensors. The `.bin` files are written here
without PyTorch, byte by byte as `torch.save` does; a test compares with a real one.
"""

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from baichuan_jax import tokenizer as tokenizers
from baichuan_jax.config import ModelConfig

CHAT_GENERATION = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "user_token_id": 195,
    "assistant_token_id": 196,
    "max_new_tokens": 2048,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.85,
    "repetition_penalty": 1.05,
    "do_sample": True,
}

_STORAGES = {"bfloat16": "BFloat16Storage", "float16": "HalfStorage", "float32": "FloatStorage"}


def tiny_model(position: str = "rope", **changes) -> ModelConfig:
    """Three layers; a head count that is no power of two for ALiBi; a vocabulary that is padded."""
    heads = 4 if position == "rope" else 6
    fields = {
        "vocab_size": 200,
        "hidden_size": 16 * heads,
        "intermediate_size": 96,
        "num_layers": 3,
        "num_heads": heads,
        "position": position,
    }
    return ModelConfig(**fields | changes)


def make_release(
    directory: Path,
    *,
    version: int = 2,
    position: str = "rope",
    chat: bool = False,
    files: str = "safetensors",
    shards: int = 1,
    dtype: str = "bfloat16",
    layout: str = "baichuan",
    model: ModelConfig | None = None,
    tokenizer: Path | None = None,
    seed: int = 0,
    **config_changes,
) -> dict[str, np.ndarray]:
    """Writes a folder as Hugging Face has it, with random weights.

    Args:
      directory: the folder to make.
      version: 1 or 2.
      position: 'rope' (7B) or 'alibi' (13B).
      chat: with the generation_config.json of the chat models; ids of the tokenizer, if given.
      files: 'safetensors' or 'bin'.
      shards: files of weights; more than one have an index.
      dtype: 'bfloat16', 'float16' or 'float32'.
      layout: 'baichuan' (W_pack) or 'llama'.
      model: the sizes; by default `tiny_model(position)`.
      tokenizer: a SentencePiece file to put in; see `make_tokenizer`.
      config_changes: fields of config.json; None leaves one out.

    Returns:
      The tensors by their names in the files; `rotary_emb.inv_freq` of Baichuan-7B among them.
    """
    model = model or tiny_model(position)
    tensors = random_tensors(model, layout, dtype, seed)
    if version == 1 and position == "rope" and layout == "baichuan":
        half = np.arange(0, model.head_size, 2, dtype=np.float32) / model.head_size
        for layer in range(model.num_layers):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 10_000.0**-half
    directory.mkdir(parents=True)
    write_weights(directory, tensors, files, shards)
    fields = config_fields(model, version, position, layout, dtype) | config_changes
    fields = {name: value for name, value in fields.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(fields, indent=2))
    if tokenizer is not None:
        (directory / "tokenizer.model").write_bytes(Path(tokenizer).read_bytes())
    if chat:
        generation = CHAT_GENERATION | ({"repetition_penalty": 1.1} if version == 1 else {})
        if tokenizer is not None:
            special, first = tokenizers.Tokenizer(tokenizer).special, 106 if version == 2 else 102
            generation["user_token_id"] = special(f"<reserved_{first}>")
            generation["assistant_token_id"] = special(f"<reserved_{first + 1}>")
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return tensors


def config_fields(model: ModelConfig, version: int, position: str, layout: str, dtype: str) -> dict:
    """The fields of the released config.json; z_loss_weight tells version 2 at any vocabulary.

    With the two released vocabularies, version 1 is told by its size; here another size says
    nothing, so that version 1 needs `version=1` where it is read.
    """
    fields = {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "hidden_act": "silu",
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        "transformers_version": "4.29.2",
    }
    if layout == "llama":
        return fields | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": model.num_heads,
            "max_position_embeddings": 4096,
            "rope_scaling": None,
        }
    if position == "rope":
        fields["max_position_embeddings"] = 4096
        if version == 1:
            fields["architectures"] = ["BaiChuanForCausalLM"]
    if position == "alibi" or version == 2:
        fields["model_max_length"] = 4096
    if version == 2:
        fields["z_loss_weight"] = 0
    return fields


def random_tensors(
    model: ModelConfig, layout: str, dtype: str, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random weights under the released names."""
    V, D, F = model.vocab_size, model.hidden_size, model.intermediate_size
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return (0.2 * rng.standard_normal(shape, np.float32)).astype(dtype)

    def gain() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(D, np.float32)).astype(dtype)

    tensors = {"model.embed_tokens.weight": matrix(V, D)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        if layout == "baichuan":
            tensors[f"{prefix}.self_attn.W_pack.weight"] = matrix(3 * D, D)
        else:
            for name in "qkv":
                tensors[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(D, D)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = matrix(D, D)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = matrix(F, D)
        tensors[f"{prefix}.mlp.up_proj.weight"] = matrix(F, D)
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(D, F)
        tensors[f"{prefix}.input_layernorm.weight"] = gain()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = gain()
    return tensors | {"model.norm.weight": gain(), "lm_head.weight": matrix(V, D)}


def write_weights(
    directory: Path, tensors: dict[str, np.ndarray], files: str = "safetensors", shards: int = 1
) -> None:
    """The weights in one file, or in several with an index."""
    stem, suffix = ("pytorch_model", "bin") if files == "bin" else ("model", "safetensors")
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"{stem}.{suffix}"
        if shards > 1:
            file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: tensors[name] for name in np.array_split(np.array(names), shards)[number]}
        weight_map |= dict.fromkeys(map(str, part), file)
        if files == "bin":
            write_bin(directory / file, part)
        else:
            save_file({str(name): x for name, x in part.items()}, directory / file)
    if shards > 1:
        index = {
            "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
            "weight_map": weight_map,
        }
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def make_tokenizer(path: Path, vocab_size: int = 500) -> Path:
    """A small SentencePiece file with all that the chat format needs."""
    sentence = "the quick brown fox jumps over a lazy dog and 你好世界，今天天气很好。hello world! "
    texts = [f"{sentence[i:]}{sentence[:i]}{i}\n" for i in range(len(sentence))]
    tokenizers.train(((text, "") for text in texts), path, vocab_size=vocab_size)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def pickled_tensor(
    storage: str, key: str, size: int, offset: int, shape, strides, location: str = "cpu"
) -> bytes:
    """What `torch.save` writes of a tensor."""
    persistent = text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text(location)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + (persistent + number(size) + b"tQ")
        + (number(offset) + numbers(shape) + numbers(strides))
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def pickled_dict(items: dict[str, bytes]) -> bytes:
    """A pickle of an OrderedDict, of values that are pickled already."""
    content = b"".join(text(name) + value for name, value in items.items())
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + content + b"u."


def write_archive(path: Path, pickle: bytes, storages: dict[str, bytes]) -> None:
    """A zip archive as `torch.save` makes it: nothing compressed, storages at multiples of 64."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        members = {"data.pkl": pickle, "version": b"3\n"}
        members |= {f"data/{key}": data for key, data in storages.items()}
        for name, data in members.items():
            info = zipfile.ZipInfo(f"{path.stem}/{name}")
            begin = archive.fp.tell() + 30 + len(info.filename) + 4
            padding = -begin % 64
            info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            archive.writestr(info, data)


def write_bin(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A `.bin` file of contiguous tensors, each with a storage of its own."""
    items, storages = {}, {}
    for key, (name, x) in enumerate(tensors.items()):
        strides = [int(np.prod(x.shape[axis + 1 :])) for axis in range(x.ndim)]
        kind = _STORAGES[str(x.dtype)]
        items[str(name)] = pickled_tensor(kind, str(key), x.size, 0, x.shape, strides)
        storages[str(key)] = np.ascontiguousarray(x).tobytes()
    write_archive(path, pickled_dict(items), storages)
