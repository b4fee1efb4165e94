"""Released checkpoints into our parameters: onto a mesh, or from disk to disk.

A release is a folder as Hugging Face has it: config.json, and safetensors or
`pytorch_model-*.bin` files. Weights are taken as they lie there, in their dtype, so that an
export gives the same bits back. What is in memory besides the result is a piece of a
tensor (disk to disk) or one stacked tensor (onto a mesh) at a time.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath

from baichuan_jax.config import ModelConfig, to_json
from baichuan_jax.convert import layout as layouts
from baichuan_jax.convert.folder import (
    check_weights,
    layout_of,
    new_folder,
    open_weights,
    read_json,
)
from baichuan_jax.convert.release import Release, read_config
from baichuan_jax.convert.stored import StoredTensor, float_dtype
from baichuan_jax.convert.weights import Array, WeightsWriter
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel import zero
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training.checkpoint import by_name
from baichuan_jax.training.metrics import Progress

# Tables are padded to a multiple of a power of two up to this; a tokenizer that lacks more
# tokens than that belongs to another model.
_MAX_PADDING = 256

# (name, first row, past the last row) -> those rows of our parameter; of a stack, layers.
ReadRows = Callable[[str, int, int], np.ndarray]


def import_checkpoint(
    source,
    target,
    *,
    position: str = "",
    version: int = 0,
    step: int = 0,
    dtype: str = "",
    say: Callable[[str], None] = print,
) -> Release:
    """Makes a run's folder of a released checkpoint, without ever holding the model.

    The folder gets config.json, checkpoints/<step>, and tokenizer.model and
    generation_config.json as far as the release has them. It appears when it is complete.

    Args:
      source: the release's folder.
      target: the run's folder, on a local disk; not there yet, or empty.
      position, version: see `release.read_config`.
      step: the checkpoint's number.
      dtype: of the weights; '' leaves them as they are.
      say: is told what was decided and what was left out.

    Raises:
      ValueError: bad input; names file and tensor or field.
      OSError: a file is missing or cannot be read, or the target cannot be written.
    """
    if step < 0:
        raise ValueError(f"--step={step} must not be negative.")
    release = read_config(source, position=position, version=version)
    model = release.config.model
    for line in [str(release), *_tokenizer_notes(release.directory, model)]:
        say(line)
    generation = release.directory / "generation_config.json"
    if generation.exists():
        read_json(generation)
    arrays = _arrays(release.tensors, release.layout, model, dtype)
    needed = sum(array.nbytes for array in arrays.values())
    with new_folder(target, needed) as folder:
        path = epath.Path(folder) / "checkpoints" / f"{step:08d}"
        path.parent.mkdir()
        meta = {"release": release.directory.resolve().name, "reasons": list(release.reasons)}
        writer = WeightsWriter(path, arrays, meta)
        pieces = _pieces(_reader(release.tensors, release.layout, model, arrays), arrays)
        with Progress("convert", needed, unit="B") as progress:
            for done, name, start, piece in pieces:
                writer.write(name, start, piece)
                progress.update(done, tensor=name)
            writer.close()
        (folder / "config.json").write_text(to_json(release.config))
        for file in (release.directory / "tokenizer.model", generation):
            if file.exists():
                shutil.copyfile(file, folder / file.name)
    return release


def read_model(
    source, model: ModelConfig, mesh: jax.sharding.Mesh, dtype: np.dtype | None = None
) -> Transformer:
    """The weights of a release on a mesh; each device gets what it stores (`zero.shardings`).

    Args:
      source: the release's folder, or what `read_config` made of it, which saves a little time.
      model: as `read_config` gives it.
      dtype: of the weights; None leaves them as they are.

    Raises:
      ValueError: bad input; names file and tensor or field.
      OSError: a file is missing or cannot be read.
    """
    if isinstance(source, Release):
        tensors, layout = source.tensors, source.layout
    else:
        directory = Path(source).expanduser()
        tensors = open_weights(directory)
        layout = layout_of(tensors, directory)
        check_weights(tensors, model, layout, directory)
    abstract = layouts.abstract_model(model)
    shardings = by_name(zero.shardings(abstract, mesh))
    arrays = _arrays(tensors, layout, model, "" if dtype is None else np.dtype(dtype))
    loaded = {}
    pieces = _pieces(_reader(tensors, layout, model, arrays), arrays)
    with Progress("load", sum(array.nbytes for array in arrays.values()), unit="B") as progress:
        for name, group in itertools.groupby(pieces, key=lambda piece: piece[1]):
            staged = _Staged(arrays[name], shardings[name])
            for done, _, start, piece in group:
                staged.add(start, piece)
                progress.update(done, tensor=name)
            loaded[name] = staged.to_devices()
    leaves = [loaded[name] for name in by_name(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def release_rows(release: Release, dtype: str = "") -> ReadRows:
    """Reads our parameters from a release by rows, checked as an import checks them.

    Args:
      dtype: of the rows; '' leaves them as they are in the files.

    Raises:
      ValueError: the tensors of a parameter have several dtypes, and none was asked for. What
        is returned raises it and OSError as `layout.read_piece` does.
    """
    model = release.config.model
    arrays = _arrays(release.tensors, release.layout, model, dtype)
    return _reader(release.tensors, release.layout, model, arrays)


def check_tokenizer(tokenizer: Tokenizer, model: ModelConfig, directory: Path) -> str:
    """Whether a release's tokenizer belongs to its embedding.

    Args:
      tokenizer: of the release.
      model: of the release; its `vocab_size` is that of the embedding.
      directory: of the release, for the error.

    Returns:
      What is to be said about it, or ''.

    Raises:
      ValueError: it has more tokens than the embedding has rows, or far fewer.
    """
    size, rows = tokenizer.vocab_size, model.vocab_size
    if not 0 <= rows - size < _MAX_PADDING:
        raise ValueError(
            f"{Path(directory) / 'tokenizer.model'} has {size:,} tokens, but {layouts.EMBEDDING} of"
            f" {directory} has {rows:,} rows: they belong to different models."
        )
    if size == rows:
        return ""
    return (
        f"The tokenizer has {size:,} tokens: the last {rows - size} rows of the embedding are"
        " taken for padding."
    )


class _Staged:
    """The parts of one stacked tensor that this process's devices store, on the host."""

    def __init__(self, array: Array, sharding: jax.sharding.NamedSharding):
        self._shape, self._sharding = array.shape, sharding
        self._parts: dict[tuple, np.ndarray] = {}  # replicas share theirs
        for index in sharding.addressable_devices_indices_map(array.shape).values():
            ranges = self._ranges(index)
            shape = [stop - start for start, stop in ranges]
            self._parts[ranges] = np.empty(shape, array.dtype)

    def _ranges(self, index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        indices = [part.indices(size) for part, size in zip(index, self._shape, strict=True)]
        return tuple((start, stop) for start, stop, _ in indices)

    def add(self, start: int, piece: np.ndarray) -> None:
        """Copies rows of the tensor, from `start` on, to where they belong."""
        for ((first, last), *rest), part in self._parts.items():
            low, high = max(first, start), min(last, start + len(piece))
            if low < high:
                index = (slice(low - start, high - start), *(slice(*ends) for ends in rest))
                part[low - first : high - first] = piece[index]

    def to_devices(self) -> jax.Array:
        indices = self._sharding.addressable_devices_indices_map(self._shape)
        shards = [
            jax.device_put(self._parts[self._ranges(index)], device)
            for device, index in indices.items()
        ]
        jax.block_until_ready(shards)  # the parts are freed before the next tensor's come
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


def _arrays(
    tensors: Mapping[str, StoredTensor], layout: str, model: ModelConfig, dtype
) -> dict[str, Array]:
    """What our parameters will be: shape, dtype and the rows of a piece."""
    arrays = {}
    for name, shape in layouts.our_shapes(model).items():
        layers = layouts.their_names(name, model, layout)
        sources = [tensors[part] for parts in layers for part in parts]
        target = float_dtype(dtype or sources[0].dtype, name)
        for source in sources if not dtype else []:
            if source.dtype != target:
                raise ValueError(
                    f"{source} has dtype {source.dtype}, but {sources[0].name} {target}, and they"
                    f" become one tensor, {name}. Give --dtype=float32 or --dtype=bfloat16 to"
                    " experiments.convert_checkpoint."
                )
        arrays[name] = Array(shape, target, layouts.piece_rows(shape, target.itemsize))
    return arrays


def _reader(
    tensors: Mapping[str, StoredTensor],
    layout: str,
    model: ModelConfig,
    arrays: Mapping[str, Array],
) -> ReadRows:
    def read(name: str, start: int, stop: int) -> np.ndarray:
        shape, dtype, _ = arrays[name]
        part = (min(stop, shape[0]) - start, *shape[1:])
        return layouts.read_piece(name, start, part, tensors, model, layout, dtype)

    return read


def _pieces(
    read: ReadRows, arrays: Mapping[str, Array]
) -> Iterator[tuple[int, str, int, np.ndarray]]:
    """All weights in pieces: bytes so far, our name, first row, rows."""
    done = 0
    for name, (shape, _, rows) in arrays.items():
        for start in range(0, shape[0], rows):
            piece = read(name, start, start + rows)
            done += piece.nbytes
            yield done, name, start, piece


def _tokenizer_notes(directory: Path, model: ModelConfig) -> list[str]:
    """What is to be said about the tokenizer.

    Raises:
      ValueError: it does not belong to the embedding.
    """
    path, notes = directory / "tokenizer.model", []
    if path.exists():
        if note := check_tokenizer(Tokenizer(path), model, directory):
            notes.append(note)
    else:
        notes.append(f"There is no {path}: the run has no tokenizer, only weights.")
    added = directory / "added_tokens.json"
    if added.exists():
        for token, number in read_json(added).items():
            out = isinstance(number, int) and number >= model.vocab_size
            why = (
                f"the embedding ends at {model.vocab_size - 1:,}"
                if out
                else "tokenizer.model rules"
            )
            notes.append(f"{added.name}: {token} = {number} is ignored; {why}.")
    return notes
