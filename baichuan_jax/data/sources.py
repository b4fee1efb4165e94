"""Documents from files, TFDS datasets and the embedded corpus (§2.1).

A source is a string: `PATH`, `NAME=PATH`, or several of them separated by commas
(so a path cannot hold a comma). PATH is one of

  a file, a glob or a folder (searched recursively), local (`~` is home) or `gs://`:
    .jsonl .jsonl.gz .jsonl.zst  one JSON object a line
    .parquet                     one row a document
    .txt .md .rst .tex .html     one file a document, and so are the source files in
    .py .c .cc .cpp .h .java .js .ts .go .rs .sh
  tfds:DATASET[:SPLIT]  a prepared TFDS dataset (split 'train' unless told), read without TensorFlow
  embedded:[BYTES]      text that every machine has (see embedded.py), about BYTES of it

Without a NAME the file or folder gives it. Documents come in a fixed order: the
sources as they are listed, the files of each by their path.

Nothing is skipped in silence: what cannot be read is a `ValueError` that names the
file and its row, counted from 1. Who wants to go on after a bad row reads origin by
origin (readers.py). Files in a folder with other endings are no text by this list;
their number is logged.
"""

import collections
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator

from absl import logging
from etils import epath

from baichuan_jax.data import embedded, readers
from baichuan_jax.data.document import Document
from baichuan_jax.data.readers import EMBEDDED, ENDINGS, NAME, TFDS, Options, Origin


def split(sources: str | Iterable[str]) -> list[str]:
    """The single sources in a list of strings, each of which may hold several."""
    strings = [sources] if isinstance(sources, str) else sources
    return [part.strip() for string in strings for part in string.split(",") if part.strip()]


def documents(
    sources: str | Iterable[str],
    *,
    text_field: str = "text",
    language_field: str = "lang",
    tfds_data_dir: str = "",
) -> Iterator[Document]:
    """Reads the sources one document at a time, in constant memory.

    Args:
      sources: See the top of this file.
      text_field: The field or column that holds the text.
      language_field: The one that holds the language; a row may do without it.
      tfds_data_dir: Where the TFDS datasets are; empty means TFDS's own default.

    Raises:
      ValueError: names the source, the file and the row at fault.
    """
    options = Options(text_field, language_field, tfds_data_dir)
    for source in split(sources):
        empty = True
        for origin in origins(source):
            for _, document in readers.read(origin, options):
                empty = False
                yield document
        if empty:
            raise ValueError(f"{source}: holds no document at all.")


def origins(sources: str | Iterable[str]) -> list[Origin]:
    """What the sources consist of, in the order in which `documents` reads it.

    Raises:
      ValueError: a source is malformed, or has no file.
    """
    found = []
    for source in split(sources):
        if EMBEDDED.fullmatch(source):
            found.append(Origin("", source))
            continue
        name, path = _name_and_path(source)
        if path.startswith("embedded:"):
            raise ValueError(
                f"{source}: should be 'embedded:' or 'embedded:BYTES', without a name."
            )
        if path.startswith("tfds:") and not TFDS.fullmatch(path):
            raise ValueError(f"{path}: should be tfds:DATASET[:SPLIT].")
        if path.startswith("tfds:"):
            found.append(Origin(name, path))
        else:
            found += [Origin(name, os.fspath(file)) for file in _files(path)]
    return found


def check(
    sources: str | Iterable[str],
    *,
    text_field: str = "text",
    language_field: str = "lang",
    tfds_data_dir: str = "",
) -> None:
    """Fails at once where `documents` would fail late.

    Every path must exist, and the first row (or the first 1 MiB of a text) of every
    file must parse.

    Raises:
      ValueError: as `documents`; or there is no source.
    """
    sources = split(sources)
    if not sources:
        raise ValueError("No source of text is given: set config.data.sources.")
    options = Options(text_field, language_field, tfds_data_dir, head=True)
    for origin in origins(sources):
        if not EMBEDDED.fullmatch(origin.path):
            for _ in itertools.islice(readers.read(origin, options), 1):
                pass


