"""Documents from files, TFDS datasets and the embedded corpus (§2.1).

A source is a string: `PATH`, `NAME=PATH`, or several of them separated by commas
(so a path cannot hold a comma). PATH is one of

  a file, a glob or a folder (searched recursively), local or `gs://`:
    .jsonl .jsonl.gz .jsonl.zst  one JSON object a line
    .parquet                     one row a document
    .txt .md .rst .tex .html     one file a document, and so are the source files in
    .py .c .cc .cpp .h .java .js .ts .go .rs .sh
  tfds:DATASET[:SPLIT]  a prepared TFDS dataset (split 'train' unless told), read without TensorFlow
  embedded:[BYTES]      text that every machine has (see embedded.py), about BYTES of it

Without a NAME the file or folder gives it. Documents come in a fixed order: the
sources as they are listed, the files of each by their path.

Nothing is skipped in silence: what cannot be read is a `ValueError` that names the
file and its row, counted from 1. Files in a folder with other endings are no text by
this list; their number is logged.
"""

import codecs
import collections
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds
import zstandard
from absl import logging
from etils import epath

UNKNOWN_LANGUAGE = "und"  # ISO 639's "undetermined"
ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PROSE_ENDINGS = (".txt", ".md", ".rst", ".tex", ".html")
CODE_ENDINGS = (".py", ".c", ".cc", ".cpp", ".h", ".java", ".js", ".ts", ".go", ".rs", ".sh")
ENDINGS = ROW_ENDINGS + PROSE_ENDINGS + CODE_ENDINGS
_BLOCK = 1 << 20  # bytes read at a time
_NAME = re.compile(r"[\w-]+")
_EMBEDDED = re.compile(r"embedded:(?P<bytes>[1-9]\d*)?")
_TFDS = re.compile(r"tfds:(?P<name>[\w/.-]+(:\d+\.\d+\.\d+)?)(:(?P<split>.+))?")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, where it is from, and its language (`und` when nobody says)."""

    text: str
    source: str
    language: str


Row = tuple[str, Any]  # where it stands, for messages; what was found there
Reader = Callable[[], Iterator[Row]]


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
    for source in split(sources):
        if match := _EMBEDDED.fullmatch(source):
            from baichuan_jax.data import embedded  # it imports this file, for Document

            yield from embedded.corpus(int(match["bytes"] or embedded.DEFAULT_BYTES))
            continue
        name, readers = _open(source, text_field, language_field, tfds_data_dir)
        empty = True
        for row in itertools.chain.from_iterable(reader() for reader in readers):
            empty = False
            yield _document(name, *row, text_field, language_field)
        if empty:
            raise ValueError(f"{source}: holds no document at all.")


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
    for source in sources:
        if _EMBEDDED.fullmatch(source):
            continue
        name, readers = _open(source, text_field, language_field, tfds_data_dir, head=True)
        for reader in readers:
            for row in itertools.islice(reader(), 1):
                _document(name, *row, text_field, language_field)


def stamp(sources: str | Iterable[str], tfds_data_dir: str = "") -> str:
    """A hash that changes when the files behind the sources do: their paths, sizes and times.

    It is cheap and never opens a file. The embedded corpus changes with the versions of
    what is installed.
    """
    seen = []
    for source in split(sources):
        if _EMBEDDED.fullmatch(source):
            from baichuan_jax.data import embedded

            seen.append((source, embedded.stamp()))
            continue
        _, path = _name_and_path(source)
        if match := _TFDS.fullmatch(path):
            files = sorted(_tfds_builder(match["name"], tfds_data_dir).data_path.iterdir())
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
        if match := _EMBEDDED.fullmatch(source):
            from baichuan_jax.data import embedded

            total += int(match["bytes"] or embedded.DEFAULT_BYTES)
            continue
        _, path = _name_and_path(source)
        if _TFDS.fullmatch(path):
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
        if not _NAME.fullmatch(name) or not path:
            raise ValueError(
                f"{source}: NAME=PATH needs a name of letters, digits, '_' or '-', and a path."
            )
        return name, path
    if match := _TFDS.fullmatch(source):
        stem = match["name"].partition(":")[0]
    else:
        parts = itertools.takewhile(lambda part: not _is_glob(part), epath.Path(source).parts)
        stem = epath.Path(*parts).name.partition(".")[0]
    return re.sub(r"[^\w-]", "_", stem) or "text", source


def _open(
    source: str, text_field: str, language_field: str, tfds_data_dir: str, head: bool = False
) -> tuple[str, Iterator[Reader]]:
    """The source's name and one reader for each of its files."""
    name, path = _name_and_path(source)
    if path.startswith("embedded:"):
        raise ValueError(f"{source}: should be 'embedded:' or 'embedded:BYTES', without a name.")
    if path.startswith("tfds:"):
        return name, iter([functools.partial(_tfds_rows, path, tfds_data_dir)])
    columns = (text_field, language_field)
    return name, (functools.partial(_file_rows, file, columns, head) for file in _files(path))


