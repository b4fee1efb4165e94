"""The speed of the data system, as text bytes per second of one core.

Measured is CPU time, so that other programs on the machine hardly change it; the least time of
all rounds counts. What is wanted of one core:

    signatures   from text to band keys: 50 MB/s of English, 40 of Chinese, and ten times what
                 datasketch does
    stages       (costs.py) exact, spans and documents together: 15 MB/s, with 1 GB of memory
    pairs        10 M keys grouped, 3 M pairs joined in a second; a small corpus has too few
    loader       200,000 tokens a second, and less than a second to go on late
"""

import dataclasses
import functools
import importlib.util
import itertools
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from baichuan_jax import interleave
from baichuan_jax.config import DataConfig
from baichuan_jax.data import shards, sources
from baichuan_jax.data.prepare import costs, documents, minhash, semantic
from baichuan_jax.data.stream import Stream

DEDUPLICATION = ("exact", "spans", "documents")
_TOKEN = re.compile(r"[\u3005\u3007\u3400-\u9fff]|[^\W\u3005\u3007\u3400-\u9fff]+")


def lines(text: str) -> Iterator[str]:
    """Measures all, as tables.

    Args:
      text: sources of documents (sources.py).

    Raises:
      ValueError: the sources hold no text, or cannot be read.
    """
    names = f"{'datasketch':>12}{'ratio':>7}{'CRC-32':>8}{'ratio':>7}"
    yield f"{'signatures':12}{'MB':>7}{'MB/s':>8}{names}"
    for row in signatures(text):
        line = f"{row['language']:12}{row['megabytes']:7.1f}{row['ours']:8.1f}"
        if "ratio" in row:
            line += f"{row['datasketch']:12.2f}{row['ratio']:7.1f}"
            line += f"{row['datasketch_crc32']:8.2f}{row['ratio_crc32']:7.1f}"
        yield line
    if not importlib.util.find_spec("datasketch"):
        yield "For the comparison: pip install -e '.[oracle]' (datasketch)."
    yield ""
    with tempfile.TemporaryDirectory() as folder:
        yield f"{'stage':15}{'MB':>7}{'CPU s':>8}{'MB/s':>8}{'GB':>7}"
        found = {}
        for cost in costs.stages(text, folder):
            found[cost.stage] = cost
            yield (
                f"{cost.stage:15}{cost.megabytes:7.1f}{cost.seconds:8.2f}{cost.rate:8.1f}"
                f"{cost.gigabytes:7.2f}"
            )
        parts = [found[stage] for stage in DEDUPLICATION]
        rate, most = costs.whole(parts), max(part.gigabytes for part in parts)
        yield f"{'deduplication':30}{rate:8.1f}{most:7.2f}  ({', '.join(DEDUPLICATION)})"
        yield ""
        yield "Millions in a CPU second: " + ", ".join(
            f"{name} {rate / 1e6:,.2f}" for name, rate in pairs().items()
        )
        yield ""
        reads = {"rows": (_read, {"directory": f"{folder}/shards"})}
        rows = interleave.run(reads, [], ["tokens_per_second", "resume_seconds"], rounds=0)["rows"]
        yield (
            f"loader: {rows['tokens_per_second']:,.0f} tokens in a CPU second;"
            f" {rows['resume_seconds']:.3f} s until a run that goes on has its rows"
        )


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
    for language_name, texts in _by_language(text, megabytes * 1e6).items():
        array, size = pa.array(texts), sum(len(text.encode()) for text in texts) / 1e6
        sides: dict[str, Callable[[], Any]] = {"ours": functools.partial(minhash.sketch, array)}
        if importlib.util.find_spec("datasketch"):
            sides["datasketch"] = functools.partial(_datasketch, texts)
            sides["datasketch_crc32"] = functools.partial(_datasketch, texts, hashfunc=zlib.crc32)
        best = dict.fromkeys(sides, float("inf"))
        for _, side in itertools.product(range(rounds), sides):
            best[side] = min(best[side], _seconds(sides[side]))
        rates = {side: size / seconds for side, seconds in best.items()}
        row = {"language": language_name, "documents": len(texts), "megabytes": size, **rates}
        if "datasketch" in row:
            row["ratio"] = row["ours"] / row["datasketch"]
            row["ratio_crc32"] = row["ours"] / row["datasketch_crc32"]
        rows.append(row)
    return rows


def pairs(size: int = 1 << 20, rounds: int = 3) -> dict[str, float]:
    """What is done in a CPU second with the keys and pairs of `size` made-up documents.

    Returns:
      'group': keys of a band; 'verify': pairs, by their signatures; 'components': pairs;
      'compare': FLOP of the cosines inside clusters, of each pair one.
    """
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 8 * size, size).astype(np.uint64)  # so one document of eight meets one
    ids = np.arange(size, dtype=np.uint64)
    signatures = rng.integers(0, 256, (size // 8, minhash.PERMUTATIONS), np.uint8)
    some, others = rng.integers(0, size // 8, (2, size // 8))
    edges = np.sort(rng.integers(0, size, size))[:, None] + rng.integers(0, 4, (size, 2))
    vectors = rng.standard_normal((size // 128, 256), np.float32)
    calls = {
        "group": (size, lambda: documents.candidate_pairs(keys, ids)),
        "verify": (size // 8, lambda: minhash.similarity(signatures, some, signatures, others)),
        "components": (size, lambda: documents.components(edges.astype(np.uint64))),
        "compare": (len(vectors) * vectors.size, lambda: semantic.redundancy(vectors)),
    }
    return {
        name: count / min(_seconds(call) for _ in range(rounds))
        for name, (count, call) in calls.items()
    }


@dataclasses.dataclass
class Loader:
    """What was measured.

    Attributes:
      tokens_per_second: of process CPU time, rows of T tokens.
      resume_seconds: from nothing to the first batch of a run that goes on, wall time.
      rows: read for the first figure.
    """

    tokens_per_second: float
    resume_seconds: float
    rows: int


def loader(
    manifest: shards.Manifest,
    *,
    batch_size: int = 8,
    rows: int = 1_024,
    late: int = 10**7,
    rounds: int = 3,
) -> Loader:
    """Reads shuffled and mixed rows as training does.

    Args:
      late: the first row of the run that goes on.
    """
    config = DataConfig(sequence_length=manifest.sequence_length)
    resumed, seconds = [], []
    starts = range(0, rows, batch_size)
    for _ in range(rounds):
        began = time.perf_counter()
        again = shards.load(
            manifest.directory, tokenizer=None, sequence_length=manifest.sequence_length
        )
        stream = Stream(again, "train", config)
        stream.rows(range(late, late + batch_size))
        resumed.append(time.perf_counter() - began)
        began = time.process_time()
        for start in starts:
            stream.rows(range(start, start + batch_size))
        seconds.append(time.process_time() - began)
    read = len(starts) * batch_size
    return Loader(read * manifest.sequence_length / min(seconds), min(resumed), read)


def _read(directory: str) -> Loader:
    return loader(shards.read(epath.Path(directory), shards.MANIFEST))


def _seconds(call: Callable[[], Any]) -> float:
    """CPU time of this process."""
    began = time.process_time()
    call()
    return time.process_time() - began


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
