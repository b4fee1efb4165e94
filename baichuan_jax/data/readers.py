"""One file, or one TFDS split, as numbered rows and documents: the reading behind sources.py.

A reader gives what it finds row by row, and a `BadRow` in the place of what is no document.
Whether one of those ends the run or is written down and passed over is for the caller of
`read` to say; all else is the same for both.
"""

import codecs
import dataclasses
import functools
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds
import zstandard
from etils import epath

from baichuan_jax.data import embedded
from baichuan_jax.data.document import UNKNOWN_LANGUAGE, Document

ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PROSE_ENDINGS = (".txt", ".md", ".rst", ".tex", ".html")
CODE_ENDINGS = (".py", ".c", ".cc", ".cpp", ".h", ".java", ".js", ".ts", ".go", ".rs", ".sh")
ENDINGS = ROW_ENDINGS + PROSE_ENDINGS + CODE_ENDINGS
NAME = re.compile(r"[\w-]+")
EMBEDDED = re.compile(r"embedded:(?P<bytes>[1-9]\d*)?")
TFDS = re.compile(r"tfds:(?P<name>[\w/.-]+(:\d+\.\d+\.\d+)?)(:(?P<split>.+))?")
_BLOCK = 1 << 20  # bytes read at a time
_ZSTD_BLOCK = 1 << 11  # a frame may hold 32,768 times its size: 64 MiB from this many
_PREVIEW = 200  # bytes or characters of a bad row that are shown


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is read in one go: a file, a TFDS split, or the embedded corpus.

    Attributes:
      source: the name of its source; empty for the embedded corpus, which has several.
      path: of the file, `tfds:DATASET[:SPLIT]` or `embedded:[BYTES]`.
    """

    source: str
    path: str

    @property
    def is_file(self) -> bool:
        return not self.path.startswith(("tfds:", "embedded:"))


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that is no document, or a file that cannot be read to its end.

    Attributes:
      path: of the origin.
      row: counted from 1; 0 is the file as a whole.
      reason: in two or three words, the same for all of a kind.
      message: what is wrong, and what would be right.
      preview: the beginning of what was found.
    """

    path: str
    row: int
    reason: str
    message: str
    preview: str = ""

    def __str__(self) -> str:
        return f"{self.path}{f', row {self.row}' if self.row else ''}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Options:
    """How rows are read.

    Attributes:
      text_field: the field or column that holds the text.
      language_field: the one that holds the language; a row may do without it.
      tfds_data_dir: where the TFDS datasets are; empty means TFDS's own default.
      max_row_bytes: a longer line of a file, or text of a document, is a bad row. No more than
        this of a line is ever in memory.
      head: the first row is all that is wanted, and of a text file the first 1 MiB.
    """

    text_field: str = "text"
    language_field: str = "lang"
    tfds_data_dir: str = ""
    max_row_bytes: int = sys.maxsize
    head: bool = False


Row = tuple[int, Any]  # its number; what was found there, maybe a `BadRow`


def refuse(bad: BadRow) -> None:
    """What to do with a bad row unless the caller knows better."""
    raise ValueError(str(bad))


def read(
    origin: Origin,
    options: Options,
    bad: Callable[[BadRow], None] = refuse,
    name: Callable[[Any], str] | None = None,
) -> Iterator[tuple[int, Document]]:
    """Reads one origin, in constant memory: each document with its row, counted from 1.

    A file that is one document is row 0 of itself. Of a file that is damaged or cut off, the
    rows before the damage are read.

    Args:
      bad: is called with what is no document, and the next row is read if it returns.
      name: gives a name to what stands for a language and is none, such as 'C++'; without it,
        the row is a bad one.

    Raises:
      ValueError: from the default of `bad`: names the file and the row; there is no such TFDS
        dataset.
    """
    if match := EMBEDDED.fullmatch(origin.path):
        yield from enumerate(embedded.corpus(int(match["bytes"] or embedded.DEFAULT_BYTES)), 1)
        return
    for number, found in _rows(origin, options):
        if not isinstance(found, BadRow):
            found = _document(origin, number, found, options, name)
        if isinstance(found, BadRow):
            bad(found)
        else:
            yield number, found


def _rows(origin: Origin, options: Options) -> Iterator[Row]:
    if not origin.is_file:
        return _tfds_rows(origin.path, options)
    if origin.path.endswith(".parquet"):
        return _parquet_rows(epath.Path(origin.path), options)
    if origin.path.endswith(ROW_ENDINGS):
        return _json_rows(epath.Path(origin.path), options)
    return _text_rows(epath.Path(origin.path), options)


def _json_rows(file: epath.Path, options: Options) -> Iterator[Row]:
    number, path = 0, os.fspath(file)
    try:
        for size, line in _lines(file, options.max_row_bytes):
            number += 1
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if size > options.max_row_bytes:
                yield number, _too_long(path, number, size, options, line)
            elif line.strip():  # a blank line is no row
                try:
                    yield number, json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    yield number, _not_utf8(path, number, error, line)
                except (ValueError, RecursionError) as error:
                    message = f"not valid JSON: {error}."
                    yield number, BadRow(path, number, "not JSON", message, _preview(line))
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        message = f"damaged or cut off ({error})."
        yield 0, BadRow(path, 0, "damaged file", message, f"after row {number}")


