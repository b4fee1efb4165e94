"""Compares runs by the bits per byte that they need for text they have not seen.

python -m experiments.bits_per_byte --checkpoints=runs/raw,runs/prepared \
    --sources=held=held.jsonl,news=news.jsonl

Lower is better. Bytes are those of the predicted tokens, so runs with other tokenizers compare.
"""

from absl import app, flags

from baichuan_jax.inference.perplexity import bits_per_byte
from baichuan_jax.training.metrics import quiet_logs
from experiments.errors import in_one_line

_CHECKPOINTS = flags.DEFINE_list("checkpoints", None, "Folders of runs.", required=True)
_SOURCES = flags.DEFINE_string("sources", None, "Text: NAME=PATH or PATH,…", required=True)


@in_one_line()
def main(_):
    quiet_logs()
    width = max(map(len, _CHECKPOINTS.value)) + 2
    for number, checkpoint in enumerate(_CHECKPOINTS.value):
        found = bits_per_byte(checkpoint, _SOURCES.value)
        if not number:
            print(f"{'run':<{width}}" + "".join(f"{name:>16}" for name in found))
        print(f"{checkpoint:<{width}}" + "".join(f"{bits:16.4f}" for bits, _ in found.values()))
    print(f"{'bytes':<{width}}" + "".join(f"{size:16,}" for _, size in found.values()))


if __name__ == "__main__":
    app.run(main)
