"""The settings of a run, as typed dataclasses.

`configs/*.py` build a `Config`; flags override single fields
(`--config.optimizer.learning_rate=1e-4`); `validate` runs once after the flags.
The dataclasses are not frozen, so that the flags can reach them, but nobody
changes one after `validate`. The defaults are the paper's Baichuan 2 7B
(arXiv 2309.10305), so that each of its numbers stands here once.
"""

import dataclasses
import json
import math

from etils import epath

VOCAB_MULTIPLE = 128

# The tensors of a layer that the backward pass can find saved; it recomputes the rest.
ACTIVATIONS = ("input", "qkv", "attention", "attention_out", "gate_up")

# Names for some of them. 'input' is always saved.
REMAT_POLICIES = {
    "full": (),
    "attention": ("qkv", "attention"),
    "matmuls": ("qkv", "attention", "attention_out", "gate_up"),
}

# Where a group of weights is held during a step (§2.7); optimizer state is over all devices.
PLACEMENTS = ("replicated", "hierarchical", "full")

# How RoPE is scaled for more tokens, and the fields of a model that say so. No weight's shape
# depends on them, so training may go on from weights with others.
ROPE_SCALINGS = ("", "linear", "ntk", "yarn")
ROPE_SCALING_FIELDS = (
    *("rope_scaling", "rope_factor", "rope_original_length", "yarn_beta_fast", "yarn_beta_slow"),
)

# Mesh axes, slowest links first (§2.7); the batch is divided over the first two.
BATCH_AXES = ("replica", "fsdp")
TENSOR_AXIS = "tensor"


@dataclasses.dataclass
class ModelConfig:
    """The architecture (paper §2.2–2.5 and Table 1)."""

    vocab_size: int = 125_696
    hidden_size: int = 4_096
    intermediate_size: int = 11_008
    num_layers: int = 32
    num_heads: int = 32
    position: str = "rope"  # 'rope' (7B) or 'alibi' (13B)
    rope_base: float = 10_000.0
    rope_scaling: str = ""  # one of ROPE_SCALINGS, to read more tokens: see model/position.py
    rope_factor: float = 1.0  # of its scaling: how many times as many tokens
    rope_original_length: int = 4_096  # 'yarn': the tokens that it was trained with before
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    norm_epsilon: float = 1e-6
    norm_head: bool = True  # §2.5; false for Baichuan 1
    version: int = 2  # of Baichuan: the form of conversations (chat.py)
    initializer_range: float = 0.02

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and head tables: whole tiles on every mesh.

        The released 125,696 needs no padding; padding rows are never predicted.
        """
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclasses.dataclass
class DataConfig:
    """Where the text is and how it becomes rows of tokens (§2.1, §2.3).

    A source is `NAME=PATH` or `PATH`: a file, a glob or a folder of .jsonl,
    .jsonl.gz, .jsonl.zst, .parquet, .txt or .md, or `tfds:DATASET[:SPLIT]`. Several are
    separated by commas.
    """

    sources: str = ""
    eval_sources: str = ""  # empty: hold out `eval_fraction` of the documents
    eval_fraction: float = 0.005
    text_field: str = "text"
    language_field: str = "lang"
    tfds_data_dir: str = ""  # where the TFDS datasets are; empty: TFDS's own default
    tokenizer: str = ""  # a SentencePiece .model file
    shards: str = ""  # folder of packed rows; empty: WORKDIR/shards, packed from the sources
    sequence_length: int = 4_096
    weights: str = ""  # SET=WEIGHT,…; a set without one weighs as many tokens as it has
    seed: int = 0


@dataclasses.dataclass
class MeshConfig:
    """Devices along each axis (§2.7); one of them may be -1: all that are left."""

    replica: int = 1  # across nodes or slices
    fsdp: int = -1  # inside a node or slice: ZeRO
    tensor: int = 1  # inside the fastest links: tensor parallelism


@dataclasses.dataclass
class ZeroConfig:
    """Where bfloat16 weights are held during a step, by groups of them (§2.7; `parallel.zero`).

    'replicated' on every device (ZeRO-1), 'hierarchical': divided over `fsdp` alone, or 'full':
    over `replica` too (ZeRO-3). The layers that are in neither count below are hierarchical.
    Master weights and AdamW's moments are divided over all devices whatever stands here.
    """

    replicated_layers: int = 0  # the first so many
    full_layers: int = 0  # the last so many
    embedding: str = "hierarchical"  # one of PLACEMENTS
    head: str = "hierarchical"
    gradient_dtype: str = "float32"  # in which micro-batches add up and devices reduce


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW and its schedule (§2.6)."""

    learning_rate: float = 2e-4
    final_learning_rate: float = 2e-5  # not published; a tenth of the peak is customary
    warmup_steps: int = 2_000
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8  # not published
    weight_decay: float = 0.1
    clip_norm: float = 0.5


