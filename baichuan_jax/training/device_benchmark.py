"""How the benchmarks time a call, and what the device in hand can do at most."""

import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_jax.model.position import within_documents

WARM_UP = 3  # rounds that are not counted
_LEAST = 0.02  # seconds of a measurement: launching a kernel takes a thousandth of it


def timed(work: Callable[[], Any], wait: Callable = jax.block_until_ready) -> Callable[[], float]:
    """A function that measures the work, in seconds of doing it once.

    It does so as often as fills a fiftieth of a second and waits for the last alone, for a device
    takes what it is given in order, and starting it is not what is measured. The work is done here
    at least twice, to compile it and to see how long it takes.
    """

    def measure(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            result = work()
        wait(result)
        return (time.perf_counter() - began) / times

    measure(1)
    times = math.ceil(_LEAST / measure(1))
    return lambda: measure(times)


def in_turn(calls: dict, rounds: int) -> dict:
    """Times calls in turn, so that a device whose speed drifts is slow for all of them.

    Args:
      calls: name to work, as `timed` takes it.

    Returns:
      By name the median of `rounds` rounds in seconds, or the exception that the work raised.
    """
    results, ready = {}, {}
    for name, work in calls.items():
        try:
            ready[name] = timed(work)
        except Exception as error:  # of a compiler or a library, of any kind
            results[name] = error
    seconds = [{name: call() for name, call in ready.items()} for _ in range(WARM_UP + rounds)]
    for name in ready:
        results[name] = statistics.median(one[name] for one in seconds[WARM_UP:])
    return results


def product_size(device: str) -> int:
    """Rows and columns of the square matrices whose product shows a library's own limit."""
    return 1_024 if device == "cpu" else 8_192  # a small one is over before a GPU is busy


def product(dtype: str) -> tuple[Callable[[], jax.Array], int]:
    """The product of two such matrices, and its FLOPs. Random: zeros and ones draw less power."""
    device = jax.default_backend()
    size = product_size(device)
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    # XLA's bfloat16 products on a CPU are slow in any other way.
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=_sums(device)))
    return lambda: multiply(a, b), 2 * size**3


def _sums(device: str):
    return jnp.float32 if device == "cpu" else None


def copy() -> tuple[Callable[[], jax.Array], int]:
    """A pass over a large array, and the bytes that it reads and writes."""
    x = jnp.ones(1 << (25 if jax.default_backend() == "cpu" else 29))
    negate = jax.jit(jnp.negative)
    return lambda: negate(x), 2 * x.nbytes


def about() -> str:
    """The device, versions and the date, in a line."""
    device = jax.devices()[0]
    runtime = device.client.platform_version.splitlines()[-1]  # with CUDA's version
    return (
        f"{device.device_kind}, {runtime}, jax {jax.__version__}, Python"
        f" {platform.python_version()}, {datetime.date.today()}"
    )


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a table."""
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0][:120]}"


def packed_rows(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments, int32 [rows, length], of about six documents a row; no padding."""
    rng = np.random.default_rng(0)
    starts = rng.random((rows, length)) < 5 / length
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    return within_documents(segments), segments
