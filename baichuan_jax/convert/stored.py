"""Tensors that lie in files, read a few rows at a time.

Plain reads by offset: the pages of a memory map would count as the process's own memory,
and a damaged file under a map ends the process.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

# The bits that are all ones in infinities and NaN, and in nothing else.
_EXPONENTS = {
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(np.float32): 0x7F80_0000,
}
FLOATS = tuple(_EXPONENTS)  # the dtypes that weights may have

_BLOCK = 1 << 22  # elements looked at in one go


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
      name: in the file.
      dtype: None where it has no numpy dtype: such a tensor is only there to be refused.
      offset: bytes of the file before the first element.
      strides: in elements, not negative.
      verify: called before each read; raises ValueError where the file is damaged.
    """

    name: str
    file: Path
    dtype: np.dtype | None
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    verify: Callable[[], None] | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the first axis, as far as there are, in the file's dtype.

        Raises:
          ValueError: the file is damaged, or an element is infinite or NaN.
          OSError: it cannot be read.
        """
        if self.verify is not None:
            self.verify()
        end = self.shape[0] if stop is None else min(stop, self.shape[0])
        shape = (max(0, end - start), *self.shape[1:])
        if 0 in shape:
            return np.empty(shape, self.dtype)
        itemsize = self.dtype.itemsize
        begin = self.offset + start * self.strides[0] * itemsize
        count = extent(shape, self.strides) * itemsize
        data = np.fromfile(self.file, np.uint8, count, offset=begin)
        if data.size != count:
            raise ValueError(f"{self} is cut off: the file ends within it.")
        strides = tuple(stride * itemsize for stride in self.strides)
        x = np.lib.stride_tricks.as_strided(data.view(self.dtype), shape, strides, writeable=False)
        check_finite(x, str(self), start)
        return x


def float_dtype(dtype, name: str) -> np.dtype:
    """A dtype that weights may have.

    Raises:
      ValueError: another one; names the flag and what it is for.
    """
    if str(dtype) not in map(str, FLOATS):
        known = ", ".join(map(str, FLOATS))
        raise ValueError(f"{name}: {dtype} is not among {known}. Choose with --dtype.")
    return np.dtype(dtype)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a strided tensor, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def check_finite(x: np.ndarray, name: str, first_row: int = 0) -> None:
    """Refuses infinities and NaN.

    Raises:
      ValueError: names the tensor and the first bad element.
    """
    exponent = np.array(_EXPONENTS[x.dtype], f"uint{8 * x.dtype.itemsize}")
    bits = x.view(exponent.dtype)
    rows = max(1, _BLOCK // max(1, math.prod(x.shape[1:])))
    for start in range(0, x.shape[0], rows):
        bad = (bits[start : start + rows] & exponent) == exponent
        if bad.any():
            row, *rest = np.argwhere(bad)[0].tolist()
            value = float(x[(start + row, *rest)])
            index = [first_row + start + row, *rest]
            raise ValueError(f"{name} holds {value} at {index}: weights must be finite.")
