"""The report of a finished run: how good, beside what, and what the model writes."""

import gzip
import math

import numpy as np
from etils import epath

from baichuan_jax.config import Config
from baichuan_jax.data.shards import Manifest
from baichuan_jax.data.stream import Stream
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training.metrics import plot, read_metrics

_ROWS = 256  # read at a time

_NEXT = """
# another position scheme, as the 13B has it
python -m experiments.quickstart --workdir=runs/alibi --config.model.position=alibi
# your own text: a tokenizer, then a model of this size
python -m experiments.train_tokenizer --sources=mine=/path/to/text --vocab_size=4096 \\
  --out=mine.model
python -m experiments.pretrain --config=configs/quickstart.py --workdir=runs/mine \\
  --config.data.sources=mine=/path/to/text --config.data.tokenizer=mine.model
# curves in the browser (pip install tensorboard)
tensorboard --logdir=runs
"""


def baselines(manifest: Manifest, config: Config, tokenizer: Tokenizer) -> dict[str, dict]:
    """What models without a network reach on the held-out rows.

    Returns:
      'unigram': `loss` (nats per token) and `bits_per_byte` of token frequencies in the
      training rows, one added to each count; on the tokens that the model is measured on.
      'gzip': `bits_per_byte` of the held-out text compressed as one file at level 9.
    """
    V = config.model.vocab_size
    train, held_out = (Stream(manifest, split, config.data) for split in ("train", "eval"))
    counts, targets = np.ones(V), np.zeros(V)
    for result, stream in ((counts, train), (targets, held_out)):
        for start in range(0, stream.num_rows, _ROWS):
            rows = stream.rows(range(start, min(start + _ROWS, stream.num_rows)))
            result += np.bincount(rows["targets_BT"][rows["mask_BT"]], minlength=V)
    nats = -float(targets @ np.log(counts / counts.sum()))
    predicted_bytes = float(targets[: tokenizer.vocab_size] @ tokenizer.token_bytes)
    text = "".join(_texts(held_out, tokenizer)).encode()
    return {
        "unigram": {
            "loss": nats / targets.sum(),
            "bits_per_byte": nats / math.log(2) / predicted_bytes,
        },
        "gzip": {"bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text)},
    }


def _texts(stream: Stream, tokenizer: Tokenizer):
    """The documents' pieces in a finite stream's rows, as text."""
    for index in range(stream.num_rows):
        row = stream.rows([index])
        tokens, segments = row["tokens_BT"][0], row["segments_BT"][0]
        for number in range(1, segments.max() + 1):
            piece = tokens[segments == number].tolist()
            yield tokenizer.decode([token for token in piece if token != tokenizer.eos_id])


def write_report(
    workdir: epath.PathLike,
    config: Config,
    parameters: int,
    manifest: Manifest,
    compared: dict[str, dict],
    samples: list[tuple[str, str]],
) -> epath.Path:
    """Writes `report.md` and `plots/` into the run's folder; returns the report's path."""
    workdir = epath.Path(workdir)
    evals = [entry for entry in read_metrics(workdir) if entry["split"] == "eval"]
    last = evals[-1]
    unigram, compressed = compared["unigram"], compared["gzip"]
    model, data = config.model, config.data
    lines = [
        "# A Baichuan 2 from raw text",
        "",
        f"{parameters:,} parameters: {model.num_layers} layers of {model.hidden_size},"
        f" {model.num_heads} heads, {model.position}, vocabulary {model.vocab_size:,}. Trained on"
        f" {last['tokens']:,} tokens in {last['step']:,} steps of {config.training.batch_size}"
        f" rows of {data.sequence_length}.",
        "",
        "## Held-out loss",
        "",
        "| | nats per token | bits per byte |",
        "|---|---|---|",
        f"| this model | {last['loss']:.3f} | {last['bits_per_byte']:.3f} |",
        f"| unigram (token frequencies) | {unigram['loss']:.3f} | {unigram['bits_per_byte']:.3f} |",
        f"| gzip -9 of the held-out text | | {compressed['bits_per_byte']:.3f} |",
        "",
        f"Measured on {manifest.total('eval', 'documents'):,} documents, held out by a hash"
        " of their text. The first token of a document is not predicted, and its bytes do not"
        " count.",
        "",
        "## Data",
        "",
        "| set | documents | tokens | rows | held-out documents |",
        "|---|---|---|---|---|",
    ]
    for name, splits in manifest.sets.items():
        train = splits["train"]
        lines.append(
            f"| {name} | {train.documents:,} | {train.tokens:,} | {train.rows:,} |"
            f" {splits['eval'].documents:,} |"
        )
    dropped = ", ".join(f"{count:,} × {reason}" for reason, count in manifest.dropped.items())
    lines += ["", f"Dropped documents: {dropped or 'none'}.", "", "## Samples", ""]
    for prompt, continuation in samples:
        lines += ["```text", f"{prompt}⟶{continuation}", "```", ""]
    lines += ["## Curves", ""]
    lines += [f"![{path.stem}](plots/{path.name})" for path in plot(workdir)]
    lines += ["", "## Next", "", "```bash", _NEXT.strip(), "```", ""]
    path = workdir / "report.md"
    path.write_text("\n".join(lines))
    return path
