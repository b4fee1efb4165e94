"""Loss against position: what runs make of texts longer than those they were trained with.

A row is as many tokens of one long document as are read at a time, and its next one: every
position of every curve is the mean over the same tokens of the same rows.

Legend: N rows, T tokens of a row.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath

from baichuan_jax.config import ROPE_SCALINGS, DataConfig, ModelConfig
from baichuan_jax.data import packing, sources
from baichuan_jax.inference import perplexity
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training.metrics import Progress

AS_TRAINED = "none"  # beside the names of scalings
_FIRST_BIN = 16  # positions; later bins are shares of an octave


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a run with one scaling of RoPE needs, in nats per token.

    Attributes:
      label: the run's folder and the scaling.
      trained: tokens of a row that the run was trained with.
      nats_T: mean over the rows at each position, float64.
      rows: N.
    """

    label: str
    trained: int
    nats_T: np.ndarray
    rows: int


def read(
    checkpoints: Sequence[epath.PathLike],
    length: int,
    scalings: Sequence[str] = (AS_TRAINED,),
    text: str = "",
    max_rows: int = 0,
) -> list[Curve]:
    """Reads long documents with runs' newest weights, in float32 on one device.

    Args:
      checkpoints: folders of runs with one tokenizer.
      length: T.
      scalings: `AS_TRAINED` and names in `config.ROPE_SCALINGS`; each run with RoPE is read with
        each of them, and the factor is `length` by what it was trained with. Runs with ALiBi,
        and those that were trained with a scaling, are read once, as they are.
      text: sources, as `data.sources` reads them; '' for the documents that the runs held out.
      max_rows: N at most, drawn with a fixed seed; 0: all there are.

    Raises:
      ValueError: no such run; runs that do not compare; a scaling without a name or without
        anything to scale; no document is so long. Says what would be right.
    """
    runs = [perplexity.open_run(checkpoint) for checkpoint in checkpoints]
    variants = []
    for checkpoint, (workdir, config, tokenizer) in zip(checkpoints, runs, strict=True):
        if tokenizer.fingerprint != runs[0][2].fingerprint:
            raise ValueError(
                f"{checkpoints[0]} and {checkpoint} have different tokenizers: nats per token do"
                " not compare."
            )
        if not text and _held_out(config.data) != _held_out(runs[0][1].data):
            raise ValueError(
                f"{checkpoints[0]} and {checkpoint} held out different documents: give some that"
                " neither has seen with --sources."
            )
        trained = config.data.sequence_length
        for name, model in _variants(config.model, trained, length, scalings):
            label = f"{checkpoint}, {name}" if name else f"{checkpoint}"
            variants.append((label, trained, workdir, model))
    rows_NT = long_rows(runs[0][1].data, runs[0][2], length, text, max_rows)
    curves = []
    for label, trained, workdir, model in variants:
        nats_T = _mean(perplexity.restore_float32(workdir, model), rows_NT, label)
        curves.append(Curve(label, trained, nats_T, len(rows_NT)))
    return curves


def long_rows(
    data: DataConfig, tokenizer: Tokenizer, length: int, text: str = "", max_rows: int = 0
) -> np.ndarray:
    """Whole rows [N, T + 1], int32, of the documents of at least as many tokens: see `read`."""
    chosen = text or data.eval_sources or data.sources
    if not chosen:
        raise ValueError("The runs' configs name no documents: give some with --sources.")
    hashed = not (text or data.eval_sources)
    rows = []
    for document in sources.documents(
        chosen, text_field=data.text_field, tfds_data_dir=data.tfds_data_dir
    ):
        if hashed and not packing.held_out(packing.text_hash(document.text), data.eval_fraction):
            continue
        tokens = [*tokenizer.encode(document.text), tokenizer.eos_id]
        starts = range(0, len(tokens) - length, length)
        rows += [np.array(tokens[start : start + length + 1], np.int32) for start in starts]
    if not rows:
        raise ValueError(f"No document of {chosen} has more than {length:,} tokens.")
    order = np.random.default_rng(0).permutation(len(rows))
    return np.stack(rows)[order[: max_rows or len(rows)]]


