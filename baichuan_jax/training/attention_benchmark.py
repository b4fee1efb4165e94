"""Attention by everything that the machine has for it, forward and backward, timed in turn.

The forward pass is that of training: it keeps what the backward pass needs. The backward pass is
timed alone, as the call of what `jax.vjp` returned. FLOPs are those of the pairs of tokens that see
each other: two products forward, five backward, one of which computes the logits again.

Besides this project's kernels there is `jax.nn.dot_product_attention`, with a dense bias and a
dense mask where it has no other, as long as these are small beside the memory.

Legend: B batch, T tokens, H heads, K head width.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_jax.config import Config, ModelConfig
from baichuan_jax.model.kernels import blockwise, check, cudnn, splash
from baichuan_jax.model.position import alibi_slopes
from baichuan_jax.parallel.cost import flops_per_token
from baichuan_jax.training import device_benchmark, widths_benchmark
from baichuan_jax.training.metrics import peak_flops

FLOPS = {"forward": 4, "backward": 10}  # of a pair of tokens, for each column of each head
_KINDS, _ROWS = ("RoPE", "ALiBi"), ("whole", "packed")
_USUAL = 4_096  # tokens of a row in training, for which the cost of ALiBi is told

Key = tuple[str, str, str]  # name of a kernel, rows, pass


@dataclasses.dataclass(frozen=True)
class Load:
    """What is attended to: `tokens` of all rows together, in rows of each of `lengths`."""

    dtype: str = "bfloat16"
    heads: int = 32
    head_size: int = 128
    tokens: int = 32_768
    lengths: tuple[int, ...] = (2_048, 4_096, 8_192, 16_384, 32_768)

    @classmethod
    def suited(cls, platform: str) -> "Load":
        """What a device of the platform does in minutes."""
        return cls("float32", 4, 64, 1_024, (512, 1_024)) if platform == "cpu" else cls()

    def shape(self, length: int) -> tuple[int, int, int, int]:
        """[B, T, H, K] of queries, keys and values; at least one row."""
        return max(1, self.tokens // length), length, self.heads, self.head_size


def report(rounds: int, lengths: Sequence[str], recipes: dict[str, Config]) -> Iterator[str]:
    """The table, line by line as it is measured.

    Args:
      rounds: counted; their median is told.
      lengths: of rows, as numbers in text; none: those that suit the device.
      recipes: '13B', of whose step the cost of ALiBi is told.

    Raises:
      ValueError: a length is no positive number.
    """
    if wrong := [length for length in lengths if not length.isdecimal() or int(length) < 1]:
        raise ValueError(f"--lengths={','.join(lengths)}: {wrong[0]!r} is no number of tokens.")
    device = jax.devices()[0]
    load = Load.suited(device.platform)
    load = dataclasses.replace(load, lengths=tuple(map(int, lengths)) or load.lengths)
    yield device_benchmark.about()
    yield from table(load, rounds, recipes["13B"].model, device)


def table(load: Load, rounds: int, model: ModelConfig, device: jax.Device) -> Iterator[str]:
    """The same for a load on a device, which is the one in use."""
    ours, problems = kernels(device, load.dtype, load.head_size)
    yield from problems
    yield (
        f"{load.dtype}, {load.heads} heads of {load.head_size}, {load.tokens:,} tokens in rows,"
        " which are one document each, or packed: about six"
    )
    yield f"{'whole rows, forward':>48}{'backward':>22}{'packed rows':>14}{'backward':>14}"
    columns = f"{'ms':>8}{'TFLOP/s':>8}{'limit':>6}" * 2 + f"{'ms':>8}{'limit':>6}" * 2
    yield f"{'length':>6} {'':6}{'by':13}{columns}"
    usual = min(load.lengths, key=lambda length: abs(length - _USUAL))
    device_limits = device_benchmark.product(load.dtype), device_benchmark.copy()
    spent, limits, bandwidths = {}, [], []
    for length in load.lengths:
        for kind in _KINDS:
            tried = {(name, rows): kernel for name, kernel in ours.items() for rows in _ROWS}
            tried |= _peers(load, length, kind, device)
            seconds = _measure(load, length, kind, tried, device_limits, rounds)
            limits.append(seconds.pop("limit"))
            bandwidths.append(seconds.pop("bandwidth"))
            for name in dict.fromkeys(name for name, _ in tried):
                yield from _lines(load, length, kind, name, seconds, limits[-1])
            if length == usual:
                spent[kind], limit = seconds, limits[-1]
    yield from _cost_of_alibi(load, usual, next(iter(ours)), spent, limit, model)
    if device.platform == "gpu":
        yield from widths_benchmark.lines(load.shape(usual), load.dtype, rounds)
    peak = peak_flops(device)
    of_peak = f", {max(limits) / peak:.0%} of the data sheet's {peak / 1e12:,.0f}" if peak else ""
    yield (
        f"limit: a product of square matrices in the same minute, {min(limits) / 1e12:,.3g} to"
        f" {max(limits) / 1e12:,.3g} TFLOP/s{of_peak}; memory: {np.median(bandwidths) / 1e9:,.0f}"
        " GB/s read and written"
    )


def kernels(device: jax.Device, dtype: str, head_size: int) -> tuple[dict[str, Callable], list]:
    """This project's kernels for a device by name, the best first; what is wrong with others.

    One that fails its test (`kernels.check`) is told, and timed all the same.
    """
    found, problems = {}, []
    if device.platform == "tpu":
        found["splash"] = splash.attention
    if device.platform == "gpu":
        if reason := cudnn.unfit(device.device_kind, dtype, head_size, True):
            problems.append(f"not cudnn: {reason}")
        else:
            found["cudnn"] = cudnn.attention
    for name, kernel in found.items():
        for biased in (False, True):
            problem = check.problem(kernel, device.device_kind, dtype, head_size, biased)
            if problem:
                problems.append(f"{name} IS NOT RIGHT HERE: {problem}")
    return found | {"blockwise": blockwise.attention}, problems


def public(implementation: str, packed: bool, q, k, v, positions_BT, segments_BT, slopes_H):
    """`jax.nn.dot_product_attention` as one of this project's kernels."""
    bias = mask = None
    if slopes_H is not None:
        index = jnp.arange(q.shape[1])
        distance = (index - index[:, None]).astype(jnp.float32)
        bias = (slopes_H[:, None, None] * distance)[None].astype(q.dtype)
    if packed:
        mask = (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, bias, mask, is_causal=True, implementation=implementation
    )