@dataclasses.dataclass
class TrainingConfig:
    """One run of the loop (§2.5–2.6)."""

    num_steps: int = 100_000
    batch_size: int = 1_024  # rows of `sequence_length` tokens in one optimizer step
    micro_batches: int = 1  # the batch is split into this many, one after the other
    compute_dtype: str = "bfloat16"
    max_z_weight: float = 2e-4  # Eq. 1
    loss_chunk: int = 2_048  # tokens whose logits exist at one time on a device
    # 'none': all activations are saved; one of REMAT_POLICIES; or names, 'qkv,gate_up'
    remat: str = "full"
    offload: str = ""  # those of the saved names, or 'input', that are kept in host memory
    seed: int = 0
    log_every: int = 10
    eval_every: int = 1_000
    eval_batches: int = 32  # 0: all held-out rows
    profile_start: int = 0  # first step of the profiler window (steps count from 1); 0: none
    profile_steps: int = 5


@dataclasses.dataclass
class CheckpointConfig:
    """What is kept, and what a run starts from."""

    every_steps: int = 1_000  # appendix C
    keep: int = 3  # the newest ones
    keep_every_tokens: int = 0  # besides, the first one past every so many tokens; 0: none
    init_from: str = ""  # continued pre-training: weights of a run or release, all else fresh
    accept_changed_data: bool = False  # resume although data, tokenizer or batch changed


@dataclasses.dataclass
class Config:
    """Everything a training run is made from."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    zero: ZeroConfig = dataclasses.field(default_factory=ZeroConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)


def saved_names(remat: str) -> tuple[str, ...] | None:
    """The tensors that `TrainingConfig.remat` saves beside a layer's input; None: all."""
    if remat == "none":
        return None
    return REMAT_POLICIES[remat] if remat in REMAT_POLICIES else listed(remat)


def listed(names: str) -> tuple[str, ...]:
    """The names of a list that is separated by commas."""
    return tuple(filter(None, names.split(",")))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def validate(config: Config) -> None:
    """Refuses what cannot work, before any long work starts.

    Raises:
      ValueError: names the field, its value and what would be right.
    """
    model, training, optimizer = config.model, config.training, config.optimizer
    positive = {
        "model": ["vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"],
        "data": ["sequence_length"],
        "training": [
            *("num_steps", "batch_size", "micro_batches", "loss_chunk", "log_every", "eval_every"),
        ],
        "optimizer": ["learning_rate", "clip_norm", "epsilon"],
        "checkpoint": ["every_steps", "keep"],
    }
    for section, names in positive.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            _require(value > 0, f"config.{section}.{name}={value} must be positive.")
    for name in ("eval_batches", "max_z_weight", "profile_start", "profile_steps"):
        value = getattr(training, name)
        _require(value >= 0, f"config.training.{name}={value} must not be negative.")
    _require(
        model.hidden_size % model.num_heads == 0,
        f"config.model.hidden_size={model.hidden_size} must be a multiple of"
        f" config.model.num_heads={model.num_heads}.",
    )
    _require(model.version in (1, 2), f"config.model.version={model.version} must be 1 or 2.")
    _require(
        model.position in ("rope", "alibi"),
        f"config.model.position={model.position!r} must be 'rope' or 'alibi'.",
    )
    _require(
        model.position == "alibi" or model.head_size % 2 == 0,
        f"RoPE rotates pairs: config.model.hidden_size / num_heads = {model.head_size} must be"
        " even.",
    )
    _validate_rope_scaling(model)
    _require(
        training.batch_size % training.micro_batches == 0,
        f"config.training.batch_size={training.batch_size} must be a multiple of"
        f" config.training.micro_batches={training.micro_batches}.",
    )
    _require(
        training.compute_dtype in ("bfloat16", "float32"),
        f"config.training.compute_dtype={training.compute_dtype!r} must be 'bfloat16' or"
        " 'float32' (float16 overflows: Baichuan 2 was trained in bfloat16).",
    )
    saved = saved_names(training.remat)
    _require(
        set(saved or ()) <= set(ACTIVATIONS),
        f"config.training.remat={training.remat!r} must be one of"
        f" {('none', *REMAT_POLICIES)}, or some of {ACTIVATIONS} separated by commas.",
    )
    offload = listed(training.offload)
    can = ("input", *(saved or ()))
    _require(
        not offload or (saved is not None and set(offload) <= set(can)),
        f"config.training.offload={training.offload!r} must be some of"
        f" {'input'!r} and what config.training.remat={training.remat!r} saves"
        f" ({', '.join(can)}); with 'none' nothing is offloaded.",
    )
    for name in ("embedding", "head"):
        value = getattr(config.zero, name)
        _require(value in PLACEMENTS, f"config.zero.{name}={value!r} must be one of {PLACEMENTS}.")
    counts = {n: getattr(config.zero, n) for n in ("replicated_layers", "full_layers")}
    _require(
        min(counts.values()) >= 0 and sum(counts.values()) <= model.num_layers,
        " + ".join(f"config.zero.{name}={count}" for name, count in counts.items())
        + f" must lie between 0 and config.model.num_layers={model.num_layers}.",
    )
    _require(
        config.zero.gradient_dtype in ("bfloat16", "float32"),
        f"config.zero.gradient_dtype={config.zero.gradient_dtype!r} must be 'bfloat16' or"
        " 'float32'.",
    )
    _require(
        0 <= optimizer.warmup_steps < training.num_steps,
        f"config.optimizer.warmup_steps={optimizer.warmup_steps} must be at least 0 and below"
        f" config.training.num_steps={training.num_steps}.",
    )
    _require(
        0 <= optimizer.final_learning_rate <= optimizer.learning_rate,
        f"config.optimizer.final_learning_rate={optimizer.final_learning_rate} must lie between"
        f" 0 and config.optimizer.learning_rate={optimizer.learning_rate}.",
    )
    _require(
        0 <= config.data.eval_fraction < 1,
        f"config.data.eval_fraction={config.data.eval_fraction} must be in [0, 1).",
    )


