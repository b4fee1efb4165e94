"""What a released checkpoint is: read from its config.json, and told with the reasons.

Class names say nothing (Baichuan2-7B carries that of the 13B), so what decides are the
fields that only one kind of model has, the size of the vocabulary, and the names of the
tensors.
"""

import dataclasses
from pathlib import Path

from baichuan_jax.config import Config, ModelConfig, validate
from baichuan_jax.convert.folder import check_weights, layout_of, open_weights, read_json
from baichuan_jax.convert.layout import INV_FREQ
from baichuan_jax.convert.stored import StoredTensor

_VOCABULARIES = {125_696: 2, 64_000: 1}
# hidden size, layers: the released models that have both
_SIZES = {(4_096, 32): "rope", (5_120, 40): "alibi"}
_NAMES = {"rope": "RoPE", "alibi": "ALiBi"}
_MODEL_TYPES = ("baichuan", "llama")
VERSION_FIELD = "baichuan_version"  # our exports say it; no released config.json does

# The kinds of RoPE in transformers that are here, and our names of their fields. Our 'ntk' is no
# kind there: it is another rope_theta.
ROPE_FIELDS = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "yarn": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    },
}

# Fields with which a model would be computed otherwise than here: those allowed, and why.
_ONLY = {
    "hidden_act": (("silu",), "the feed-forward layers are SwiGLU"),
    "tie_word_embeddings": ((False,), "the head is a matrix of its own"),
    "attention_bias": ((False,), "the architecture has no biases"),
    "mlp_bias": ((False,), "the architecture has no biases"),
    "quantization_config": ((None,), "convert the full checkpoint, and quantise that"),
    "partial_rotary_factor": ((None, 1, 1.0), "RoPE rotates whole heads"),
    "sliding_window": ((None,), "attention is not windowed"),
}


class AmbiguousError(ValueError):
    """The files do not tell what the model is; the message names the argument that does."""


@dataclasses.dataclass(frozen=True)
class Release:
    """A folder of released weights, checked but for the numbers themselves.

    Attributes:
      directory: the folder.
      config: `model`, `data.sequence_length` (its context) and `training.max_z_weight`
        are the release's, all else is default.
      version: 1 or 2, of Baichuan: the chat format, and whether the head is normalised.
      layout: of the tensors' names, 'baichuan' or 'llama'.
      reasons: what was decided, and why; one sentence each.
      tensors: by their names in the files.
    """

    directory: Path
    config: Config
    version: int
    layout: str
    reasons: tuple[str, ...]
    tensors: dict[str, StoredTensor] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        model = self.config.model
        shape = f"{model.num_layers} layers, width {model.hidden_size:,}, {model.num_heads} heads"
        lines = [f"{self.directory}: {shape}, {model.vocab_size:,} tokens.", *self.reasons]
        return "\n  ".join(lines)


def is_release(directory) -> bool:
    """Whether a folder is in the form of Hugging Face, and not one of our runs."""
    path = Path(directory).expanduser() / "config.json"
    return path.is_file() and "num_hidden_layers" in read_json(path)


