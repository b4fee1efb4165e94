"""Reads and writes safetensors files piece by piece.

A file is 8 bytes (the header's length), a JSON header, and the tensors one after the
other. The library of that name maps a whole file, or wants all of it at once to write.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from baichuan_jax.convert.stored import StoredTensor, row_major

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, as the library has it


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file.

    Raises:
      ValueError: the file is cut off or damaged; names it and the tensor.
      OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is not a whole safetensors file: it has {size:,} bytes, and its header"
                f" should have {length:,}. Its download was cut short, or it is another file."
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its header is damaged ({error}).") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is damaged (it is no JSON object).")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _description(path, name, entry)
        if 8 + length + end > size:
            raise ValueError(
                f"{path}: {name} ends at byte {8 + length + end:,}, but the file has {size:,}: it"
                " is cut off."
            )
        known = _DTYPES.get(dtype)
        if known is not None and math.prod(shape) * known.itemsize != end - begin:
            raise ValueError(
                f"{path}: {name} has {end - begin:,} bytes, which is not {list(shape)} in {dtype}."
            )
        tensors[name] = StoredTensor(name, path, known, shape, 8 + length + begin, row_major(shape))
    return tensors


def _description(path: Path, name: str, entry) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, and the first byte and the one past the last, with nothing taken on trust."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            numbers = [*shape, begin, end]
            if all(type(n) is int and n >= 0 for n in numbers) and begin <= end:
                return dtype, tuple(shape), begin, end
    raise ValueError(f"{path}: {name} has a damaged description in the header.")


class SafetensorsWriter:
    """Writes tensors in any order, whole or by rows, into one or several files.

    The files are `model.safetensors`, or `model-00001-of-0000N.safetensors` and an index.

    Args:
      directory: an existing folder.
      tensors: {name: (shape, dtype)} in the order in which they fill the files.
      max_bytes: of the tensors of one file; a larger tensor has a file of its own.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        max_bytes: int,
    ):
        sizes = {name: math.prod(s) * dtype.itemsize for name, (s, dtype) in tensors.items()}
        shards, filled = [[]], 0
        for name, size in sizes.items():
            if shards[-1] and filled + size > max_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        self._places: dict[str, tuple[Path, int, np.dtype, tuple[int, ...]]] = {}
        self._missing = dict(sizes)
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(directory / file, names, tensors, sizes)
            weight_map |= {name: file for name in names}
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            path = directory / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _begin(self, path: Path, names: Iterable[str], tensors, sizes) -> None:
        """Writes the header, and makes the file as long as it is going to be."""
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        # Wide dtypes first, so that each tensor is aligned, as readers that map files want it.
        for name in sorted(names, key=lambda name: -tensors[name][1].itemsize):
            shape, dtype = tensors[name]
            offsets = [offset, offset + sizes[name]]
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": offsets}
            self._places[name] = (path, offset, dtype, shape)
            offset += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        for name in names:
            path, begin, dtype, shape = self._places[name]
            self._places[name] = (path, 8 + len(text) + begin, dtype, shape)

    def write(self, name: str, x: np.ndarray, first_row: int = 0) -> None:
        """Writes rows of a tensor, from `first_row` on."""
        path, begin, dtype, shape = self._places[name]
        if x.dtype != dtype or x.shape[1:] != shape[1:] or first_row + len(x) > shape[0]:
            raise ValueError(f"{name} is {shape} in {dtype}, which {x.shape} in {x.dtype} is not.")
        with path.open("r+b") as file:
            file.seek(begin + first_row * math.prod(shape[1:]) * dtype.itemsize)
            np.ascontiguousarray(x).view(np.uint8).tofile(file)
        self._missing[name] -= x.nbytes

    def close(self) -> None:
        """Checks that all has been written.

        Raises:
          ValueError: names what is missing.
        """
        if missing := [name for name, size in self._missing.items() if size]:
            raise ValueError(f"{len(missing)} tensors were not written, {missing[0]} among them.")
