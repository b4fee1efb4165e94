"""The test that a kernel passes before it is used: it agrees with the blockwise form (§2.7).

A kernel can be wrong in silence: a mask that a compiler ignores, a length that a library does not
expect. So each is run once, on the device that it will run on, for both kinds of positions, packed
rows and padding, forward and backward.

Legend: B batch, T tokens, H heads, K head width.
"""

import concurrent.futures
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from baichuan_jax.model.kernels import blockwise
from baichuan_jax.model.position import within_documents

_B, _T, _H = 2, 2_000, 3  # padded to two of splash's largest blocks
_SLOPES = np.float32([0.5, 0.03, 0.002])  # steep, and shallow enough to reach the whole row
_TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-3}  # of the largest value


def here(device_kind: str) -> list[jax.Device]:
    """This process's devices of a kind: none where a program is compiled for other machines."""
    return [device for device in jax.local_devices() if device.device_kind == device_kind]


def problem(kernel: Callable, device_kind: str, dtype: str, head_size: int, biased: bool) -> str:
    """What is wrong with a kernel on a device of such a kind, which is here; empty: nothing is.

    With ALiBi if `biased`, else without: a kernel may fail at one of them.

    Several processes run it together and answer alike: one program that differs would stop all.
    """

    def agreed() -> str:
        try:
            with jax.default_device(here(device_kind)[0]):
                answer = _compare(kernel, dtype, head_size, biased)
        except Exception as error:  # of a compiler or a library, of any kind
            answer = f"{type(error).__name__}: {str(error)[:200]}"
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(np.array(bool(answer)))
            if failed.any() and not answer:
                answer = f"it failed in process {int(failed.argmax())}"
        return answer

    # A thread of its own has no mesh and traces nothing, whatever the caller does.
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(agreed).result()


def _compare(kernel: Callable, dtype: str, head_size: int, biased: bool) -> str:
    rng = np.random.default_rng(0)
    qkvd = rng.standard_normal((4, _B, _T, _H, head_size))
    q, k, v, d_out = (jnp.asarray(x, dtype) for x in qkvd)
    slopes = jnp.asarray(_SLOPES) if biased else None
    lengths = [_T // 6, 1, _T // 2, _T - _T // 6 - 1 - _T // 2]
    whole = np.ones((_B, _T), np.int32)
    packed = np.repeat(np.int32([[1, 2, 3, 0], [4, 5, 6, 7]]), lengths, axis=1)

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, positions, segments):
        at = positions, segments, slopes
        out, transpose = jax.vjp(lambda *qkv: attend(*qkv, *at), q, k, v)
        return out, *transpose(d_out)

    for rows, segments in {"whole": whole, "packed": packed}.items():
        where = jnp.asarray(within_documents(segments)), jnp.asarray(segments)
        pairs = zip(run(kernel, *where), run(blockwise.attention, *where), strict=True)
        for name, pair in zip(("output", "dq", "dk", "dv"), pairs, strict=True):
            got, want = (np.asarray(x, np.float64) for x in pair)
            error = np.abs(got - want).max() / np.abs(want).max()
            if not error <= _TOLERANCE[dtype]:  # NaN, too
                kind = "ALiBi" if biased else "RoPE"
                return f"{kind}, {rows} rows: {name} is off by {error:.2g} of its largest value"
    return ""