def _validate_rope_scaling(model: ModelConfig) -> None:
    scaling, factor = model.rope_scaling, model.rope_factor
    _require(
        scaling in ROPE_SCALINGS,
        f"config.model.rope_scaling={scaling!r} must be one of {ROPE_SCALINGS}.",
    )
    _require(
        model.position == "rope" or not scaling,
        f"config.model.rope_scaling={scaling!r}: ALiBi needs none, it is read at any length as it"
        " is. Leave it '' with config.model.position='alibi'.",
    )
    _require(
        not scaling or 1 < factor < math.inf,
        f"config.model.rope_factor={factor} must be above 1 with"
        f" config.model.rope_scaling={scaling!r}.",
    )
    _require(
        bool(scaling) or factor == 1,
        f"config.model.rope_factor={factor} does nothing without config.model.rope_scaling: one of"
        f" {ROPE_SCALINGS[1:]}.",
    )
    _require(model.rope_base > 1, f"config.model.rope_base={model.rope_base} must be above 1.")
    _require(
        model.rope_original_length > 0,
        f"config.model.rope_original_length={model.rope_original_length} must be positive.",
    )
    _require(
        model.yarn_beta_fast > model.yarn_beta_slow > 0,
        f"config.model.yarn_beta_fast={model.yarn_beta_fast} must be above"
        f" config.model.yarn_beta_slow={model.yarn_beta_slow}, and both positive.",
    )


def to_json(config: Config) -> str:
    """The resolved config as it is written into a run's folder."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(path: epath.PathLike) -> Config:
    """Reads `config.json` of a run's folder.

    Raises:
      ValueError: the file is something else, a released checkpoint's for one; names it and the
        field that this version does not know.
    """
    try:
        fields = json.loads(epath.Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}; it should be a JSON object.")
    if "num_hidden_layers" in fields or "model_type" in fields:
        raise ValueError(
            f"{path} is of a released checkpoint, not of a run. Make a run's folder of it with"
            f" `python -m experiments.convert_checkpoint --from_hf={epath.Path(path).parent}"
            " --to=DIR`, or give it where a release is taken."
        )
    config = Config()
    for section, values in fields.items():
        if section not in vars(config):
            raise ValueError(f"{path}: unknown section {section!r}.")
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {section} is {values!r}; it should be a JSON object.")
        target = getattr(config, section)
        for name, value in values.items():
            if name not in vars(target):
                raise ValueError(f"{path}: unknown field {section}.{name}.")
            setattr(target, name, value)
    return config
