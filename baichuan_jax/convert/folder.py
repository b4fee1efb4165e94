"""The files of a released checkpoint: which there are, and whether they are whole."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from baichuan_jax.config import ModelConfig
from baichuan_jax.convert.layout import INV_FREQ, their_shapes
from baichuan_jax.convert.safetensors_file import open_safetensors
from baichuan_jax.convert.stored import FLOATS, StoredTensor
from baichuan_jax.convert.torch_file import open_torch_file, refuse_quantised

# In the order in which they are looked for: safetensors cannot run anything.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
      ValueError: the file is something else; names it.
      OSError: it cannot be read.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}; it should be a JSON object.")
    return fields


def check_target(target, needed: int) -> Path:
    """What `new_folder` would refuse, told before long work. Makes the folders above `target`.

    Args:
      target: on a local disk; not there yet, or empty.
      needed: about how many bytes will be written.

    Returns:
      The absolute path.

    Raises:
      ValueError: `target` is in an object store.
      FileExistsError: it is there already.
      OSError: it cannot be written, or the disk has too little room.
    """
    if "://" in str(target):
        raise ValueError(f"{target}: should be on a local disk; copy it from there.")
    target = Path(target).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already, and it is not overwritten.")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(f"{target} needs about {needed:,} bytes, and the disk has {free:,} free.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target.parent} cannot be written to, and {target} is to be made.")
    return target


@contextlib.contextmanager
def new_folder(target, needed: int) -> Iterator[Path]:
    """A folder to fill that takes the place of `target` at the end: all of it or nothing.

    Args, raises: as `check_target`.
    """
    target = check_target(target, needed)
    folder = target.with_name(f"{target.name}.partial-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def open_weights(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder, from safetensors if it has them, else from `.bin` files.

    Only descriptions are read.

    Raises:
      ValueError: a file is damaged, or the index names what is not there; names file and tensor.
      FileNotFoundError: no weights, or a shard is missing.
      OSError: a file cannot be read.
    """
    for index, whole in zip(_INDEXES, _WHOLE, strict=True):
        if (directory / index).exists():
            return _open_shards(directory, directory / index)
        if (directory / whole).exists():
            return _open_file(directory / whole)
    stray = sorted(p.name for p in directory.glob("*") if p.suffix in (".safetensors", ".bin"))
    held = f"it holds {', '.join(stray[:4])} without an index" if stray else "it holds none"
    raise FileNotFoundError(
        f"{directory}: should have weights as {', '.join((*_INDEXES, *_WHOLE))}; {held}."
    )


def _open_file(path: Path) -> dict[str, StoredTensor]:
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch_file(path)


def _open_shards(directory: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: it should say which file has each tensor.")
    refuse_quantised(weight_map, index)
    files = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: {name} is said to be in {shard!r}, which is no file name.")
        files.setdefault(shard, []).append(name)
    for shard, names in files.items():
        if not (directory / shard).exists():
            raise FileNotFoundError(
                f"{directory / shard} is missing: {index.name} says that it holds {names[0]} and"
                f" {len(names) - 1} more tensors. Fetch it again."
            )
    tensors = {}
    for shard, names in files.items():
        there = _open_file(directory / shard)
        for name in names:
            if name not in there:
                raise ValueError(
                    f"{directory / shard} does not hold {name}, although {index.name} says so."
                )
        for name, tensor in there.items():
            if weight_map.get(name, shard) != shard:
                raise ValueError(
                    f"{tensor} is there, too, although {index.name} says that"
                    f" {weight_map[name]} holds it."
                )
            tensors[name] = tensor
    return tensors


def layout_of(tensors: dict[str, StoredTensor], directory: Path) -> str:
    """'baichuan' or 'llama', by the names of the attention's matrices.

    Raises:
      ValueError: the names are of another architecture.
    """
    found = {
        layout
        for layout, part in [("baichuan", "self_attn.W_pack."), ("llama", "self_attn.q_proj.")]
        if any(part in name for name in tensors)
    }
    if len(found) == 1:
        return found.pop()
    some = ", ".join(sorted(tensors)[:3])
    raise ValueError(
        f"{directory}: each layer should have either self_attn.W_pack (Baichuan) or"
        f" self_attn.q_proj (Llama), and it has {'both' if found else 'neither'}: another"
        f" architecture? It holds {some}, ..."
    )


def check_weights(
    tensors: dict[str, StoredTensor], model: ModelConfig, layout: str, directory: Path
) -> None:
    """Refuses tensors that are missing, too many, of other shapes, or no floating-point numbers.

    Raises:
      ValueError: names the tensor and the file.
    """
    expected = their_shapes(model, layout)
    for name, tensor in tensors.items():
        if name.endswith(INV_FREQ):
            continue
        if name not in expected:
            hint = "The architecture has no biases. " if name.endswith(".bias") else ""
            raise ValueError(
                f"{tensor} does not belong to this architecture with {model.num_layers} layers."
                f" {hint}Is it another model, or an adapter?"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{tensor} has dtype {tensor.dtype}; weights should be bfloat16, float16 or"
                " float32. Quantised checkpoints are not read: convert the full one."
            )
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{tensor} has shape {list(tensor.shape)}; by config.json it should have"
                f" {list(expected[name])}."
            )
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(
            f"{directory}: {missing[0]} is in none of the files, and neither are"
            f" {len(missing) - 1} more tensors that config.json asks for."
        )
