"""How a model of ours finds the bits per byte of many documents.

It computes on the mesh that it lies on. A row of a batch is one document, and batches have few
shapes, so that little is compiled. The cross-entropy is `inference.perplexity.losses`; bytes are
those of the predicted tokens, as in a run's metrics.

Legend: B rows of a batch, T tokens of a row, N documents.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jax import P
from jax.sharding import Mesh, NamedSharding

from baichuan_jax.config import BATCH_AXES
from baichuan_jax.inference.perplexity import losses

_SHORTEST = 64  # tokens; batches are no narrower
_CHARACTERS = 8  # for each token that is wanted; text has fewer, and the rest is not tokenised


def bits_per_byte(
    texts: pa.StringArray | pa.ChunkedArray, model: Any, tokens: int, batch_tokens: int
) -> np.ndarray:
    """Bits per byte of the beginning of each text: float32 [N], NaN for less than two tokens.

    Args:
      model: an `inference.load.LanguageModel`.
      tokens: that are read of a text, and no more than the model was trained on.
      batch_tokens: in one batch, on each part of the mesh with rows of its own.
    """
    stacked = _stacked(model.engine.model)
    table = stacked.embedding[...]
    mesh = table.sharding.mesh if isinstance(table.sharding, NamedSharding) else None
    limit = min(tokens, model.config.data.sequence_length)
    rows = _rows(texts, model.tokenizer, limit)
    sizes = np.array([len(row) - 1 for row in rows], np.int64)
    scores = np.full(len(rows), np.nan, np.float32)
    if not (sizes > 0).any():
        return scores
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        order, batches = _batches(rows, sizes, limit, batch_tokens, mesh)
        nats, _ = losses(stacked, batches, table.dtype)
    real = order >= 0  # the others only fill a batch
    lengths = [model.tokenizer.token_bytes[rows[n][1:]].sum() for n in order[real]]
    with np.errstate(divide="ignore"):
        found = nats[real] / np.log(2) / np.array(lengths)
    scores[order[real]] = np.where(np.isfinite(found), found, np.nan)
    return scores


def _stacked(model: Any) -> Any:
    """A served model with its layers as one stack, which is what `losses` takes."""
    with_stack = jax.tree.map(lambda x: x, model)  # a copy that shares the arrays
    with_stack.layers = jax.tree.map(lambda *layers: jnp.stack(layers), *model.layers)
    return with_stack


def _rows(texts: pa.StringArray | pa.ChunkedArray, tokenizer: Any, tokens: int) -> list[np.ndarray]:
    """The first tokens of each text, and an EOS where all of it is among them."""
    texts = pc.fill_null(texts, "")
    starts = pc.utf8_slice_codeunits(texts, 0, _CHARACTERS * tokens)
    whole = pc.equal(pc.utf8_length(texts), pc.utf8_length(starts)).to_pylist()
    ids = tokenizer.encode_batch(starts.to_pylist())
    return [
        np.array([*row, tokenizer.eos_id][: tokens + 1] if ends else row[: tokens + 1], np.int32)
        for row, ends in zip(ids, whole, strict=True)
    ]


def _batches(
    rows: Sequence[np.ndarray], sizes: np.ndarray, limit: int, batch_tokens: int, mesh: Mesh | None
) -> tuple[np.ndarray, Iterator[dict[str, Any]]]:
    """The document of each row of all batches, -1 where a row only fills one; and the batches."""
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])) if mesh else 1
    widths = [limit]  # each half of the next
    while widths[0] >= 2 * _SHORTEST:
        widths.insert(0, -(-widths[0] // 2))
    width_of = np.searchsorted(widths, sizes)
    plan = []
    for number, width in enumerate(widths):
        size = max(1, batch_tokens // width) * parts
        chosen = np.flatnonzero((width_of == number) & (sizes > 0))
        filled = np.append(chosen, np.full(-len(chosen) % size, -1))
        plan += [(width, batch) for batch in filled.reshape(-1, size)]
    order = np.concatenate([batch for _, batch in plan])
    return order, (_batch(rows, batch, width, mesh) for width, batch in plan)


def _batch(
    rows: Sequence[np.ndarray], chosen: np.ndarray, width: int, mesh: Mesh | None
) -> dict[str, Any]:
    """As `data.stream.Stream.rows` gives it, with one document a row."""
    tokens = np.zeros((len(chosen), width + 1), np.int32)
    filled = np.zeros((len(chosen), width + 1), bool)
    for b, n in enumerate(chosen):
        if n >= 0:
            tokens[b, : len(rows[n])] = rows[n]
            filled[b, : len(rows[n])] = True
    places = np.broadcast_to(np.arange(width, dtype=np.int32), (len(chosen), width))
    batch = {
        "tokens_BT": tokens[:, :-1],
        "targets_BT": tokens[:, 1:],
        "segments_BT": filled[:, :-1].astype(np.int32),
        "positions_BT": places * filled[:, :-1],
        "mask_BT": filled[:, 1:],
    }
    if mesh is None:
        return batch
    return jax.device_put(batch, NamedSharding(mesh, P(BATCH_AXES, None)))