def read_config(directory, *, position: str = "", version: int = 0) -> Release:
    """Reads config.json and the descriptions of the tensors, and decides what the model is.

    Args:
      directory: a local folder with config.json and weights.
      position: 'rope' or 'alibi', where the fields do not tell; '' lets them decide.
      version: 1 or 2, where the fields do not tell; 0 lets them decide.

    Raises:
      AmbiguousError: fields that do not tell, or contradict each other, with the flag to give.
      ValueError: a field or tensor of another architecture. Names file and field or tensor.
      OSError: a file is missing or cannot be read.
    """
    directory = Path(directory).expanduser()
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {directory} should hold a released model.")
    if position not in ("", *_NAMES) or version not in (0, 1, 2):
        raise ValueError(
            f"--position={position} --version={version}: should be rope or alibi, and 1 or 2."
        )
    fields = _Fields(path, read_json(path))
    fields.check()
    tensors = open_weights(directory)
    layout = layout_of(tensors, directory)
    if fields.whole("num_hidden_layers") > len(tensors):  # before anything loops over them
        raise ValueError(
            f"{path}: num_hidden_layers is {fields.whole('num_hidden_layers'):,}, but the files"
            f" hold {len(tensors):,} tensors."
        )
    buffers = [name for name in tensors if name.endswith(INV_FREQ)]
    position, why_position = _position(fields, layout, bool(buffers), position)
    version, norm_head, why_version = _version(fields, layout, version)
    context, why_context = fields.context()
    base, scaling = fields.rope(context)
    if scaling and position == "alibi":
        raise ValueError(f"{path} scales RoPE, but: {why_position}")
    config = Config()
    config.model = ModelConfig(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=fields.whole("num_hidden_layers"),
        num_heads=fields.whole("num_attention_heads"),
        position=position,
        rope_base=base,
        **scaling,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        norm_head=norm_head,
        version=version,
        initializer_range=fields.number("initializer_range", 0.02),
    )
    config.data.sequence_length = context
    config.training.max_z_weight = fields.number("z_loss_weight", 0.0)
    try:
        validate(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_weights(tensors, config.model, layout, directory)
    reasons = [why_position, why_version, f"Context: {context:,} tokens, {why_context}."]
    if scaling:
        kind, factor = scaling["rope_scaling"], scaling["rope_factor"]
        reasons.append(f"RoPE is scaled {factor:g} times, '{kind}': config.json says so.")
    if layout == "llama":
        reasons.append("Layout of Llama: Q, K and V are matrices of their own.")
    if buffers:
        reasons.append(f"{len(buffers)} {INV_FREQ} tensors are left out: they are constants.")
    return Release(directory, config, version, layout, tuple(reasons), tensors)


def _position(fields: "_Fields", layout: str, buffers: bool, flag: str) -> tuple[str, str]:
    if flag:
        return flag, f"{_NAMES[flag]}: --position says so."
    if layout == "llama":
        return "rope", "RoPE: the tensors are a Llama's."
    size = fields.whole("hidden_size"), fields.whole("num_hidden_layers")
    evidence = []  # what it says, and where
    if "max_position_embeddings" in fields.values:
        evidence.append(("rope", "config.json has max_position_embeddings"))
    elif "model_max_length" in fields.values:
        why = "config.json has model_max_length, but no max_position_embeddings"
        evidence.append(("alibi", why))
    if buffers:
        evidence.append(("rope", f"the files hold {INV_FREQ}"))
    if size in _SIZES:
        shape = f"width {size[0]:,} and {size[1]} layers"
        evidence.append((_SIZES[size], f"the released models of {shape} have it"))
    text = "; ".join(f"{_NAMES[kind]}: {why}" for kind, why in evidence)
    kinds = {kind for kind, _ in evidence}
    if not evidence or len(kinds) > 1:
        problem = text or "config.json has neither max_position_embeddings nor model_max_length"
        raise AmbiguousError(
            f"{fields.path}: whether positions are RoPE or ALiBi is not clear ({problem}). Say it"
            " with --position=rope (as the 7B) or --position=alibi (as the 13B)."
        )
    return kinds.pop(), f"{text}."


def _version(fields: "_Fields", layout: str, flag: int) -> tuple[int, bool, str]:
    """Version, whether the head is normalised, and why."""
    vocab_size = fields.whole("vocab_size")
    own = fields.values.get(VERSION_FIELD)
    if own not in (None, 1, 2):
        raise ValueError(f"{fields.path}: {VERSION_FIELD} is {own!r}; it should be 1 or 2.")
    if layout == "llama":
        version = flag or own or _VOCABULARIES.get(vocab_size, 1)
        return version, False, "No NormHead: the head of a Llama is used as it is."
    if flag:
        return flag, flag == 2, f"{_kind(flag)}: --version says so."
    evidence = []
    if own is not None:
        evidence.append((own, f"config.json has {VERSION_FIELD}"))
    elif vocab_size in _VOCABULARIES:
        evidence.append((_VOCABULARIES[vocab_size], f"its vocabulary has {vocab_size:,} tokens"))
    if "z_loss_weight" in fields.values:
        evidence.append((2, "config.json has z_loss_weight"))
    text = "; ".join(f"{_kind(kind)}: {why}" for kind, why in evidence)
    kinds = {kind for kind, _ in evidence}
    if len(kinds) != 1:
        nothing = f"{vocab_size:,} tokens are of neither, and there is no z_loss_weight"
        raise AmbiguousError(
            f"{fields.path}: whether this is a Baichuan 1 or 2 is not clear ({text or nothing})."
            " Say it with --version=1 (the head is used as it is) or --version=2 (NormHead)."
        )
    version = kinds.pop()
    return version, version == 2, f"{text}."


def _kind(version: int) -> str:
    return f"Baichuan {version}, {'with' if version == 2 else 'without'} NormHead"


class _Fields:
    """The fields of config.json; errors name it and the field."""

    def __init__(self, path: Path, values: dict):
        self.path, self.values = path, values

    def whole(self, name: str) -> int:
        value = self.values.get(name)
        if {"model", "training"} <= self.values.keys():
            raise ValueError(
                f"{self.path} is of a run of this project, not of a released checkpoint: give its"
                " folder with --from."
            )
        if type(value) is not int or not 0 < value < 2**31:
            found = "is missing" if value is None else f"is {value!r}"
            raise ValueError(f"{self.path}: {name} {found}; it should be a positive integer.")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise ValueError(f"{self.path}: {name} is {value!r}; it should be a number.")
        return float(value)

    def context(self) -> tuple[int, str]:
        for name in ("model_max_length", "max_position_embeddings"):
            if name in self.values:
                return self.whole(name), f"as {name} says"
        return 4_096, "as all released models have, for config.json does not say"

    def rope(self, context: int) -> tuple[float, dict[str, str | int | float]]:
        """The base, and those fields of `ModelConfig` that scale it: none, if it is not scaled."""
        # Of transformers 4 and before, and of 5, which writes the base there, too.
        name = "rope_scaling" if self.values.get("rope_scaling") else "rope_parameters"
        found = self.values.get(name) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{self.path}: {name} is {found!r}; it should be a JSON object.")
        found = {field: value for field, value in found.items() if value is not None}
        base = _Fields(self.path, found).number("rope_theta", self.number("rope_theta", 10_000.0))
        kind = found.get("rope_type", found.get("type", "default"))
        if kind not in list(ROPE_FIELDS):  # a list, for it may be of any type
            raise ValueError(
                f"{self.path}: {name} has type {kind!r}; it should be one of"
                f" {', '.join(ROPE_FIELDS)}."
            )
        fields = ROPE_FIELDS[kind]
        if unknown := sorted(found.keys() - {"rope_type", "type", "rope_theta", *fields}):
            raise ValueError(
                f"{self.path}: {name} has {unknown[0]}, which is not known here for {kind!r}."
            )
        if kind == "default" or found.get("factor") == 1:
            return base, {}
        if "original_max_position_embeddings" in fields:  # transformers takes it for that, too
            found = {"original_max_position_embeddings": context} | found
        scaling = {"rope_scaling": kind}
        for theirs, ours in fields.items():
            if theirs == "original_max_position_embeddings":
                scaling[ours] = _Fields(self.path, found).whole(theirs)
            elif theirs in found or theirs == "factor":
                scaling[ours] = _Fields(self.path, found).number(theirs, 0.0)
        return base, scaling

    def check(self) -> None:
        """Refuses the fields of other architectures."""
        kind = self.values.get("model_type", "baichuan")
        if kind not in _MODEL_TYPES:
            raise ValueError(
                f"{self.path}: model_type is {kind!r}; only {' and '.join(_MODEL_TYPES)} models"
                " can be read."
            )
        for name, (allowed, why) in _ONLY.items():
            if name in self.values and self.values[name] not in allowed:
                shown = str(self.values[name])
                shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
                raise ValueError(
                    f"{self.path}: {name} is {shown}; it should be {allowed[0]}: {why}."
                )
        heads, hidden = self.whole("num_attention_heads"), self.whole("hidden_size")
        for name, should in [("num_key_value_heads", heads), ("head_dim", hidden // heads)]:
            if self.values.get(name, should) not in (None, should):
                raise ValueError(
                    f"{self.path}: {name} is {self.values[name]!r}; with {heads} heads of"
                    f" {hidden // heads} numbers it should be {should}."
                )
