"""The manifest of a checkpoint: the hashes by which damage is found out.

Each process hashes its share of the folder's files into a part of its own; the manifest is
complete when all parts are there.
"""

import hashlib
import json

import jax
from etils import epath

_PART = "manifest-{:05d}-of-{:05d}.json"  # number of the process and of all processes


def write(path: epath.Path, step: int, tokens: int) -> None:
    """Hashes this process's share of the files in `path` and writes its part, in one move."""
    index, count = jax.process_index(), jax.process_count()
    files = {}
    for name in _files(path)[index::count]:
        files[name] = {"bytes": (path / name).stat().length, "sha256": hash_file(path / name)}
    part = path / _PART.format(index, count)
    partial = path / f"{part.name}.partial"
    partial.write_text(json.dumps({"step": step, "tokens": tokens, "files": files}, indent=1))
    partial.replace(part)


def hash_file(path: epath.Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_complete(path: epath.Path) -> bool:
    """Whether the manifest has all its parts."""
    first = next(path.glob("manifest-00000-of-*.json"), None)
    if first is None:
        return False
    count = int(first.name.removesuffix(".json").rsplit("-", 1)[1])
    return all((path / _PART.format(i, count)).exists() for i in range(count))


def read(path: epath.Path, without: tuple[str, ...] = ()) -> tuple[int, dict]:
    """Tokens seen at the checkpoint, and {file: {'bytes', 'sha256'}}."""
    parts = [json.loads(part.read_text()) for part in path.glob("manifest-*.json")]
    files = {name: entry for part in parts for name, entry in part["files"].items()}
    wanted = {name: files[name] for name in sorted(files) if not name.startswith(without)}
    return parts[0]["tokens"], wanted


def problems(path: epath.Path, without: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with the manifest or with the files' names and sizes."""
    if not path.exists():
        return ["there is no such folder"]
    if not is_complete(path):
        return ["its manifest is missing or incomplete: the save was interrupted"]
    try:
        _, expected = read(path, without)
    except Exception as error:
        return [f"its manifest cannot be read ({describe(error)})"]
    present = set(_files(path, without))
    found = [f"{name} was added" for name in sorted(present - expected.keys())]
    found += [f"{name} is missing" for name in sorted(expected.keys() - present)]
    for name in sorted(present & expected.keys()):
        if (size := (path / name).stat().length) != expected[name]["bytes"]:
            found.append(f"{name} has {size:,} bytes instead of {expected[name]['bytes']:,}")
    return found


def changes(path: epath.Path, without: tuple[str, ...]) -> list[str]:
    """What is wrong with the contents of this process's share of the files."""
    found = []
    _, expected = read(path, without)
    for name in list(expected)[jax.process_index() :: jax.process_count()]:
        try:
            if hash_file(path / name) != expected[name]["sha256"]:
                found.append(f"{name} was changed (its hash differs)")
        except Exception as error:
            found.append(f"{name} cannot be read ({describe(error)})")
    return found


def describe(error: BaseException) -> str:
    """An error in one line, as reports of damage and of failed saves show it."""
    return f"{type(error).__name__}: {error}"


def _files(path: epath.Path, without: tuple[str, ...] = ()) -> list[str]:
    """The files of a checkpoint, relative to it, in order; no manifest, nothing `without`."""
    files = [folder / name for folder, _, names in path.walk() for name in names]
    names = [file.relative_to(path).as_posix() for file in files]
    return sorted(name for name in names if not name.startswith(("manifest-", *without)))