def table(curves: Sequence[Curve]) -> Iterator[str]:
    """Lines: nats per token by octaves of positions, counted from 0."""
    width = max(12, *(len(curve.label) + 2 for curve in curves))
    yield f"{'positions':>13}{'tokens':>10}" + "".join(f"{c.label:>{width}}" for c in curves)
    edges = _edges(len(curves[0].nats_T), 1)
    for start, stop in itertools.pairwise(edges):
        means = (f"{c.nats_T[start:stop].mean():{width}.4f}" for c in curves)
        count = (stop - start) * curves[0].rows
        yield f"{f'{start:,}-{stop - 1:,}':>13}{count:10,}" + "".join(means)


def draw(curves: Sequence[Curve], path: pathlib.Path) -> None:
    """The curves in one picture, in bins of half an octave."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    edges = np.array(_edges(len(curves[0].nats_T), 2))
    middle = (edges[:-1] + edges[1:]) / 2
    for curve in curves:
        mean = np.add.reduceat(curve.nats_T, edges[:-1]) / np.diff(edges)
        axes.plot(middle, mean, "o-", label=curve.label, markersize=3, linewidth=1.4)
    for trained in {curve.trained for curve in curves}:
        axes.axvline(trained, color="gray", linestyle=":", linewidth=1)
        axes.annotate(
            " trained to here",
            (trained, 0.01),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color="gray",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    rows, length = curves[0].rows, len(curves[0].nats_T)
    axes.set(
        xlabel=f"position in {rows:,} rows of {length:,} tokens; a point is half an octave of them",
        ylabel="loss, nats per token",
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _held_out(data: DataConfig) -> tuple:
    return data.eval_sources or (data.sources, data.eval_fraction)


def _variants(
    model: ModelConfig, trained: int, length: int, scalings: Sequence[str]
) -> Iterator[tuple[str, ModelConfig]]:
    """What a run is read as: the scaling, '' for none, and the model."""
    for scaling in scalings:
        if scaling not in (AS_TRAINED, *ROPE_SCALINGS[1:]):
            known = ", ".join((AS_TRAINED, *ROPE_SCALINGS[1:]))
            raise ValueError(f"--scalings: {scaling!r} should be one of {known}.")
        if scaling != AS_TRAINED and length <= trained:
            raise ValueError(
                f"--length={length} is not above the {trained} tokens of the training, so there is"
                f" nothing to scale: give a greater one or --scalings={AS_TRAINED}."
            )
    if model.position == "alibi" or model.rope_scaling or not scalings:
        scalings = (AS_TRAINED,)
    factor = {"rope_factor": length / trained, "rope_original_length": trained}
    for scaling in scalings:
        if scaling == AS_TRAINED:
            yield "", model
        else:
            yield scaling, dataclasses.replace(model, rope_scaling=scaling, **factor)


def _mean(model, rows_NT: np.ndarray, label: str) -> np.ndarray:
    N, T = rows_NT.shape[0], rows_NT.shape[1] - 1
    at = np.arange(T, dtype=np.int32)[None]
    total = np.zeros(T)
    with Progress(label, N, unit="rows") as progress:
        for n, row in enumerate(rows_NT):
            batch = {
                "tokens_BT": row[None, :-1],
                "targets_BT": row[None, 1:],
                "positions_BT": at,
                "segments_BT": np.ones_like(at),
                "mask_BT": np.ones_like(at, bool),
            }
            total += np.asarray(perplexity.token_losses(model, batch, jnp.float32), np.float64)[0]
            progress.update(n + 1)
    return total / N


def _edges(length: int, per_octave: int) -> list[int]:
    """Bins of positions: the first ones together, then shares of an octave up to `length`."""
    octaves = np.arange(0, np.log2(max(length / _FIRST_BIN, 1)), 1 / per_octave)
    return sorted({0, length, *np.round(_FIRST_BIN * 2**octaves).astype(int).tolist()})
