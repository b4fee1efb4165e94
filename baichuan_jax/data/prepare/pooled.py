"""Embeddings of documents by one of our own checkpoints: mean-pooled last hidden states (§2.1).

The model is handed in, loaded: nothing here knows how. Documents are cut to their first tokens,
sorted by length and padded to powers of two, so that few programs are compiled and little is
padded.

The states of a language model all point about the same way, and a few directions hold most of
what is left: unrelated documents have cosines of 0.9 and more. So the mean over the corpus is
taken away, and each direction divided by its spread, those of hardly any spread by a floor.

Legend: N documents, B of them at a time, T tokens, D model.
"""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import NamedSharding

from baichuan_jax.config import BATCH_AXES
from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.embed import load, save, shard_name

_SHORTEST = 32  # tokens that documents are padded to
_CHARACTERS = 16  # more of them than any tokenizer puts into a token of prose
_FLOOR = 1e-3  # of the largest variance: directions of less are not blown up further


def run(corpus: Corpus, stage: str, model, max_tokens: int = 512) -> None:
    """Writes the embeddings of all documents that are kept, float16 of length one.

    Args:
      model: an `inference.load.LanguageModel`; see `embed`.
      max_tokens: of a document that are read; never more than the model was trained on.
    """
    shards = range(corpus.num_shards())
    count, sums_D, products_DD = 0, 0.0, 0.0
    for shard in shards:
        states_ND = embed(corpus.read(shard, "text")["text"].to_pylist(), model, max_tokens)
        save(corpus, stage, shard_name(shard), states_ND)
        states_ND = states_ND[states_ND.any(axis=1)].astype(np.float64)
        count += len(states_ND)
        sums_D += states_ND.sum(axis=0)
        products_DD += states_ND.T @ states_ND
    mean_D = sums_D / max(1, count)
    whiten_DD = whitening(products_DD / max(1, count) - np.outer(mean_D, mean_D))
    for shard in shards:
        states_ND = load(corpus, stage, shard_name(shard))
        white_ND = np.where(states_ND.any(axis=1)[:, None], (states_ND - mean_D) @ whiten_DD, 0)
        save(corpus, stage, shard_name(shard), _unit(white_ND).astype(np.float16))


def whitening(covariance_DD: np.ndarray) -> np.ndarray:
    """The matrix [D, D] that makes vectors of this covariance spread alike in all directions."""
    variances_D, directions_DD = np.linalg.eigh(covariance_DD)
    floor = max(_FLOOR * variances_D[-1], np.finfo(np.float32).tiny)
    return directions_DD / np.sqrt(np.maximum(variances_D, 0) + floor)


def embed(texts: Sequence[str], model, max_tokens: int = 512) -> np.ndarray:
    """The mean of the hidden states after the final norm, over the first tokens of each text.

    Args:
      model: an `inference.load.LanguageModel`; it computes on the mesh it was loaded on, and in
        its own dtype.
      max_tokens: of a text that are read; never more than the model was trained on.

    Returns:
      Rows of length one, float32 [N, D]; zeros for a text without a token.
    """
    weights, max_tokens = model.engine.model, min(max_tokens, model.config.data.sequence_length)
    table = weights.embedding[...]
    mesh = table.sharding.mesh if isinstance(table.sharding, NamedSharding) else None
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])) if mesh else 1
    ids = model.tokenizer.encode_batch([text[: _CHARACTERS * max_tokens] for text in texts])
    ids = [row[:max_tokens] for row in ids]
    sizes = np.array([len(row) for row in ids], np.int32)
    embeddings = np.zeros((len(ids), table.shape[1]), np.float32)
    in_batch = 1 << (11 if jax.default_backend() == "cpu" else 15)  # tokens; a CPU's cache is small
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    start = 0
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        while start < len(order):
            T = max(_SHORTEST, 1 << (int(sizes[order[start]]) - 1).bit_length())
            B = max(1, in_batch // T) * parts
            batch = order[start : start + B]
            tokens_BT, sizes_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
            sizes_B[: len(batch)] = sizes[batch]
            for row, number in enumerate(batch):
                tokens_BT[row, : sizes[number]] = ids[number]
            pooled = _pool(weights, *_place(mesh, tokens_BT, sizes_B))
            embeddings[batch] = jax.device_get(pooled)[: len(batch)]
            start += B
    return embeddings


def _place(mesh: jax.sharding.Mesh | None, tokens_BT, sizes_B) -> tuple[jax.Array, jax.Array]:
    if mesh is None:
        return jnp.asarray(tokens_BT), jnp.asarray(sizes_B)
    specs = (P(BATCH_AXES, None), P(BATCH_AXES))
    return jax.device_put((tokens_BT, sizes_B), tuple(NamedSharding(mesh, spec) for spec in specs))


@jax.jit
def _pool(model, tokens_BT: jax.Array, sizes_B: jax.Array) -> jax.Array:
    positions_BT = jnp.zeros_like(tokens_BT) + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    real_BT = (positions_BT < sizes_B[:, None]).astype(jnp.int32)
    x_BTD = model.embed(tokens_BT, model.embedding[...].dtype)
    for layer in model.layers:
        x_BTD, _ = layer(x_BTD, positions_BT, real_BT)
    sums_BD = jnp.sum(model.norm(x_BTD).astype(jnp.float32) * real_BT[:, :, None], axis=1)
    lengths_B1 = jnp.linalg.norm(sums_BD, axis=1, keepdims=True)
    return sums_BD / jnp.where(lengths_B1 > 0, lengths_B1, 1)


def _unit(x_ND: np.ndarray) -> np.ndarray:
    lengths_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND / np.where(lengths_N1 > 0, lengths_N1, 1)
