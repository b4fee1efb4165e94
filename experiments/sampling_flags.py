"""The flags that generating and chatting share: which model, and how it samples."""

import dataclasses

from absl import flags

from baichuan_jax.inference.load import LanguageModel, load
from baichuan_jax.inference.sampling import Sampling

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
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Among the k likeliest tokens; 0: among all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Among the likeliest that have this share together.")
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", None, "Above 1: less likely again; over prompt and output."
)
_SEED = flags.DEFINE_integer("seed", None, "Of the sampling.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "The most tokens of an output.", 1)


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


def sampling(model: LanguageModel) -> Sampling:
    """The model's own defaults, with what the flags say instead.

    Raises:
      ValueError: names the flag's field and what would be right.
    """
    given = {
        flag.name: flag.value
        for flag in (_TEMPERATURE, _TOP_K, _TOP_P, _REPETITION_PENALTY, _SEED)
        if flag.value is not None
    }
    chosen = dataclasses.replace(model.defaults.sampling, **given)
    chosen.check(model.tokenizer.vocab_size)
    return chosen
