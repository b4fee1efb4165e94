"""The transformer in float64 NumPy, written from the paper's equations (§2.2–2.5).

One document at a time, whole matrices, a loop over heads: as plain as it can be, and
nothing of it is shared with the code under test.
"""

import numpy as np


def rms_norm(x, gain, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * gain


def rope(x_TK, base):
    """Turns each pair (i, i + K/2) as a complex number by position · base^(-2i/K)."""
    T, K = x_TK.shape
    z = x_TK[:, : K // 2] + 1j * x_TK[:, K // 2 :]
    z = z * np.exp(1j * np.outer(np.arange(T), base ** (-2.0 * np.arange(K // 2) / K)))
    return np.concatenate([z.real, z.imag], axis=1)


def alibi_slope(head, num_heads):
    """Press et al.: a geometric series; between powers of two, odd terms of the finer one."""
    power = 1
    while power * 2 <= num_heads:
        power *= 2
    if head < power:
        return 2.0 ** (-8.0 * (head + 1) / power)
    return 2.0 ** (-8.0 * (2 * (head - power) + 1) / (2 * power))


def attention(x_TD, qkv_D3HK, out_HKD, position, base):
    T, (_, _, H, K) = len(x_TD), qkv_D3HK.shape
    result = np.zeros_like(x_TD)
    for h in range(H):
        q, k, v = (x_TD @ qkv_D3HK[:, n, h] for n in range(3))
        if position == "rope":
            q, k = rope(q, base), rope(k, base)
        logits = q @ k.T / np.sqrt(K)
        if position == "alibi":
            logits += alibi_slope(h, H) * (np.arange(T)[None] - np.arange(T)[:, None])
        logits[np.triu_indices(T, 1)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        result += (weights / weights.sum(-1, keepdims=True)) @ v @ out_HKD[h]
    return result


def swiglu(x, gate_up_D2F, down_FD):
    gate, up = x @ gate_up_D2F[:, 0], x @ gate_up_D2F[:, 1]
    return (gate / (1 + np.exp(-gate)) * up) @ down_FD


def logits(weights, tokens_T, config):
    """Float64 logits [T, V] of one document. `weights` maps our parameter names to arrays."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = w["embedding"][tokens_T]
    for n in range(config.num_layers):
        layer = {name[7:]: value[n] for name, value in w.items() if name.startswith("layers.")}
        h = rms_norm(x, layer["attention_norm.gain"], config.norm_epsilon)
        x = x + attention(
            h, layer["attention.qkv"], layer["attention.out"], config.position, config.rope_base
        )
        h = rms_norm(x, layer["mlp_norm.gain"], config.norm_epsilon)
        x = x + swiglu(h, layer["mlp.gate_up"], layer["mlp.down"])
    x = rms_norm(x, w["norm.gain"], config.norm_epsilon)
    head = w["head"]
    if config.norm_head:
        head = head / np.linalg.norm(head, axis=1, keepdims=True)
    return (x @ head.T)[:, : config.vocab_size]


def loss_terms(logits_TV, targets_T):
    """Cross-entropy and squared largest logit of each position."""
    top = logits_TV.max(-1)
    log_sum = top + np.log(np.exp(logits_TV - top[:, None]).sum(-1))
    return log_sum - logits_TV[np.arange(len(targets_T)), targets_T], top**2