def _is_glob(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def _files(path: str) -> list[epath.Path]:
    root = epath.Path(path)
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


def _file_rows(file: epath.Path, columns: tuple[str, str], head: bool) -> Iterator[Row]:
    if file.name.endswith(".parquet"):
        yield from _parquet_rows(file, columns)
    elif file.name.endswith(ROW_ENDINGS):
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():  # a blank line is no row
                where = f"{file}, row {number}"
                try:
                    yield where, json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise ValueError(_bad_utf8(where, error)) from None
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not valid JSON: {error}.") from None
    else:
        with file.open("rb") as stream:
            content = stream.read(_BLOCK if head else -1)
        try:
            # The end of a head may cut a character: an incremental decoder waits for the rest.
            text = codecs.getincrementaldecoder("utf-8")().decode(content, final=not head)
        except UnicodeDecodeError as error:
            raise ValueError(_bad_utf8(str(file), error)) from None
        yield str(file), {columns[0]: text}


def _bad_utf8(where: str, error: UnicodeDecodeError) -> str:
    return f"{where}: byte {error.start + 1} of it is not UTF-8 ({error.reason})."


def _lines(file: epath.Path) -> Iterator[bytes]:
    rest = b""
    try:
        for block in _blocks(file):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        raise ValueError(f"{file}: damaged or cut off ({error}).") from None
    yield rest


def _blocks(file: epath.Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        if file.name.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=stream)
        if not file.name.endswith(".zst"):
            yield from iter(functools.partial(stream.read, _BLOCK), b"")
            return
        # By hand: zstandard's own stream reader takes a frame that is cut off for a whole one.
        frame = None
        while block := stream.read(_BLOCK):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data
                if frame.eof:
                    frame = None
        if frame:
            raise EOFError("the last frame does not end")


def _parquet_rows(file: epath.Path, columns: tuple[str, str]) -> Iterator[Row]:
    number = 0
    try:
        with file.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
            names = table.schema_arrow.names
            if columns[0] not in names:
                raise ValueError(f"{file}: no column {columns[0]!r}; it has {', '.join(names)}.")
            wanted = [name for name in columns if name in names]
            for batch in table.iter_batches(batch_size=1024, columns=wanted):
                for values in zip(*(batch.column(name) for name in wanted), strict=True):
                    number += 1
                    row = [value.as_py() for value in values]
                    yield f"{file}, row {number}", dict(zip(wanted, row, strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(_bad_utf8(f"{file}, row {number}", error)) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}, after row {number}: not readable as Parquet: {error}") from None


def _tfds_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    try:
        # Not tfds.builder, which prefers a dataset's source code, and that may want TensorFlow.
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        where = data_dir or "TFDS's default folder"
        raise ValueError(f"tfds:{name}: no such prepared dataset in {where}: {error}") from None


def _tfds_rows(path: str, data_dir: str) -> Iterator[Row]:
    match = _TFDS.fullmatch(path)
    if not match:
        raise ValueError(f"{path}: should be tfds:DATASET[:SPLIT].")
    builder, chosen = _tfds_builder(match["name"], data_dir), match["split"] or "train"
    try:
        source = builder.as_data_source(split=chosen)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: {error}") from None
    for number in range(len(source)):
        where = f"{path}, row {number + 1}"
        try:
            row = source[number]
            yield (
                where,
                {k: v.decode("utf-8") if isinstance(v, bytes) else v for k, v in row.items()},
            )
        except UnicodeDecodeError as error:
            raise ValueError(_bad_utf8(where, error)) from None


def _document(name: str, where: str, row: Any, text_field: str, language_field: str) -> Document:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object with a {text_field!r}, not {row!r:.80}")
    if text_field not in row:
        raise ValueError(f"{where}: no field {text_field!r}; it has {', '.join(map(str, row))}.")
    text, language = row[text_field], row.get(language_field) or UNKNOWN_LANGUAGE
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_field!r} must be a string, not {text!r:.80}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start + 1} of {text_field!r} is a lone surrogate, which"
            " no UTF-8 text can hold."
        ) from None
    if not isinstance(language, str) or not _NAME.fullmatch(language):
        raise ValueError(
            f"{where}: {language_field!r} must be a name of letters, digits, '_' or '-', such as"
            f" 'zh', not {language!r:.80}"
        )
    return Document(text, name, language)
