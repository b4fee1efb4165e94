"""Our checkpoints as other programs read them.

The head of a NormHead model is written normalised: who normalises it once more changes
nothing, and who does not know NormHead is right, too.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from etils import epath

from baichuan_jax.config import Config, ModelConfig, from_json
from baichuan_jax.convert import layout as layouts
from baichuan_jax.convert.folder import new_folder, read_json
from baichuan_jax.convert.release import ROPE_FIELDS, VERSION_FIELD
from baichuan_jax.convert.safetensors_file import SafetensorsWriter
from baichuan_jax.convert.stored import check_finite, float_dtype
from baichuan_jax.convert.weights import WeightsReader
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training.checkpoint import sound_weights
from baichuan_jax.training.metrics import Progress

_BAICHUAN2_TOKENS = 125_696


def export_checkpoint(
    source,
    target,
    *,
    layout: str = "baichuan",
    raw_head: bool = False,
    step: int | None = None,
    dtype: str = "",
    max_shard_bytes: int = 10_000_000_000,
    say: Callable[[str], None] = print,
) -> None:
    """Writes a run's weights as safetensors, with the config of a released model beside them.

    In memory at a time is a piece of a tensor, if `import_checkpoint` wrote the checkpoint.
    Training stores each stacked tensor, or a device's part, as one chunk: of such a checkpoint
    it is a stacked tensor, and for a moment its packed form beside it. The folder appears when
    it is complete.

    Args:
      source: the run's folder.
      target: a local folder; not there yet, or empty.
      layout: 'baichuan' (the official names) or 'llama' (RoPE models only).
      raw_head: leaves the head of a NormHead model as it is stored.
      step: which checkpoint; by default the newest sound one.
      dtype: of the weights; '' leaves them as they are.
      max_shard_bytes: of the tensors of one file.
      say: is told which programs would misread the model, and why.

    Raises:
      ValueError: what cannot be written so, and weights that do not fit the run's config or are
        not finite.
      CheckpointError: no checkpoint is sound.
      OSError: a file is missing, or the target cannot be written.
    """
    source = Path(source).expanduser()
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} is not the folder of a run: it has no config.json.")
    config = from_json(source / "config.json")
    model = config.model
    _check(model, layout, raw_head)
    path = sound_weights(source / "checkpoints", step)
    reader = WeightsReader(path)
    reader.check(model)
    dtypes = {name: float_dtype(dtype or found, name) for name, found in reader.dtypes.items()}
    tensors = {}
    ours = {
        theirs: name
        for name in reader.shapes
        for layer in layouts.their_names(name, model, layout)
        for theirs in layer
    }
    for theirs, shape in layouts.their_shapes(model, layout).items():
        tensors[theirs] = (shape, dtypes[ours[theirs]])
    total = sum(int(np.prod(shape)) * d.itemsize for shape, d in tensors.values())
    say(f"{path} as {'a Llama' if layout == 'llama' else 'a Baichuan'}.")
    for warning in engine_warnings(model, layout, raw_head):
        say(f"Note: {warning}")
    with new_folder(target, total) as folder:
        writer = SafetensorsWriter(folder, tensors, max_shard_bytes)
        fold = model.norm_head and not raw_head
        with Progress("export", total, unit="B") as progress:
            for done, name, row, x in _tensors(reader, path, model, layout, dtypes, fold):
                writer.write(name, x, row)
                progress.update(done, tensor=name)
        writer.close()
        _write_configs(folder, source, config, layout, dtypes["embedding"])


def engine_warnings(model: ModelConfig, layout: str, raw_head: bool = False) -> list[str]:
    """Which programs would misread the official layout, by the rules they decide with."""
    if layout == "llama":
        return []
    warnings, rope = [], model.position == "rope"
    if rope and model.hidden_size != 4_096:
        warnings.append(
            "vLLM and SGLang take a BaichuanForCausalLM for RoPE only at width 4,096, and this"
            f" has {model.hidden_size:,}. It is written as BaiChuanForCausalLM (the 7B of"
            " Baichuan 1), which vLLM takes for RoPE at any width. --layout=llama is read by all."
        )
    if not rope and model.hidden_size == 4_096:
        warnings.append(
            "vLLM and SGLang take width 4,096 for RoPE, and this is ALiBi: they would misread it."
        )
    if rope == (model.num_layers == 40):
        taken = "ALiBi" if rope else "RoPE"
        warnings.append(
            f"llama.cpp takes 40 layers, and only them, for ALiBi. It would take this for {taken}."
        )
    base, scaling = _rope(model)
    if rope and base != 10_000:
        warnings.append(
            f"The official code has a RoPE base of 10,000, and this has {base:,g}."
            " --layout=llama says it to all programs."
        )
    if scaling:
        warnings.append(
            f"The official code does not scale RoPE, and this is scaled ({scaling['rope_type']})."
            " --layout=llama says it to all programs."
        )
    normalises = model.vocab_size == _BAICHUAN2_TOKENS
    if normalises and not model.norm_head:
        warnings.append(
            "vLLM and SGLang normalise the head wherever there are 125,696 tokens, and this model"
            " has no NormHead: they would misread it."
        )
    if model.norm_head and raw_head:
        others = "llama.cpp does" if normalises else "vLLM, SGLang and llama.cpp do"
        warnings.append(f"--raw_head: {others} not normalise the head, and would misread it.")
    return warnings


def _rope(model: ModelConfig) -> tuple[float, dict | None]:
    """rope_theta, which tells the NTK-aware scaling, too, and rope_scaling, of the others."""
    if model.rope_scaling == "ntk":
        exponent = model.head_size / max(model.head_size - 2, 1)
        return model.rope_base * model.rope_factor**exponent, None
    if not model.rope_scaling:
        return model.rope_base, None
    fields = ROPE_FIELDS[model.rope_scaling]
    found = {theirs: getattr(model, ours) for theirs, ours in fields.items()}
    return model.rope_base, {"rope_type": model.rope_scaling} | found


def _check(model: ModelConfig, layout: str, raw_head: bool) -> None:
    if layout not in layouts.LAYOUTS:
        raise ValueError(f"--layout={layout}: should be one of {', '.join(layouts.LAYOUTS)}.")
    if layout == "llama" and model.position != "rope":
        raise ValueError(
            "--layout=llama: a Llama has RoPE, and this model has ALiBi. --layout=baichuan writes"
            " it under the official names."
        )
    if layout == "llama" and model.norm_head and raw_head:
        raise ValueError(
            "--raw_head --layout=llama: a Llama does not normalise its head, so every program"
            " would misread the model. Leave --raw_head out, or use --layout=baichuan."
        )


def _tensors(
    reader: WeightsReader,
    path: epath.Path,
    model: ModelConfig,
    layout: str,
    dtypes: dict[str, np.dtype],
    fold: bool,
) -> Iterator[tuple[int, str, int, np.ndarray]]:
    """All that is to be written: bytes so far, released name, first row, rows."""
    done = 0
    for name, shape in reader.shapes.items():
        names = layouts.their_names(name, model, layout)
        # Padding rows are left out; what training made of them means nothing.
        end = model.vocab_size if name in ("embedding", "head") else shape[0]
        rows = layouts.piece_rows(shape, reader.dtypes[name].itemsize)
        for start in range(0, end, rows):
            x = reader.read(name, start, min(start + rows, end))
            check_finite(x, f"{path}: {name}", start)
            if name == "head" and fold:
                x = _normalised(x)
            if x.dtype != dtypes[name]:
                with np.errstate(over="ignore"):  # is told in the next line
                    x = x.astype(dtypes[name])
                check_finite(x, f"{path}: {name} as {dtypes[name]}", start)
            if len(names) == 1 and not name.startswith("layers."):
                done += x.nbytes
                yield done, names[0][0], start, x
                continue
            for theirs, layer in zip(names[start:], x, strict=False):
                for part, tensor in zip(
                    theirs, layouts.to_theirs(name, layer, model, layout), strict=True
                ):
                    done += tensor.nbytes
                    yield done, part, 0, tensor


def _normalised(head_VD: np.ndarray) -> np.ndarray:
    """Rows at length one, in float32; see `transformer.norm_head`."""
    head_VD = head_VD.astype(np.float32)
    norm = np.sqrt(np.sum(head_VD * head_VD, axis=-1, keepdims=True))
    return head_VD / np.maximum(norm, 1e-12)


def _write_configs(
    folder: Path, source: Path, config: Config, layout: str, dtype: np.dtype
) -> None:
    """config.json, and the tokenizer's and the generation's files."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tokenizer, prefix = source / "tokenizer.model", False
    if tokenizer.exists():
        shutil.copyfile(tokenizer, folder / tokenizer.name)
        read = Tokenizer(tokenizer)
        ids = (read.pad_id, read.bos_id, read.eos_id)
        special = dict(zip(special, ids, strict=True))
        prefix = int(read.token_bytes[read.encode("a")].sum()) > 1  # Baichuan 1 adds a space
    model, context = config.model, config.data.sequence_length
    version = 2 if model.norm_head else 1
    if layout == "llama" and model.vocab_size == _BAICHUAN2_TOKENS:
        version = 2  # a Baichuan 2 whose head was folded before
    fields = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": str(dtype),
        VERSION_FIELD: version,
        **special,
    }
    rope = model.position == "rope"
    base, scaling = _rope(model)
    if rope:
        fields["max_position_embeddings"] = context
    if rope and (layout == "llama" or base != 10_000):
        fields["rope_theta"] = base
    if layout == "llama" or scaling:
        fields["rope_scaling"] = scaling
    if layout == "llama":
        fields |= {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": model.num_heads,
            "head_dim": model.head_size,
            "attention_bias": False,
            "mlp_bias": False,
        }
    else:
        old = rope and (model.hidden_size != 4_096 or not model.norm_head)
        fields["architectures"] = ["BaiChuanForCausalLM" if old else "BaichuanForCausalLM"]
        fields["model_type"] = "baichuan"
        if model.norm_head or not rope:
            fields["model_max_length"] = context
        if model.norm_head:
            fields["z_loss_weight"] = config.training.max_z_weight
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer_fields = {
        **tokens,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": prefix,  # without it transformers puts a space before each text
        "legacy": False,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "LlamaTokenizer" if layout == "llama" else "BaichuanTokenizer",
    }
    generation = source / "generation_config.json"
    generation_fields = special | (read_json(generation) if generation.exists() else {})
    for name, content in [
        ("config.json", fields),
        ("tokenizer_config.json", tokenizer_fields),
        ("generation_config.json", generation_fields),
    ]:
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