def _text_rows(file: epath.Path, options: Options) -> Iterator[Row]:
    path, size = os.fspath(file), file.stat().length
    if size > options.max_row_bytes:
        yield 0, _too_long(path, 0, size, options)
        return
    with file.open("rb") as stream:
        content = stream.read(_BLOCK if options.head else -1).removeprefix(codecs.BOM_UTF8)
    try:
        # The end of a head may cut a character: an incremental decoder waits for the rest.
        decoder = codecs.getincrementaldecoder("utf-8")()
        yield 0, {options.text_field: decoder.decode(content, final=not options.head)}
    except UnicodeDecodeError as error:
        yield 0, _not_utf8(path, 0, error, content)


def _parquet_rows(file: epath.Path, options: Options) -> Iterator[Row]:
    number, path = 0, os.fspath(file)
    try:
        with file.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
            names = table.schema_arrow.names
            if options.text_field not in names:
                message = f"no column {options.text_field!r}; it has {', '.join(names)}."
                yield 0, BadRow(path, 0, "no text", message)
                return
            wanted = [n for n in (options.text_field, options.language_field) if n in names]
            for batch in table.iter_batches(batch_size=256, columns=wanted):
                for values in zip(*(batch.column(name) for name in wanted), strict=True):
                    number += 1
                    try:
                        row = [value.as_py() for value in values]
                        yield number, dict(zip(wanted, row, strict=True))
                    except UnicodeDecodeError as error:
                        yield number, _not_utf8(path, number, error, error.object)
    except (pyarrow.ArrowException, OSError) as error:
        message = f"not readable as Parquet after row {number}: {error}"
        yield 0, BadRow(path, 0, "damaged file", message, f"after row {number}")


def _tfds_rows(path: str, options: Options) -> Iterator[Row]:
    match = TFDS.fullmatch(path)
    builder = tfds_builder(match["name"], options.tfds_data_dir)
    try:
        source = builder.as_data_source(split=match["split"] or "train")
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: {error}") from None
    for number in range(1, len(source) + 1):
        row = source[number - 1]
        try:
            decoded = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
            yield number, decoded
        except UnicodeDecodeError as error:
            yield number, _not_utf8(path, number, error, error.object)


def tfds_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Opens a prepared dataset.

    Raises:
      ValueError: there is none of this name.
    """
    try:
        # Not tfds.builder, which prefers a dataset's source code, and that may want TensorFlow.
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        where = data_dir or "TFDS's default folder"
        raise ValueError(f"tfds:{name}: no such prepared dataset in {where}: {error}") from None


def _lines(file: epath.Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """The size of each line, and its bytes, of which no more than `limit` are kept."""
    parts: list[bytes] = []
    size = 0
    for block in _blocks(file):
        for number, part in enumerate(block.split(b"\n")):
            if number:
                yield size, b"".join(parts)
                parts, size = [], 0
            if size < limit:
                parts.append(part[: limit - size])
            size += len(part)
    yield size, b"".join(parts)


def _blocks(file: epath.Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        if not file.name.endswith(".zst"):
            # GzipFile.read would lose what it has already read where the file is cut off.
            gz = file.name.endswith(".gz")
            some = gzip.GzipFile(fileobj=stream).read1 if gz else stream.read
            yield from iter(functools.partial(some, _BLOCK), b"")
            return
        # By hand: zstandard's own stream reader takes a frame that is cut off for a whole one.
        frame = None
        while block := stream.read(_ZSTD_BLOCK):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                content = frame.decompress(block)
                for start in range(0, len(content), _BLOCK):
                    yield content[start : start + _BLOCK]
                block = frame.unused_data
                if frame.eof:
                    frame = None
        if frame:
            raise EOFError("the last frame does not end")


def _document(
    origin: Origin, number: int, row: Any, options: Options, name: Callable[[Any], str] | None
) -> Document | BadRow:
    def bad(reason: str, message: str) -> BadRow:
        return BadRow(origin.path, number, reason, message, f"{row!r:.{_PREVIEW}}")

    field = options.text_field
    if not isinstance(row, dict):
        message = f"a row must be an object with a {field!r}, not {row!r:.80}"
        return bad("not an object", message)
    if field not in row:
        return bad("no text", f"no field {field!r}; it has {', '.join(map(str, row))}.")
    text, language = row[field], row.get(options.language_field) or UNKNOWN_LANGUAGE
    if not isinstance(text, str):
        return bad("text is no string", f"{field!r} must be a string, not {text!r:.80}")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        message = (
            f"character {error.start + 1} of {field!r} is a lone surrogate, which no UTF-8 text"
            " can hold."
        )
        return bad("lone surrogate", message)
    if size > options.max_row_bytes:
        return _too_long(origin.path, number, size, options, text[:_PREVIEW].encode())
    if isinstance(language, str) and NAME.fullmatch(language):
        return Document(text, origin.source, language)
    if name is None:
        message = (
            f"{options.language_field!r} must be a name of letters, digits, '_' or '-', such as"
            f" 'zh', not {language!r:.80}"
        )
        return bad("language is no name", message)
    return Document(text, origin.source, name(language))


def _preview(content: bytes) -> str:
    return bytes(content[:_PREVIEW]).decode(errors="replace")


def _not_utf8(path: str, row: int, error: UnicodeDecodeError, content: bytes) -> BadRow:
    message = f"byte {error.start + 1} of it is not UTF-8 ({error.reason})."
    return BadRow(path, row, "not UTF-8", message, _preview(content))


def _too_long(path: str, row: int, size: int, options: Options, content: bytes = b"") -> BadRow:
    message = f"{size:,} bytes are more than max_row_bytes={options.max_row_bytes:,}."
    return BadRow(path, row, "too long", message, _preview(content))
