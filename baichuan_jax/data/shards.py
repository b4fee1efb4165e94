"""A folder of shards: packed rows of tokens in ArrayRecord files, for TFDS and Grain both.

A set is one source in one language, `docs.en`, or `docs` where the language is unknown.
Its folder is a TFDS dataset with the splits 'train' and 'eval':

    DIRECTORY/manifest.json                            written last, when all else is complete
    DIRECTORY/docs.en/rows-train.array_record-00000    features: tokens and lengths, int32
    DIRECTORY/docs.en/{dataset_info,features}.json     what tfds.builder_from_directory reads

A row is pieces of documents after each other, at most T+1 tokens for a sequence length T;
packing.py makes them.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core import dataset_info, example_serializer, file_adapters, naming, splits

SPLITS = ("train", "eval")
FEATURES = tfds.features.FeaturesDict(
    {
        "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "lengths": tfds.features.Tensor(shape=(None,), dtype=np.int32),  # of the row's pieces
    }
)
_SERIALIZER = example_serializer.ExampleSerializer(FEATURES.get_serialized_info())
MANIFEST, PARTIAL = "manifest.json", "manifest.partial.json"  # complete; still in the making


class Tokenizer(Protocol):
    """The part of `baichuan_jax.tokenizer.Tokenizer` that packing needs."""

    eos_id: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclasses.dataclass
class File:
    """An ArrayRecord file: its name, its rows, its bytes and a hash of the rows."""

    name: str
    rows: int
    size: int
    content: str


@dataclasses.dataclass
class Part:
    """One split of a set. `padding` is the share of the rows' places that stay empty."""

    documents: int = 0
    utf8_bytes: int = 0
    tokens: int = 0  # of the documents, an EOS for each included
    pieces: int = 0
    rows: int = 0
    padding: float = 0.0
    files: list[File] = dataclasses.field(default_factory=list)

    def empty_share(self, capacity: int) -> float:
        """What `padding` is for rows of so many places."""
        # Each cut of a document stores the token on both of its sides.
        filled = self.tokens + self.pieces - self.documents
        return 1 - filled / (self.rows * capacity) if self.rows else 0.0


@dataclasses.dataclass
class Manifest:
    """What a folder of shards holds and what it was made from."""

    directory: epath.Path
    inputs: dict[str, Any]  # whatever changes the rows; see packing.py
    sets: dict[str, dict[str, Part]] = dataclasses.field(default_factory=dict)
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)  # documents, by reason
    finished: list[str] = dataclasses.field(default_factory=list)  # sources, as they are packed
    # Of the sets, in tokens, for `Stream`; a set that is not here weighs what it has.
    weights: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def sequence_length(self) -> int:
        return self.inputs["sequence_length"]

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the rows: their content, the tokenizer, their length."""
        content = {
            name: {split: [file.content for file in part.files] for split, part in parts.items()}
            for name, parts in self.sets.items()
        }
        decides = [self.inputs["tokenizer"], self.sequence_length, content]
        return hashlib.blake2b(
            json.dumps(decides, sort_keys=True).encode(), digest_size=16
        ).hexdigest()

    def paths(self, name: str, split: str) -> list[epath.Path]:
        """The files of a set's split, in order."""
        return [self.directory / name / file.name for file in self.sets[name][split].files]

    def total(self, split: str, field: str) -> int:
        """The sum of a `Part`'s field over all sets."""
        return sum(getattr(parts[split], field) for parts in self.sets.values())


def encode_row(pieces: Sequence[np.ndarray]) -> bytes:
    """Pieces of documents, int32, -> a record of a file; the same bytes every time."""
    lengths = np.array([len(piece) for piece in pieces], np.int32)
    example = {"tokens": np.concatenate(pieces), "lengths": lengths}
    # Not FEATURES.serialize_example: the order of its fields changes from run to run.
    return _SERIALIZER.get_tf_example(example).SerializeToString(deterministic=True)


def decode_row(record: bytes) -> dict[str, np.ndarray]:
    """A record of a file -> `tokens` [<= T+1] and `lengths` [pieces], int32."""
    return FEATURES.deserialize_example_np(record)


