"""Measures speed, and what quantisation costs; says how training scales.

  python -m experiments.benchmark --what=train_step   # or decode, attention, data, quantization
  python -m experiments.benchmark --what=train_step --shape=7b,13b_half   # on a GPU
  python -m experiments.benchmark --what=decode --shape=7b --dtypes=bfloat16 --kinds=,int8,nf4
  python -m experiments.benchmark --what=scaling --plot=scaling.png   # or memory: extras aot, cuda

Else shapes suit two CPU cores. PyTorch's and datasketch's side are measured with the extra oracle.
"""

import dataclasses
import itertools

from absl import app, flags

from baichuan_jax.data.prepare import benchmark as preparing
from baichuan_jax.inference import benchmark as decoding
from baichuan_jax.inference import perplexity
from baichuan_jax.parallel import scaling
from baichuan_jax.training import attention_benchmark, benchmark, compared, gpu_benchmark
from baichuan_jax.training.metrics import quiet_logs
from configs import baichuan2_7b, baichuan2_13b
from experiments.errors import in_one_line

_RECIPES = {"7B": baichuan2_7b.get_config(), "13B": baichuan2_13b.get_config()}
_STEPS = flags.DEFINE_integer("steps", 10, "Counted steps or rounds of each side.", lower_bound=1)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes.")
_SIZES = {f.name: f.default for f in dataclasses.fields(benchmark.Shape) if type(f.default) is int}
for _name, _size in (_SIZES | {"new_tokens": 128, "requests": 16}).items():
    flags.DEFINE_integer(_name, _size, "Of training the 27m, or of decoding.", lower_bound=1)
_SHAPE = flags.DEFINE_list("shape", ["27m"], "Of models: 7b, to train 13b_half, to decode 13b.")
_SIDES = flags.DEFINE_list("sides", list(gpu_benchmark.SIDES), "Of the training step on a GPU.")
_LENGTHS = flags.DEFINE_list("lengths", [], "Of attention's rows; none: as suits the device.")
_KINDS = flags.DEFINE_list("kinds", [""], "Of quantisation: '', int8, nf4, int4.")
flags.DEFINE_string("cache_dtype", "", "Of keys and values; '': as --dtypes.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/quickstart", "A run's folder.")
_TEXT = flags.DEFINE_string("text", "", "Sources of text; '': see above.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "About how many to read; 0: all.", 0)
_CHIP = flags.DEFINE_string("chip", "h100", "Whose scaling.")
_PLOT = flags.DEFINE_string("plot", "", "FILE.png for scaling or memory.")


def _train_step():
    if _SHAPE.value != ["27m"]:
        return gpu_benchmark.report(_RECIPES, _SHAPE.value, _STEPS.value, _SIDES.value)
    return benchmark.report({n: flags.FLAGS[n].value for n in _SIZES}, _DTYPES.value, _STEPS.value)


def _decode():
    if wrong := set(_SHAPE.value) - decoding.SHAPES.keys():
        raise ValueError(f"--shape={wrong.pop()} does not decode, {list(decoding.SHAPES)} do")
    given = {n: flags.FLAGS[n].value for n in ("cache_dtype", "new_tokens", "requests")}
    for what in itertools.product(_SHAPE.value, _DTYPES.value, _KINDS.value):
        load = decoding.Load(*what, **given)
        yield decoding.table(load, decoding.compare(load, _STEPS.value))


def _quantization():
    yield from perplexity.released_memory()
    yield from perplexity.benchmark(_CHECKPOINT.value, _TEXT.value, _MAX_TOKENS.value)


_PARTS = {"train_step": _train_step, "decode": _decode, "quantization": _quantization}
_PARTS["attention"] = lambda: attention_benchmark.report(_STEPS.value, _LENGTHS.value, _RECIPES)
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
