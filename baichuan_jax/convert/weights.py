"""The weights of a checkpoint, written and read piece by piece.

Orbax saves a tree of whole arrays. Here it saves the first piece of each, as arrays of
their own; then TensorStore, in which Orbax keeps them, makes them as long as they are
going to be and writes the other pieces. The result is a checkpoint as any other.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp

from baichuan_jax.config import ModelConfig
from baichuan_jax.convert.layout import our_shapes
from baichuan_jax.training import manifest

_CHUNK_BYTES = 1 << 23  # what a reader has to decode at least


class Array(NamedTuple):
    """An array to be written, `rows` of the first axis at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightsWriter:
    """Writes a checkpoint that holds only weights. It counts as one after `close`.

    Args:
      path: the checkpoint's folder, not yet there; its name is the step.
      arrays: by name.
      meta: what JSON can hold; kept in the checkpoint.
    """

    def __init__(self, path: epath.Path, arrays: Mapping[str, Array], meta: dict):
        self._path = path
        first = {
            name: np.zeros((array.rows, *array.shape[1:]), array.dtype)
            for name, array in arrays.items()
        }
        context = ocp.Context()
        context.array_options.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
        with context:
            ocp.save_checkpointables(path, {"model": first}, custom_metadata=meta)
        self._arrays = {}
        self._missing = {}
        for name, (shape, _, rows) in arrays.items():
            self._arrays[name] = _open(path, name)
            if rows < shape[0]:
                resized = self._arrays[name].resize(exclusive_max=shape, expand_only=True)
                self._arrays[name] = resized.result()
            self._missing[name] = math.prod(shape)

    def write(self, name: str, start: int, x: np.ndarray) -> None:
        """Writes rows of an array, from `start` on; they are on the disk on return."""
        self._arrays[name][start : start + len(x)].write(x).result()
        self._missing[name] -= x.size

    def close(self) -> None:
        """Makes a checkpoint of what was written.

        Raises:
          ValueError: names an array that is not complete.
        """
        if missing := [name for name, size in self._missing.items() if size]:
            raise ValueError(f"{self._path}: {missing[0]} was not written to its end.")
        manifest.write(self._path, int(self._path.name), tokens=0)


class WeightsReader:
    """Reads the weights of a checkpoint by rows.

    Attributes:
      shapes, dtypes: of the arrays, by name.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        saved = ocp.metadata(path, "model").metadata
        self.shapes = {name: tuple(leaf.shape) for name, leaf in saved.items()}
        self.dtypes = {name: np.dtype(leaf.dtype) for name, leaf in saved.items()}
        self._open: tuple[str, ts.TensorStore] | None = None

    def check(self, model: ModelConfig) -> None:
        """Refuses other arrays than those of a full checkpoint of the architecture.

        Raises:
          ValueError: names the array and its shape.
        """
        expected = our_shapes(model)
        if any(name.endswith(".scales") for name in self.shapes):
            raise ValueError(
                f"{self._path} is quantised: give the full-precision run that it was made from."
            )
        for name in sorted(expected.keys() | self.shapes.keys()):
            there, should = self.shapes.get(name), expected.get(name)
            if there != should:
                raise ValueError(
                    f"{self._path}: {name} has shape {there}; by the run's config.json it should"
                    f" have {should}. Only full checkpoints of the architecture can be read here."
                )

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`. Read one array to its end, then the next.

        Training stores whole arrays, or a device's part of them, as one chunk. Such a chunk
        is decoded once and kept until another array is asked for.
        """
        if self._open is None or self._open[0] != name:
            self._open = None  # frees its chunks before others come
            array = _open(self._path, name)
            if array.chunk_layout.read_chunk.shape[0] > stop - start:
                size = math.prod(self.shapes[name]) * self.dtypes[name].itemsize
                array = _open(self._path, name, cache_bytes=2 * size)
            self._open = name, array
        return self._open[1][start:stop].read().result()


def _open(path: epath.Path, name: str, cache_bytes: int = 0) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{path / 'model'}/"},
            "path": f"{name}/",
        },
        "store_data_equal_to_fill_value": True,  # Orbax takes a missing chunk for damage
    }
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    return ts.open(spec, open=True, context=context).result()
