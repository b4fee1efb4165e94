"""The little of Markdown that the report needs."""

import re
from collections.abc import Iterable, Sequence

Lines = list[str]


def heading(title: str, level: int = 2) -> Lines:
    return ["", f"{'#' * level} {_escaped(title)}", ""]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Lines:
    """A table whose columns are numbers, at the right, but for the first `left` ones."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return [f"| {' | '.join(map(_escaped, row))} |" for row in (header, rule, *rows)]


def code(text: str, size: int) -> str:
    """The first `size` characters of a text as code, in one line; none of them means anything."""
    start = "".join(c if c.isprintable() else " " for c in text[: 8 * size])
    line = " ".join(start.split())
    if len(line) > size or len(text) > 8 * size:
        line = f"{line[:size]}…"
    longest = max(map(len, re.findall("`+", line)), default=0)
    edge = " " if not line or "`" in (line[0], line[-1]) else ""
    fence = "`" * (longest + 1)
    return f"{fence}{edge}{line}{edge}{fence}"


def _escaped(cell: str) -> str:
    return cell.replace("\n", " ").replace("|", "\\|")