def stamp(sources: str | Iterable[str], tfds_data_dir: str = "") -> str:
    """A hash that changes when the files behind the sources do: their paths, sizes and times.

    It is cheap and never opens a file. The embedded corpus changes with the versions of
    what is installed.
    """
    seen = []
    for source in split(sources):
        if EMBEDDED.fullmatch(source):
            seen.append((source, embedded.stamp()))
            continue
        _, path = _name_and_path(source)
        if match := TFDS.fullmatch(path):
            files = sorted(readers.tfds_builder(match["name"], tfds_data_dir).data_path.iterdir())
        else:
            files = _files(path)
        stats = [(file, file.stat()) for file in files]
        seen.append((source, [(str(file), stat.length, stat.mtime) for file, stat in stats]))
    return hashlib.blake2b(json.dumps(seen).encode(), digest_size=16).hexdigest()


def expected_bytes(sources: str | Iterable[str]) -> int | None:
    """About how much UTF-8 text the sources hold, to show how far a pass over them is.

    None where that cannot be told without reading: compressed files, Parquet, TFDS.
    """
    total = 0
    for source in split(sources):
        if match := EMBEDDED.fullmatch(source):
            total += int(match["bytes"] or embedded.DEFAULT_BYTES)
            continue
        _, path = _name_and_path(source)
        if TFDS.fullmatch(path):
            return None
        files = _files(path)
        if any(file.name.endswith((".gz", ".zst", ".parquet")) for file in files):
            return None
        total += sum(file.stat().length for file in files)
    return total


def _name_and_path(source: str) -> tuple[str, str]:
    """`NAME=PATH` or `PATH`; a '/' before the '=' belongs to a path."""
    name, equals, path = source.partition("=")
    if equals and not re.search(r"[/:.]", name):
        if not NAME.fullmatch(name) or not path:
            raise ValueError(
                f"{source}: NAME=PATH needs a name of letters, digits, '_' or '-', and a path."
            )
        return name, path
    if match := TFDS.fullmatch(source):
        stem = match["name"].partition(":")[0]
    else:
        parts = epath.Path(source).expanduser().parts
        parts = itertools.takewhile(lambda part: not _is_glob(part), parts)
        stem = epath.Path(*parts).name.partition(".")[0]
    return re.sub(r"[^\w-]", "_", stem) or "text", source


def _is_glob(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def _files(path: str) -> list[epath.Path]:
    root = epath.Path(path).expanduser()
    if root.is_dir():
        found = [folder / name for folder, _, names in root.walk() for name in names]
        files = sorted(file for file in found if file.name.endswith(ENDINGS))
        if other := [file.suffix or "none" for file in found if not file.name.endswith(ENDINGS)]:
            kinds = ", ".join(
                f"{n} {kind}" for kind, n in collections.Counter(other).most_common(5)
            )
            logging.warning("%s: left out %d files by their endings (%s).", path, len(other), kinds)
        if not files:
            raise ValueError(f"{path}: no file in this folder ends in {' '.join(ENDINGS)}.")
        return files
    if root.exists():
        files = [root]
    elif _is_glob(path):
        if "**" in path:
            raise ValueError(f"{path}: name the folder; it is searched recursively, without '**'.")
        literal = list(itertools.takewhile(lambda part: not _is_glob(part), root.parts))
        pattern = "/".join(root.parts[len(literal) :])
        files = sorted(file for file in epath.Path(*literal).glob(pattern) if file.is_file())
        if not files:
            raise ValueError(f"{path}: no file matches this pattern.")
    else:
        raise ValueError(f"{path}: no such file or folder.")
    for file in files:
        if not file.name.endswith(ENDINGS):
            raise ValueError(f"{file}: its ending is none of {' '.join(ENDINGS)}.")
    return files
