"""Text that every machine already has, for a first run without any download.

Real text: prose from the docstrings and README files, and source text, of the installed
Python and of the packages that this project needs. The choice depends on their versions
alone: not on where they are installed, on other packages, or on the file system's order.

Made text: the conversations of dialogue.py.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Iterator

from etils import epath

from baichuan_jax.data.dialogue import dialogue
from baichuan_jax.data.document import Document

DEFAULT_BYTES = 5_000_000
MAX_CHARACTERS = 16_000  # of one document; a longer one is cut at a line's end
MIN_CHARACTERS = 200  # of one piece of real text
PACKAGES = (
    *("absl-py", "etils", "flax", "grain", "jax", "ml_collections", "numpy", "optax"),
    *("orbax-checkpoint", "tensorflow-datasets"),
)
# Other packages; tests and tables, much text that says little.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "testing", "lib2to3", "encodings"}


def corpus(max_bytes: int = DEFAULT_BYTES, seed: int = 0) -> Iterator[Document]:
    """About `max_bytes` bytes of UTF-8: half prose, a fifth source text, the rest dialogue.

    The sources are named 'docs' (language 'en'), 'python' ('code') and 'dialogue' ('zh' and
    'en'). The same installation gives the same documents in the same order. A Python without
    readable sources gives less real text, never an error.
    """
    parts = [(_prose(), 0.5), (_code(), 0.2), (dialogue(None, seed), 0.3)]
    for part, share in parts:
        size = 0
        for document in part:
            size += len(document.text.encode())
            if size > share * max_bytes:
                break
            yield document


def stamp() -> list[str]:
    """What the real text depends on: the versions of Python and of the packages."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    return [f"python {platform.python_version()}", *versions]


def _python_files() -> list[tuple[str, epath.Path]]:
    """Every source file by its path inside its package, in an order fixed by hashing that path.

    Taking files in this order until there is enough is a fair sample of all the packages.
    """
    found = {}
    stdlib = epath.Path(sysconfig.get_path("stdlib"))
    for folder, folders, names in stdlib.walk():
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in names:
            found[f"{folder.relative_to(stdlib)}/{name}"] = folder / name
    for package in PACKAGES:
        for file in _package_files(package):
            if not LEFT_OUT.intersection(file.parts):
                found[str(file)] = epath.Path(file.locate())
    sources = {
        name: path
        for name, path in found.items()
        if name.endswith(".py") and not name.endswith("_test.py")
    }
    return sorted(sources.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _package_files(package: str) -> list[importlib.metadata.PackagePath]:
    try:
        return importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _read(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):  # a few old files are Latin-1
        return ""


def _cut(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        text = text[: text.rfind("\n", 0, MAX_CHARACTERS) + 1] or text[:MAX_CHARACTERS]
    return text.strip("\n")


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character in " ,.'" for character in text)
    return len(text) >= MIN_CHARACTERS and letters > 0.8 * len(text)


def _once(texts: Iterator[str]) -> Iterator[str]:
    seen = set()
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def _prose() -> Iterator[Document]:
    def texts():
        for package in PACKAGES:
            if _package_files(package):
                yield importlib.metadata.metadata(package).get_payload() or ""
        for _, path in _python_files():
            try:
                with warnings.catch_warnings(action="ignore"):  # about others' escape sequences
                    tree = ast.parse(_read(path))
            except SyntaxError:  # templates that only look like Python
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield inspect.cleandoc(node.value)

    for text in _once(_cut(text) for text in texts() if _is_prose(text)):
        yield Document(text, "docs", "en")


def _code() -> Iterator[Document]:
    texts = (_cut(_read(path)) for _, path in _python_files())
    for text in _once(text for text in texts if len(text) >= MIN_CHARACTERS):
        yield Document(text, "python", "code")
