"""Raw text to a trained, checkpointed, sampled Baichuan 2 in under ten minutes on a laptop.

  python -m experiments.quickstart

Interrupted and run again, it goes on from where it was. See report.md in --workdir.
"""

import functools
import sys
import time
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from baichuan_jax import tokenizer as tokenizer_module
from baichuan_jax.data import sources
from baichuan_jax.inference.load import load
from baichuan_jax.model import cpu
from baichuan_jax.training.metrics import Progress, quiet_logs
from baichuan_jax.training.pretrain import checked_mesh, open_data, pretrain
from baichuan_jax.training.report import baselines, write_report
from experiments.errors import in_one_line
from experiments.recipe_flags import parse_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "The run's folder.")

PROMPTS = (
    "问：三加五等于多少？\n答：",
    "小明：你好，小红！\n小红：",
    "Question: What is seven plus two?\nAnswer:",
    "Returns the",
)


def train_tokenizer(config, path: Path) -> None:
    """Trains the tokenizer unless an earlier run did."""
    if path.exists():
        return
    total = sources.expected_bytes(config.data.sources)
    with Progress("tokenizer", total, unit="B") as progress:
        size, texts = 0, []
        for document in sources.documents(config.data.sources):
            size += len(document.text.encode())
            texts.append((document.text, document.source))
            progress.update(size, documents=f"{len(texts):,}")
        tokenizer_module.train(texts, path, vocab_size=config.model.vocab_size)


@in_one_line()
def main(_):
    quiet_logs()
    cpu.keep_memory()
    began = time.monotonic()
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    checked_mesh(config)
    workdir.mkdir(parents=True, exist_ok=True)
    config.data.tokenizer = str(workdir / "tokenizer.model")
    train_tokenizer(config, workdir / "tokenizer.model")
    state = pretrain(config, workdir)
    if int(state.step) < config.training.num_steps:
        sys.exit(f"Stopped after step {int(state.step)}; run again, it goes on from there.")
    model = load(workdir, dtype="float32", slots=len(PROMPTS), max_length=256)
    new = model.generate(PROMPTS, max_new_tokens=64, temperature=0.7, top_k=20)
    samples = list(zip(PROMPTS, new, strict=True))
    print(*(f"\n{prompt}⟶{continuation}" for prompt, continuation in samples), sep="\n")
    manifest = open_data(config.data, model.tokenizer, workdir)
    parameters = sum(x.size for x in jax.tree.leaves(state.model))
    compared = baselines(manifest, config, model.tokenizer)
    path = write_report(workdir, config, parameters, manifest, compared, samples)
    print(f"\n{path} is written, {(time.monotonic() - began) / 60:.1f} minutes after the start.")


if __name__ == "__main__":
    parse = functools.partial(parse_flags, default="configs/quickstart.py")
    app.run(main, flags_parser=parse)
