"""The items of evaluation sets, whatever form the files have.

An item is an element of a JSON file's list, a line of a JSONL file or a row of a CSV file. An
object that holds such lists, or objects by name, has the items of all of them.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging
from etils import epath

ENDINGS = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
_NAME = re.compile(r"[\w-]+")

Files = list[tuple[str, epath.Path]]  # a set's name, and one of its files


def files(against: str) -> Files:
    """The files of evaluation sets.

    Args:
      against: sets separated by commas, each `NAME=PATH` or `PATH`: a file, a glob or a folder.
        Without a NAME a set is called by its file or folder, and the folders in a folder are
        sets of their own.

    Raises:
      ValueError: there is no set, or no file of one; or a file has another ending.
    """
    named = []
    parts = [part.strip() for part in against.split(",") if part.strip()]
    if not parts:
        raise ValueError("No evaluation set is named: set config.decontaminate.against.")
    for part in parts:
        name, equals, path = part.partition("=")
        if not equals or not _NAME.fullmatch(name):
            name, path = "", part
        root = epath.Path(path).expanduser()
        literal = list(itertools.takewhile(lambda p: not any(s in p for s in "*?["), root.parts))
        if root.is_dir():
            every = sorted(folder / file for folder, _, inside in root.walk() for file in inside)
            found = [file for file in every if file.name.endswith(ENDINGS)]
            if len(found) < len(every):
                more = len(every) - len(found)
                logging.warning("%s: left out %d files by their endings.", path, more)
        elif len(literal) < len(root.parts):
            pattern, root = "/".join(root.parts[len(literal) :]), epath.Path(*literal)
            found = sorted(root.glob(pattern))
        elif root.exists():
            found = [root]
        else:
            raise ValueError(f"{path}: no such file or folder.")
        if not found:
            raise ValueError(f"{path}: no file here ends in {' '.join(ENDINGS)}.")
        for file in found:
            if not file.name.endswith(ENDINGS):
                raise ValueError(f"{file}: its ending is none of {' '.join(ENDINGS)}.")
            inner = () if file == root else file.relative_to(root).parts[:-1]
            named.append((name or "/".join([root.name.partition(".")[0], *inner[:1]]), file))
    return named


def fields(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
    """The items of a file, counted from 1, and all strings in each, however deep.

    Raises:
      ValueError: the file cannot be read, or is not what its ending says; names it.
    """
    for place, item in _items(path):
        found = list(_strings(item))
        try:
            "".join(found).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{path}, item {place}: holds a lone surrogate, which no UTF-8 text can hold."
            ) from None
        yield place, found


def _items(path: epath.Path) -> Iterator[tuple[int, Any]]:
    """What a file has, counted from 1: items as JSON has them, or lists of strings."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.name.endswith(".gz") else content
        string = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} of it is not UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not readable: {error}.") from None
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending == "csv":
        csv.field_size_limit(max(csv.field_size_limit(), len(string)))
        try:
            yield from enumerate(csv.reader(io.StringIO(string, newline="")), start=1)
        except csv.Error as error:
            raise ValueError(f"{path}: not valid CSV: {error}.") from None
        return
    if ending == "json":
        try:
            yield from enumerate(_objects(json.loads(string)), start=1)
            return
        except (ValueError, RecursionError) as error:
            first, _, more = string.strip().partition("\n")
            if not more or not _is_json(first):  # it is no JSONL under another name either
                raise ValueError(f"{path}: not valid JSON: {error}.") from None
    for number, line in enumerate(string.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, row {number}: not valid JSON: {error}.") from None


def _is_json(string: str) -> bool:
    try:
        json.loads(string)
    except (ValueError, RecursionError):
        return False
    return True


def _objects(value: Any) -> Iterable[Any]:
    """The items of a JSON file: elements of a list, also of lists and tables in an object."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    if value and all(isinstance(inner, dict) for inner in value.values()):
        return value.values()
    tables = {name: inner for name, inner in value.items() if _holds_objects(inner)}
    rest = {name: inner for name, inner in value.items() if name not in tables}
    inner = itertools.chain.from_iterable(map(_objects, tables.values()))
    return itertools.chain(inner, [rest] if rest else [])


def _holds_objects(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and any(isinstance(v, dict) for v in inner)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