def load(
    directory: epath.PathLike, *, tokenizer: Tokenizer | None, sequence_length: int
) -> Manifest:
    """Opens a folder of shards and compares the sizes of its files with the manifest.

    Args:
      tokenizer: the one that the rows must have been made with; None does not ask.

    Raises:
      ValueError: names what is missing, damaged, or was made with other settings.
    """
    manifest = read(epath.Path(directory), MANIFEST)
    if manifest.sequence_length != sequence_length:
        raise ValueError(
            f"{directory} has rows for config.data.sequence_length={manifest.sequence_length},"
            f" not {sequence_length}: change it, or pack into another folder."
        )
    if tokenizer and manifest.inputs["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(
            f"{directory} was packed with tokenizer {manifest.inputs['tokenizer'][:12]}, not"
            f" {tokenizer.fingerprint[:12]}: give that one, or pack into another folder."
        )
    return manifest


class FileWriter:
    """An ArrayRecord file in the making; for object storage it grows on the local disk."""

    def __init__(self, path: epath.Path):
        self._path, self._rows, self._bytes = path, 0, 0
        self._remote = "://" in str(path)
        self._local = os.fspath(path)
        if self._remote:
            self._local = tempfile.NamedTemporaryFile(delete=False).name  # noqa: SIM115
        # A group of one row is what makes random access cheap.
        self._writer = array_record_module.ArrayRecordWriter(self._local, "group_size:1")
        self._hash = hashlib.blake2b(digest_size=16)

    def write(self, record: bytes) -> int:
        """Appends a row; returns the bytes so far, before compression."""
        self._writer.write(record)
        self._hash.update(record)
        self._rows += 1
        self._bytes += len(record)
        return self._bytes

    def close(self) -> File:
        self._writer.close()
        if self._remote:
            epath.Path(self._local).copy(self._path, overwrite=True)
            os.unlink(self._local)
        size = self._path.stat().length
        return File(self._path.name, self._rows, size, self._hash.hexdigest())


def write_tfds_metadata(folder: epath.Path, parts: dict[str, Part]) -> None:
    """Makes a set's folder a TFDS dataset."""
    identity = dataset_info.DatasetIdentity(
        name="rows", version="1.0.0", data_dir=os.fspath(folder), module_name=""
    )
    info = dataset_info.DatasetInfo(builder=identity, features=FEATURES)
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    names = naming.ShardedFileTemplate(
        data_dir=folder,
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        dataset_name="rows",
        filetype_suffix="array_record",
    )
    infos = [
        splits.SplitInfo(
            name=split,
            shard_lengths=[file.rows for file in part.files],
            num_bytes=sum(file.size for file in part.files),
            filename_template=names,
        )
        for split, part in parts.items()
        if part.rows
    ]
    info.set_splits(splits.SplitDict(infos))
    info.write_to_directory(folder)


def write(manifest: Manifest, name: str) -> None:
    """Writes a manifest whole or not at all."""
    values = dataclasses.asdict(manifest)
    del values["directory"]
    values["fingerprint"] = manifest.fingerprint  # for the reader's eyes
    manifest.directory.mkdir(parents=True, exist_ok=True)
    temporary = manifest.directory / f"{name}.tmp"
    temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False))
    temporary.replace(manifest.directory / name)


def read(directory: epath.Path, name: str) -> Manifest:
    """Reads a manifest and compares the sizes of the files with it; raises as `load`."""
    path = directory / name
    if not path.exists():
        raise ValueError(f"{directory}: no {name}, so this is no complete folder of shards.")
    try:
        values = json.loads(path.read_text())
        del values["fingerprint"]
        for parts in values["sets"].values():
            for split, part in parts.items():
                files = [File(**file) for file in part.pop("files")]
                parts[split] = Part(**part, files=files)
        manifest = Manifest(directory, **values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it to pack anew.") from None
    for set_name, parts in manifest.sets.items():
        for part in parts.values():
            for file in part.files:
                data = directory / set_name / file.name
                if not data.exists():
                    raise ValueError(f"{data} is missing; delete {path} to pack anew.")
                if data.stat().length != file.size:
                    raise ValueError(
                        f"{data} is damaged: {data.stat().length} bytes instead of {file.size};"
                        f" delete {path} to pack anew."
                    )
    return manifest
