"""Trains a tokenizer by the rules of §2.3 on your own text.

python -m experiments.train_tokenizer '--sources=web=web/*.jsonl.gz,code=src' \
    --weights=code=2 --vocab_size=32000 --out=tokenizer.model
"""

import collections
import time

from absl import app, flags

from baichuan_jax import tokenizer
from baichuan_jax.data import sources
from experiments.errors import in_one_line

_SOURCES = flags.DEFINE_multi_string(
    "sources", None, "Text to train on: NAME=PATH or PATH, separated by commas.", required=True
)
_WEIGHTS = flags.DEFINE_list(
    "weights", [], "NAME=WEIGHT of sources: 2 counts their text twice, 0.5 half of it."
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 125_696, "Number of ids.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "tokenizer.model", "The file to write.")
_RESERVED = flags.DEFINE_integer(
    "reserved_tokens", 128, "How many <reserved_N>; the chat format uses 106 and 107.", 0
)
_MAX_BYTES = flags.DEFINE_integer(
    "max_bytes",
    2**28,
    "A larger corpus is sampled down to this; training needs about 30 bytes of memory for each.",
    lower_bound=1,
)
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "The text of a JSONL or Parquet row.")
_TFDS_DATA_DIR = flags.DEFINE_string("tfds_data_dir", "", "Folder of the TFDS datasets.")


def _weights(items: list[str]) -> dict[str, float]:
    weights = {}
    for item in items:
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise app.UsageError(f"--weights: {item!r} is not NAME=WEIGHT, as code=2.") from None
    return weights


@in_one_line()
def main(_: list[str]) -> None:
    weights = _weights(_WEIGHTS.value)
    start = time.monotonic()
    options = {"text_field": _TEXT_FIELD.value, "tfds_data_dir": _TFDS_DATA_DIR.value}
    sources.check(_SOURCES.value, **options)
    counts = tokenizer.train(
        ((each.text, each.source) for each in sources.documents(_SOURCES.value, **options)),
        _OUT.value,
        vocab_size=_VOCAB_SIZE.value,
        weights=weights,
        reserved_tokens=_RESERVED.value,
        max_bytes=_MAX_BYTES.value,
    )
    print(f"{'source':<20}{'documents':>12}{'bytes':>16}{'weight':>8}{'bytes used':>16}")
    total = collections.Counter()
    for name, count in counts.items():
        weight = weights.get(name, 1)
        print(
            f"{name:<20}{count.documents:>12,}{count.bytes:>16,}{weight:>8g}{count.used_bytes:>16,}"
        )
        total.update(cut=count.cut_lines, used=count.used_bytes)
    if total["cut"]:
        print(f"{total['cut']:,} lines were longer than 4,096 bytes and were cut.")
    print(f"{_OUT.value}: {_VOCAB_SIZE.value:,} ids, {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    app.run(main)
