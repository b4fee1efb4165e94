"""The speed of the data system, as text bytes per second of one core.

Measured is the process's CPU time, so that other programs on the machine hardly change it; the
sides run in turn, and the least time of all rounds counts.
"""

import functools
import importlib.util
import itertools
import re
import time
import zlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from baichuan_jax.data import sources
from baichuan_jax.data.prepare import minhash

_TOKEN = re.compile(r"[\u3005\u3007\u3400-\u9fff]|[^\W\u3005\u3007\u3400-\u9fff]+")


def signatures(text: str, megabytes: float = 8, rounds: int = 3) -> list[dict[str, Any]]:
    """From text to band keys, beside datasketch from text to its minima (extra `oracle`).

    datasketch gets the same 5-token shingles, cut in Python, and the same number of minima. It
    is timed as it comes, which is with SHA-1, and with a hash of less work, CRC-32.

    Args:
      text: sources of documents (sources.py), each with its language.
      megabytes: of UTF-8 of each language to measure, from the start.
      rounds: of all sides in turn.

    Returns:
      For each language with any text: `language`, `documents`, `megabytes`; in MB/s `ours`,
      and where datasketch is installed `datasketch` and `datasketch_crc32`; `ratio` and
      `ratio_crc32` say how many times faster ours is.

    Raises:
      ValueError: the sources hold no text, or cannot be read.
    """
    rows = []
    for language, texts in _by_language(text, megabytes * 1e6).items():
        array, size = pa.array(texts), sum(len(text.encode()) for text in texts) / 1e6
        sides: dict[str, Callable[[], Any]] = {"ours": functools.partial(minhash.sketch, array)}
        if importlib.util.find_spec("datasketch"):
            sides["datasketch"] = functools.partial(_datasketch, texts)
            sides["datasketch_crc32"] = functools.partial(_datasketch, texts, hashfunc=zlib.crc32)
        best = dict.fromkeys(sides, float("inf"))
        for _, side in itertools.product(range(rounds), sides):
            started = time.process_time()
            sides[side]()
            best[side] = min(best[side], time.process_time() - started)
        rates = {side: size / seconds for side, seconds in best.items()}
        row = {"language": language, "documents": len(texts), "megabytes": size, **rates}
        if "datasketch" in row:
            row["ratio"] = row["ours"] / row["datasketch"]
            row["ratio_crc32"] = row["ours"] / row["datasketch_crc32"]
        rows.append(row)
    return rows


def _by_language(text: str, limit: float) -> dict[str, list[str]]:
    """The first texts of each language, about `limit` bytes of each."""
    found: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for document in sources.documents(text):
        size = sizes.get(document.language, 0)
        if size < limit:
            found.setdefault(document.language, []).append(document.text)
            sizes[document.language] = size + len(document.text.encode())
    return found


def _datasketch(texts: list[str], **settings) -> list:
    import datasketch

    empty = datasketch.MinHash(minhash.PERMUTATIONS, **settings)
    sketches = []
    for text in texts:
        tokens = _TOKEN.findall(text.lower())
        count = max(1, len(tokens) - minhash.SHINGLE + 1) if tokens else 0
        shingles = [
            " ".join(tokens[start : start + minhash.SHINGLE]).encode() for start in range(count)
        ]
        sketches.append(empty.copy())
        sketches[-1].update_batch(shingles)
    return sketches
