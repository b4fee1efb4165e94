"""Measures speed, and what quantisation costs; says how training scales.

  pip install -e '.[oracle]'    # to compare with transformers in PyTorch, and with datasketch
  python -m experiments.benchmark --what=train_step   # or decode
  python -m experiments.benchmark --what=decode --shape=7b --dtypes=bfloat16 --kinds=,int8,nf4
  python -m experiments.benchmark --what=quantization --checkpoint=runs/quickstart
  python -m experiments.benchmark --what=data --text='zh=/data/zh/*.jsonl.gz,en=/data/en'
  python -m experiments.benchmark --what=scaling --plot=scaling.png   # or memory: extras aot, cuda

The default shapes suit two CPU cores, 7b a GPU with 40 GB. Quantisation is measured on a run's
held-out rows, the data system on the embedded corpus, or on --text. The last line only plans.
"""

import dataclasses
import itertools

from absl import app, flags

from baichuan_jax.data.prepare import benchmark as preparing
from baichuan_jax.inference import benchmark as decoding
from baichuan_jax.inference import perplexity
from baichuan_jax.parallel import scaling
from baichuan_jax.training import benchmark, compared
from baichuan_jax.training.metrics import quiet_logs
from configs import baichuan2_7b, baichuan2_13b
from experiments.errors import in_one_line

_STEPS = flags.DEFINE_integer("steps", 10, "Counted steps or rounds of each side.", lower_bound=1)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes.")
_SIZES = {f.name: f.default for f in dataclasses.fields(benchmark.Shape) if f.name != "dtype"}
for _name, _size in _SIZES.items():
    flags.DEFINE_integer(_name, _size, "Of the training step.", lower_bound=1)
flags.DEFINE_enum("shape", "27m", list(decoding.SHAPES), "Of the model that decodes.")
_KINDS = flags.DEFINE_list("kinds", [""], "Of quantisation: '', int8, nf4, int4.")
flags.DEFINE_string("cache_dtype", "", "Of keys and values; '': as --dtypes.")
flags.DEFINE_integer("new_tokens", 128, "Decoded at most.", lower_bound=8)
flags.DEFINE_integer("requests", 16, "Decoded together.", lower_bound=1)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/quickstart", "A run's folder.")
_TEXT = flags.DEFINE_string("text", "", "Sources of text; '': see above.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "About how many to read; 0: all.", 0)
_CHIP = flags.DEFINE_string("chip", "h100", "Whose scaling.")
_PLOT = flags.DEFINE_string("plot", "", "FILE.png for scaling or memory.")


def _train_step():
    for dtype in _DTYPES.value:
        shape = benchmark.Shape(**{n: flags.FLAGS[n].value for n in _SIZES}, dtype=dtype)
        yield benchmark.table(shape, benchmark.compare(shape, _STEPS.value))


def _decode():
    given = {n: flags.FLAGS[n].value for n in ("shape", "cache_dtype", "new_tokens", "requests")}
    for dtype, kind in itertools.product(_DTYPES.value, _KINDS.value):
        load = decoding.Load(dtype=dtype, kind=kind, **given)
        yield decoding.table(load, decoding.compare(load, _STEPS.value))


def _quantization():
    yield from perplexity.released_memory()
    yield from perplexity.benchmark(_CHECKPOINT.value, _TEXT.value, _MAX_TOKENS.value)


_RECIPES = {"7B": baichuan2_7b.get_config(), "13B": baichuan2_13b.get_config()}
_PARTS = {"train_step": _train_step, "decode": _decode, "quantization": _quantization}
_PARTS["data"] = lambda: preparing.lines(_TEXT.value or "embedded:")
_PARTS["scaling"] = lambda: scaling.report(_RECIPES, _CHIP.value, _PLOT.value)
_PARTS["memory"] = lambda: compared.report(_RECIPES, _PLOT.value)
_WHAT = flags.DEFINE_enum("what", "train_step", list(_PARTS), "What.")


@in_one_line()
def main(_):
    quiet_logs()
    for lines in _PARTS[_WHAT.value]():
        print(lines, flush=True)


if __name__ == "__main__":
    app.run(main)
