"""Released checkpoints into a run's folder, a run into the form of a release, either in few bits.

  python -m experiments.convert_checkpoint --from_hf=Baichuan2-13B-Chat --to=runs/13b_chat
  python -m experiments.convert_checkpoint --from=runs/7b --to_hf=7b_hf --layout=llama
  python -m experiments.convert_checkpoint --from=runs/7b --to=runs/7b_nf4 --quantize=nf4

The first reads Baichuan 1 and 2, Base, Chat and intermediate checkpoints, as safetensors or
`pytorch_model-*.bin`, without PyTorch, and says what it takes the model for. The second
writes safetensors that Hugging Face, vLLM, SGLang and llama.cpp read, and says which of them
would misread the model. Neither ever holds a model in memory. The third, which also takes
--from_hf, holds the quantised one.
"""

import jax
from absl import app, flags

from baichuan_jax.convert.export import export_checkpoint
from baichuan_jax.convert.hugging_face import import_checkpoint
from baichuan_jax.inference.load import quantize_folder
from baichuan_jax.training.metrics import quiet_logs
from experiments.errors import in_one_line

_FROM_HF = flags.DEFINE_string("from_hf", "", "Folder of a released checkpoint.")
_TO = flags.DEFINE_string("to", "", "The run's folder to write.")
_FROM = flags.DEFINE_string("from", "", "Folder of a run.")
_TO_HF = flags.DEFINE_string("to_hf", "", "The folder to write for other programs.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint to write (0) or to read (the newest).")
_POSITION = flags.DEFINE_enum(
    "position", "", ["", "rope", "alibi"], "Of a release whose config.json does not tell."
)
_VERSION = flags.DEFINE_enum(
    "version", "", ["", "1", "2"], "Of a release whose config.json does not tell."
)
_LAYOUT = flags.DEFINE_enum(
    "layout", "baichuan", ["baichuan", "llama"], "Names to write: the official ones, or a Llama's."
)
_RAW_HEAD = flags.DEFINE_bool("raw_head", False, "Write the head of a NormHead model as it is.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "bfloat16", "float16", "float32"], "Of the weights; by default as they are."
)
_QUANTIZE = flags.DEFINE_enum("quantize", "", ["", "int8", "nf4", "int4"], "Weights in few bits.")
_MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", 10, "Of one file to write.", lower_bound=1e-6)


@in_one_line()
def main(_):
    quiet_logs()
    jax.config.update("jax_platforms", "cpu")  # files are what takes the time
    imports, exports = (_FROM_HF.value, _TO.value), (_FROM.value, _TO_HF.value)
    source = _FROM_HF.value or _FROM.value
    told = {"position": _POSITION.value, "version": int(_VERSION.value or 0)}
    one_source = bool(_FROM_HF.value) != bool(_FROM.value)
    if _QUANTIZE.value and one_source and _TO.value and not _TO_HF.value:
        dtype = _DTYPE.value or "bfloat16"
        quantize_folder(source, _TO.value, _QUANTIZE.value, dtype=dtype, step=_STEP.value, **told)
        print(f"{_TO.value} is ready: its layers are in {_QUANTIZE.value}.")
    elif not _QUANTIZE.value and all(imports) and not any(exports):
        import_checkpoint(*imports, step=_STEP.value or 0, dtype=_DTYPE.value, **told)
        print(f"{_TO.value} is ready: its weights are in checkpoints/{_STEP.value or 0:08d}.")
    elif not _QUANTIZE.value and all(exports) and not any(imports):
        export_checkpoint(
            *exports,
            layout=_LAYOUT.value,
            raw_head=_RAW_HEAD.value,
            step=_STEP.value,
            dtype=_DTYPE.value,
            max_shard_bytes=int(_MAX_SHARD_GB.value * 1e9),
        )
        print(f"{_TO_HF.value} is ready.")
    else:
        raise app.UsageError(
            "Give --from_hf=DIR --to=DIR, or --from=DIR --to_hf=DIR; or, with --quantize, one of"
            " the first and --to=DIR."
        )


if __name__ == "__main__":
    app.run(main)
