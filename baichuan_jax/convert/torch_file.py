"""Reads `pytorch_model-*.bin` without PyTorch, and without running what is in it.

A file of `torch.save` is a zip archive: a pickle that describes the tensors, and one
uncompressed member for each storage. Unpickling calls whatever the pickle names. Here it
may name a dozen things, each of which becomes an inert stand-in; anything else is refused
by its name. The numbers are then read from the file where they lie.
"""

import collections
import functools
import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import ml_dtypes
import numpy as np

from baichuan_jax.convert.stored import StoredTensor, extent

# What storages hold. Those without a dtype are known, so that they are refused by name.
_STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "UntypedStorage": np.dtype(np.uint8),
}
# Values beside the tensors of quantised checkpoints, which are refused by name later on.
_DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int32", "int64")

_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f920")  # begins files of PyTorch before 1.6
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_MAX_PICKLE = 64 << 20  # bytes; that of the 13B has 60 kB
_BLOCK = 1 << 20

# Stand-ins are tuples: a pickle can set no attribute of them, and call none.


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that `torch.save` wrote from a state dict.

    Raises:
      ValueError: the file is damaged, of another format, or its pickle names what a state dict
        does not need; names the file.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
            raise ValueError(
                f"{path} is in the format of PyTorch before 1.6, which is one pickle. Load and"
                " save it again with a newer PyTorch, or fetch the safetensors files."
            )
    try:
        with zipfile.ZipFile(path) as archive:
            members = {str(PurePosixPath(info.filename)): info for info in archive.infolist()}
            root = next((name[:-9] for name in members if name.endswith("/data.pkl")), None)
            if root is None:
                raise ValueError(
                    f"{path} is a zip archive, but not one of torch.save (no data.pkl)."
                )
            info = members[f"{root}/data.pkl"]
            if info.file_size > _MAX_PICKLE:
                raise ValueError(
                    f"{path}: its data.pkl has {info.file_size:,} bytes, more than the"
                    " description of any model needs."
                )
            data = archive.read(info)
            if order := members.get(f"{root}/byteorder"):
                order = archive.read(order).decode("ascii", "replace")
                if order != "little":
                    raise ValueError(f"{path}: its byte order is {order!r}; it should be 'little'.")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not a whole file of torch.save ({error}): its download was cut short, or"
            " it is damaged."
        ) from error
    prefix = f"{root}/data/"
    storages = {
        name.removeprefix(prefix): info for name, info in members.items() if name.startswith(prefix)
    }
    content = _Unpickler(path, data).content()
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it should be a state dict.")
    refuse_quantised(content, path)
    return {name: _stored(path, name, value, storages) for name, value in content.items()}


def refuse_quantised(names, path: Path) -> None:
    """Refuses the official 4-bit checkpoints, which only one version of one library reads."""
    for name in names:
        if isinstance(name, str) and name.endswith("quant_state"):
            raise ValueError(
                f"{path}: {name} belongs to a quantised (4-bit) checkpoint. Convert the full one,"
                " such as Baichuan2-13B-Chat, and quantise that."
            )


class _Unpickler(pickle.Unpickler):
    """Knows the few names of a state dict. See the module's docstring."""

    def __init__(self, path: Path, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path = path
        self._refused = ""

    def content(self):
        try:
            return self.load()
        except Exception as error:  # a damaged pickle raises anything
            problem = self._refused or f"its pickle is damaged ({type(error).__name__}: {error})"
            raise ValueError(f"{self._path}: {problem}.") from error

    def find_class(self, module: str, name: str):
        where = (module, name)
        if where == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if where == ("torch._utils", "_rebuild_tensor_v2"):
            # Made anew, so that nothing a pickle does to it lasts.
            return lambda storage, offset, shape, strides, *_: _Tensor(
                storage, offset, tuple(shape), tuple(strides)
            )
        if where == ("torch", "Size"):
            return lambda sizes: tuple(sizes)
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return name
        if module == "torch" and name in _DTYPES:
            return name
        self._refused = (
            f"its pickle asks for {module}.{name}, which a state dict does not need. Nothing of it"
            " was run; do not load this file with other programs either"
        )
        raise pickle.UnpicklingError(self._refused)

    def persistent_load(self, pid) -> _Storage:
        kind, storage, key, _, size = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        return _Storage(_STORAGES[storage], str(key), int(size))


def _stored(path: Path, name, value, storages: dict[str, zipfile.ZipInfo]) -> StoredTensor:
    """The tensor as it lies in the file, with nothing of the pickle taken on trust."""
    where = f"{path}: {name}"
    if not isinstance(name, str) or not isinstance(value, _Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}; it should be a tensor.")
    storage, offset, shape, strides = value
    numbers = [offset, *shape, *strides]
    if not (
        isinstance(storage, _Storage)
        and len(shape) == len(strides)
        and all(type(number) is int and number >= 0 for number in numbers)
    ):
        raise ValueError(f"{where}: its description is damaged.")
    info = storages.get(storage.key)
    if info is None:
        raise ValueError(f"{where}: its storage data/{storage.key} is missing from the file.")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{where}: its storage is compressed, as torch.save never writes it.")
    end = (offset + extent(shape, strides)) * storage.dtype.itemsize
    if end > info.file_size:
        raise ValueError(
            f"{where} needs {end:,} bytes of its storage data/{storage.key}, which has"
            f" {info.file_size:,}."
        )
    begin = _begin(path, info) + offset * storage.dtype.itemsize
    verify = _verifier(path, name, info)
    return StoredTensor(name, path, storage.dtype, shape, begin, strides, verify)


def _begin(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the member's bytes begin."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) == _LOCAL_HEADER.size:
            signature, name, extra = _LOCAL_HEADER.unpack(header)
            if signature == b"PK\3\4":
                return info.header_offset + _LOCAL_HEADER.size + name + extra
    raise ValueError(f"{path}: the member {info.filename} has no header: the file is damaged.")


def _verifier(path: Path, name: str, info: zipfile.ZipInfo):
    """Compares the storage with its checksum, once, when its first rows are asked for."""

    @functools.cache
    def verify() -> None:
        checksum, left = 0, info.file_size
        with path.open("rb") as file:
            file.seek(_begin(path, info))
            while left and (block := file.read(min(left, _BLOCK))):
                checksum = zlib.crc32(block, checksum)
                left -= len(block)
        if left or checksum != info.CRC:
            raise ValueError(f"{path}: {name} is damaged: its checksum (CRC-32) differs.")

    return verify
