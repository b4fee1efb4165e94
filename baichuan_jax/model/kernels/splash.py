"""Attention on TPUs: JAX's splash kernel, with ALiBi in extra columns (`columns`).

The kernel is a public module of `jax.experimental.pallas`, read in jax 0.10.2 and 0.12.0. It
multiplies no scale in, so queries come scaled; it takes any length in whole blocks, so rows are
padded to one; documents are its segment ids, of which 0 sees itself, so padding is cleared after.

Legend: B batch, T tokens, H heads, K head width.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library

from baichuan_jax.model.kernels.blockwise import SAVED
from baichuan_jax.model.kernels.columns import with_alibi

_LANES = 128  # a block is a multiple of the vector unit's width
_BLOCKS = (1_024, 512, 256, _LANES)


def attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    slopes_H: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`model.attention.attention` among tokens in order; `interpret` runs it without a TPU."""
    T, H, K = q_BTHK.shape[1:]
    scale = K**-0.5
    q_BTHK = (q_BTHK.astype(jnp.float32) * scale).astype(q_BTHK.dtype)
    if slopes_H is not None:
        q_BTHK, k_BTHK = with_alibi(q_BTHK, k_BTHK, positions_BT, slopes_H, 1.0)
    size = -(-T // _LANES) * _LANES

    def rows(x):
        x = jnp.pad(x, [(0, 0), (0, size - T)] + [(0, 0)] * (x.ndim - 2))
        return x.swapaxes(1, 2) if x.ndim == 4 else x

    ids = rows(segments_BT)
    out_BHTK = jax.vmap(_kernel(size, H, interpret))(
        rows(q_BTHK), rows(k_BTHK), rows(v_BTHK), library.SegmentIds(ids, ids)
    )
    out_BTHK = out_BHTK.swapaxes(1, 2)[:, :T]
    return jnp.where(segments_BT[..., None, None] > 0, out_BTHK, 0)


def _kernel(size: int, heads: int, interpret: bool):
    # Not the fused backward kernel: it holds a gradient of all queries for each block of keys,
    # 8 GiB for one row of 32,768 tokens.
    block = next(block for block in _BLOCKS if size % block == 0)
    blocks = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, 512),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512),
        block_q_dq=block,
        block_kv_dq=block,
    )
    causal = library.CausalMask((size, size))
    return library.make_splash_mha(
        library.MultiHeadMask([causal] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
