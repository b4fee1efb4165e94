"""How work is spread over workers, apart from what the work is.

A stage is a chain of functions with a shuffle between each two:

    first(item)                 -> (key, block), (key, block), ...
    then(key, [block, ...])     -> (key, block), (key, block), ...

A key is a tuple of integers, a block a NumPy array without objects. A function gets all blocks
of a key, in the order of the items and keys they come from, and so computes the same on every
engine and with any number of workers. What moves is whole blocks, packed by the functions:
thousands of times fewer elements than rows.

`Local` is processes of one machine; `beam.py` is Apache Beam and the clusters behind it.
"""

import concurrent.futures
import functools
import io
import json
import multiprocessing
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from baichuan_jax.data.prepare.corpus import whole

Key = tuple[int, ...]
Block = np.ndarray
First = Callable[[Any], Iterable[tuple[Key, Block]]]
Then = Callable[[Key, list[Block]], Iterable[tuple[Key, Block]]]
Results = list[tuple[Key, Block]]
BLOCK_BYTES = 1 << 23  # at most; some clusters refuse larger elements


class Engine(Protocol):
    """Runs chains of functions."""

    def run(self, name: str, items: Sequence[Any], first: First, *then: Then) -> Results:
        """Runs a chain on all items.

        Args:
          name: of the chain; it names its files, so it is to be unique in a stage. Where a chain
            of this name is complete, in the same folder, its results are read and nothing runs.
          items: what `first` gets, one at a time; anything that can be pickled.
          first, then: functions of modules, or `functools.partial` of such.

        Returns:
          What the last function gave, by key; the blocks of a key in the order of their origin.
        """
        ...


class Local:
    """Processes of this machine, with shuffles through files.

    A worker holds the item, or all blocks of the key, that its function is at, and what the
    function makes of them. Work that was done before an interruption, in the same folder, is not
    done again.

    Args:
      folder: for the files of the shuffles, of which the results stay when a chain is complete.
      workers: processes; 1 does everything in this one.
      progress: is called with the chain's name, and the parts done and to do.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        workers: int = 1,
        progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    ):
        self._folder, self._workers, self._progress = epath.Path(folder), workers, progress

    def run(self, name: str, items: Sequence[Any], first: First, *then: Then) -> Results:
        folder = self._folder / f"local-{name}"
        return kept(folder, functools.partial(self._run, folder, name, items, first, *then))

    def _run(
        self, folder: epath.Path, name: str, items: Sequence[Any], first: First, *then: Then
    ) -> Results:
        tasks = [(folder / "0" / str(n), _first, first, item) for n, item in enumerate(items)]
        files = self._step(f"{name} 0", tasks)
        for number, function in enumerate(then, start=1):
            tasks = [
                (folder / str(number) / "-".join(map(str, key)), _then, function, key, pieces)
                for key, pieces in _by_key(files)
            ]
            files = self._step(f"{name} {number}", tasks)
        return _read_results(files)

    def _step(self, name: str, tasks: list[tuple]) -> list[epath.Path]:
        """Runs the tasks that have not left their file yet; returns all files, in order."""
        waiting = [task for task in tasks if not task[0].exists()]
        self._progress(name, len(tasks) - len(waiting), len(tasks))
        left = len(waiting)
        for _ in self._finished(waiting):
            left -= 1
            self._progress(name, len(tasks) - left, len(tasks))
        return [task[0] for task in tasks]

    def _finished(self, tasks: list[tuple]) -> Iterator[None]:
        if min(self._workers, len(tasks)) <= 1:
            yield from (_write(*task) for task in tasks)
            return
        pool = _pool(self._workers)
        calls = [pool.submit(_write, *task) for task in tasks]
        try:
            yield from (call.result() for call in concurrent.futures.as_completed(calls))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            _pool.cache_clear()
            raise


def kept(folder: epath.Path, run: Callable[[], Results]) -> Results:
    """What `run` gives, once: the results stay in a file, and all else in the folder goes.

    So an interruption later in the stage does not run its chains again.
    """
    file = folder / "results"
    if not file.exists():
        results = run()
        _write(file, lambda: results)
    for path in folder.iterdir():
        if path.is_dir():
            path.rmtree()
    return _read_results([file])


@functools.cache
def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """Workers that stay for the next step: what they have imported and made, they keep."""
    # Not fork: JAX in this process has threads, and a fork of them may hang.
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, _end_with_parent)


def _end_with_parent() -> None:
    """A killed run leaves no worker behind, which would write beside those of the next run."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def partitions(shards: int, shards_each: int) -> int:
    """Into how many ranges of keys a shuffle goes: one for each shard while these are few.

    Of many shards each range takes the keys of `shards_each`: were there a block from each shard
    to each of as many ranges, blocks would be tiny and their number the square of the shards'.
    """
    return max(1, min(shards, 64), shards // shards_each)


def cut(block: Block) -> Iterator[Block]:
    """The block in pieces of at most `BLOCK_BYTES`, along its first axis."""
    rows = max(1, BLOCK_BYTES // max(1, block.nbytes // max(1, len(block))))
    yield from (block[start : start + rows] for start in range(0, max(1, len(block)), rows))


def to_bytes(block: Block) -> bytes:
    """A block as NumPy's file format has it; objects are refused."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(block), allow_pickle=False)
    return buffer.getvalue()


def from_bytes(content: bytes) -> Block:
    return np.load(io.BytesIO(content), allow_pickle=False)


def as_json(value: Any) -> Block:
    """Something small for the driver, as a block."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def of_json(block: Block) -> Any:
    return json.loads(block.tobytes())


Piece = tuple[str, int, int]  # of a file: its path, offset and size


def _write(path: epath.Path, make: Callable[..., Iterable[tuple[Key, Block]]], *arguments) -> None:
    """Blocks after each other, the index of them, and the index's size in eight bytes."""
    index = []
    with whole(path) as partial, partial.open("wb") as file:
        for key, block in make(*arguments):
            content = to_bytes(block)
            index.append([list(map(int, key)), file.tell(), len(content)])
            file.write(content)
        tail = json.dumps(index).encode()
        file.write(tail + len(tail).to_bytes(8, "little"))


def _first(function: First, item: Any) -> Iterable[tuple[Key, Block]]:
    return function(item)


def _then(function: Then, key: Key, pieces: list[Piece]) -> Iterable[tuple[Key, Block]]:
    return function(key, _read_blocks(pieces))


def _by_key(files: list[epath.Path]) -> list[tuple[Key, list[Piece]]]:
    groups: dict[Key, list[Piece]] = {}
    for path in files:
        with path.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            size = int.from_bytes(file.read(8), "little")
            file.seek(-8 - size, os.SEEK_END)
            for key, offset, length in json.loads(file.read(size)):
                groups.setdefault(tuple(key), []).append((os.fspath(path), offset, length))
    return sorted(groups.items(), key=operator.itemgetter(0))


def _read_results(files: list[epath.Path]) -> Results:
    return [(key, block) for key, found in _by_key(files) for block in _read_blocks(found)]


def _read_blocks(pieces: list[Piece]) -> list[Block]:
    blocks = []
    for path, offset, length in pieces:
        with epath.Path(path).open("rb") as file:
            file.seek(offset)
            blocks.append(from_bytes(file.read(length)))
    return blocks
