"""Table 2: compares the compression rate of SentencePiece files on your own text.

python -m experiments.compression_rate --tokenizers=tokenizer.model,llama2.model \
    --sources=zh=zh.jsonl.gz,en=en.jsonl.gz

Prints tokens per character (the unit of Table 2, as far as can be told: the paper
does not state one) and tokens per UTF-8 byte, by language; lower is better. The
ratio is to the first tokenizer.
"""

from absl import app, flags

from baichuan_jax import tokenizer
from baichuan_jax.data import sources

_TOKENIZERS = flags.DEFINE_list(
    "tokenizers", None, "SentencePiece .model files, separated by commas.", required=True
)
_SOURCES = flags.DEFINE_multi_string(
    "sources", None, "Text to measure on: NAME=PATH or PATH, separated by commas.", required=True
)
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "The text of a JSONL or Parquet row.")
_LANGUAGE_FIELD = flags.DEFINE_string("language_field", "lang", "The language of a row.")
_TFDS_DATA_DIR = flags.DEFINE_string("tfds_data_dir", "", "Folder of the TFDS datasets.")


def main(_: list[str]) -> None:
    options = {
        "text_field": _TEXT_FIELD.value,
        "language_field": _LANGUAGE_FIELD.value,
        "tfds_data_dir": _TFDS_DATA_DIR.value,
    }
    sources.check(_SOURCES.value, **options)
    tokenizers = {path: tokenizer.Tokenizer(path) for path in _TOKENIZERS.value}
    rates = {
        path: tokenizer.compression_rate(
            one,
            ((each.text, each.language) for each in sources.documents(_SOURCES.value, **options)),
        )
        for path, one in tokenizers.items()
    }
    first = next(iter(rates.values()))
    width = max(map(len, ["tokenizer", *tokenizers])) + 2
    print(
        f"{'tokenizer':<{width}}{'vocabulary':>10}{'language':>10}{'documents':>11}"
        f"{'tokens/char':>13}{'tokens/byte':>13}{'ratio':>8}"
    )
    for path, by_language in rates.items():
        for language, rate in by_language.items():
            print(
                f"{path:<{width}}{tokenizers[path].vocab_size:>10,}{language:>10}"
                f"{rate.documents:>11,}{rate.tokens_per_character:>13.3f}"
                f"{rate.tokens_per_byte:>13.3f}{rate.tokens / first[language].tokens:>8.3f}"
            )
    print("char: a Unicode code point; byte: of UTF-8; ratio: tokens to the first tokenizer's.")


if __name__ == "__main__":
    app.run(main)
