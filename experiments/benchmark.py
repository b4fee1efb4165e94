"""Times this project's training step beside Hugging Face transformers in PyTorch.

  pip install -e '.[oracle]'
  python -m experiments.benchmark --what=train_step

The default shape suits two CPU cores; the same command runs on a GPU.
"""

import dataclasses

from absl import app, flags

from baichuan_jax.training import benchmark

_WHAT = flags.DEFINE_enum("what", "train_step", ["train_step"], "What to time.")
_STEPS = flags.DEFINE_integer("steps", 10, "Counted steps of each side.", lower_bound=1)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes.")
_SHAPE = [field for field in dataclasses.fields(benchmark.Shape) if field.name != "dtype"]
for _field in _SHAPE:
    flags.DEFINE_integer(_field.name, _field.default, "Of the model or the batch.", lower_bound=1)


def main(_):
    sizes = {field.name: flags.FLAGS[field.name].value for field in _SHAPE}
    for dtype in _DTYPES.value:
        shape = benchmark.Shape(**sizes, dtype=dtype)
        print(benchmark.table(shape, benchmark.compare(shape, _STEPS.value)), flush=True)


if __name__ == "__main__":
    app.run(main)