def _peers(load: Load, length: int, kind: str, device: jax.Device) -> dict[tuple, Callable]:
    """JAX's own by (name, rows), where its dense arrays are a quarter of the memory at most."""
    room = (device.memory_stats() or {}).get("bytes_limit", 8 << 30) / 4
    B, T, H, _ = load.shape(length)
    needed = {("xla", rows): 12 * B * H * T * T for rows in _ROWS}  # logits and their gradients
    if device.platform == "gpu":
        bias = 6 * H * T * T if kind == "ALiBi" else 0
        needed |= {("cudnn", "whole"): bias, ("cudnn", "packed"): B * bias + 5 * B * T * T}
    return {
        (f"jax.nn {name}", rows): functools.partial(public, name, rows == "packed")
        for (name, rows), size in needed.items()
        if size <= room
    }


def _measure(load, length, kind, tried, device_limits, rounds) -> dict:
    """By `Key` the seconds, or what was raised; FLOP/s and bytes/s of the device besides."""
    shape = load.shape(length)
    q, k, v, d_out = jax.random.normal(jax.random.key(length), (4, *shape), load.dtype)
    slopes = jnp.asarray(alibi_slopes(load.heads)) if kind == "ALiBi" else None
    calls, failed = {}, {}
    for (name, rows), kernel in tried.items():
        where = map(jnp.asarray, _where(shape, rows))
        try:
            for which, call in passes(kernel, (q, k, v), d_out, *where, slopes).items():
                calls[name, rows, which] = call
        except Exception as error:  # of a compiler or a library, of any kind
            failed |= {(name, rows, which): error for which in FLOPS}
    (multiply, flops), (copy, moved) = device_limits
    seconds = device_benchmark.in_turn(calls | {"product": multiply, "copy": copy}, rounds)
    limits = {"limit": flops / seconds["product"], "bandwidth": moved / seconds["copy"]}
    return seconds | failed | limits


def _where(shape: tuple, rows: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments, int32 [B, T]."""
    B, T = shape[:2]
    if rows == "packed":
        return device_benchmark.packed_rows(B, T)
    return np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.ones((B, T), np.int32)


def passes(kernel: Callable, qkv: tuple, d_out: jax.Array, *rest) -> dict[str, Callable]:
    """The forward pass as training runs it, and the backward pass alone: two calls."""
    forward, backward = _programs(kernel)
    transpose = forward(*qkv, *rest)[1]
    return {
        "forward": lambda: forward(*qkv, *rest),
        "backward": lambda: backward(transpose, d_out),
    }


@functools.cache  # one program for whole and packed rows
def _programs(kernel: Callable) -> tuple[Callable, Callable]:
    def attend(q, k, v, *rest):
        return jax.vjp(lambda *qkv: kernel(*qkv, *rest), q, k, v)

    return jax.jit(attend), jax.jit(lambda transpose, d_out: transpose(d_out))


def flops(load: Load, length: int, rows: str, which: str) -> float:
    """Of one pass, by the pairs of tokens that see each other."""
    pairs = int((_where(load.shape(length), rows)[0].astype(np.int64) + 1).sum())
    return float(FLOPS[which] * pairs * load.head_size * load.heads)


def _lines(load, length, kind, name, seconds, limit) -> Iterator[str]:
    """A line of the table, and one for each error."""
    line, errors = f"{length:6,} {kind:6}{name:13}", {}
    for rows in _ROWS:
        for which in FLOPS:
            found = seconds.get((name, rows, which))
            ms = rate = share = "-"
            if isinstance(found, Exception):
                ms, text = "failed", device_benchmark.first_line(found)
                errors.setdefault(text, f"{'':13}{which}, {rows} rows: {text}")
            elif found is not None:
                per_second = flops(load, length, rows, which) / found
                ms, rate = f"{1e3 * found:.2f}", f"{per_second / 1e12:.3g}"
                share = f"{per_second / limit:.0%}"
            line += f"{ms:>8}{f'{rate:>8}' if rows == 'whole' else ''}{share:>6}"
    yield line
    yield from errors.values()


def _cost_of_alibi(load, length, name, spent, limit, model: ModelConfig) -> Iterator[str]:
    """What ALiBi takes beside RoPE with one kernel."""
    for rows in _ROWS:
        times = [[spent[kind][name, rows, which] for which in FLOPS] for kind in _KINDS]
        where = f"ALiBi beside RoPE by {name}, {length:,} tokens, {rows} rows:"
        if any(isinstance(one, Exception) for both in times for one in both):
            yield f"{where} not known, for one of them failed"
            continue
        rope, alibi = map(sum, times)
        B, T, H, _ = load.shape(length)
        more = (alibi - rope) / (B * T * H) * model.num_heads * model.num_layers
        step = flops_per_token(model, length) / limit
        yield (
            f"{where} {alibi / rope - 1:+.1%} of attention's time,"
            f" {more / step:+.2%} of a 13B step that runs at the limit"
        )
