"""What attention is, in float64 by the textbook formulas, and rows to try it on.

Legend: B batch, T queries, S keys, H heads, K head width.
"""

import numpy as np


def attention(q, k, v, q_pos, k_pos, q_seg, k_seg, slopes, d_out):
    """Output and gradients of queries, keys and values."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    distance = k_pos[:, None, :] - q_pos[:, :, None]
    visible = (q_seg[:, :, None] == k_seg[:, None]) & (distance <= 0) & (q_seg[:, :, None] > 0)
    s = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    s = s + np.float64(slopes)[:, None, None] * distance[:, None]
    s = np.where(visible[:, None], s, -np.inf)
    e = np.exp(s - np.maximum(s.max(-1, keepdims=True), -1e300))
    p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhts,bshk->bthk", p, v)
    dp = np.einsum("bthk,bshk->bhts", d_out, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    dq = np.einsum("bhts,bshk->bthk", ds, k)
    dk = np.einsum("bhts,bthk->bshk", ds, q)
    dv = np.einsum("bhts,bthk->bshk", p, d_out)
    return out, dq, dk, dv


def packed(B, T, rng):
    """Positions and segments of rows with documents of random lengths and some padding."""
    positions, segments = np.zeros((2, B, T), np.int32)
    for row in range(B):
        start, number = 0, 1
        stop_all = T - int(rng.integers(0, 3))
        while start < stop_all:
            stop = min(stop_all, start + int(rng.integers(1, T)))
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = number
            start, number = stop, number + 1
    return positions, segments
