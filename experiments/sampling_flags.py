"""The flags that generating and chatting share: how the model samples."""

import dataclasses

from absl import flags

from baichuan_jax.inference.load import Defaults, LanguageModel
from baichuan_jax.inference.sampling import Sampling

_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Among the k likeliest tokens; 0: among all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Among the likeliest that have this share together.")
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", None, "Above 1: less likely again; over prompt and output."
)
_SEED = flags.DEFINE_integer(
    "seed", None, "Of the random numbers; 0 unless given, so the same command gives the same."
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "The most tokens of an output.", 1)


def check() -> None:
    """Refuses what cannot be right whatever the model, before one is loaded.

    Raises:
      ValueError: names the flag's field and what would be right.
    """
    Sampling(**_given()).check(vocab_size=1)


def _given() -> dict:
    own = (_TEMPERATURE, _TOP_K, _TOP_P, _REPETITION_PENALTY, _SEED)
    return {flag.name: flag.value for flag in own if flag.value is not None}


def sampling(model: LanguageModel, defaults: Defaults) -> Sampling:
    """The model's defaults, with what the flags say instead.

    Raises:
      ValueError: names the flag's field and what would be right.
    """
    chosen = dataclasses.replace(defaults.sampling, **_given())
    chosen.check(model.tokenizer.vocab_size)
    return chosen
