"""The flags that generating, chatting and serving share: which model, and how it is loaded."""

from absl import flags

from baichuan_jax.inference.load import LanguageModel, load

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's folder, or one of Hugging Face's.", required=True
)
_QUANTIZE = flags.DEFINE_enum("quantize", "", ["", "int8", "nf4", "int4"], "Weights in few bits.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "bfloat16", "float32"], "Of the computation; '': what is faster here."
)
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype", "", ["", "bfloat16", "float32", "int8"], "Of keys and values; '': as --dtype."
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 0, "Tokens of prompt and output together; 0: the model's context.", 0
)
_POSITION = flags.DEFINE_enum(
    "position", "", ["", "rope", "alibi"], "Of a release whose config.json does not tell."
)
_VERSION = flags.DEFINE_enum(
    "version", "", ["", "1", "2"], "Of a release whose config.json does not tell."
)


def load_model(slots: int) -> LanguageModel:
    """The model of the flags, for so many requests at one time."""
    return load(
        _CHECKPOINT.value,
        dtype=_DTYPE.value,
        quantize=_QUANTIZE.value,
        slots=slots,
        max_length=_MAX_LENGTH.value,
        cache_dtype=_CACHE_DTYPE.value,
        position=_POSITION.value,
        version=int(_VERSION.value or 0),
    )
