"""The engine on Apache Beam: Dataflow, Flink, Spark, Dask, or one process (extra `beam`).

A chain becomes one pipeline: elements are whole blocks of at most 8 MB, grouped by key between
the functions. All workers must see the corpus's folder, and have this package installed.
"""

import functools
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from etils import epath

from baichuan_jax.data.prepare import engine
from baichuan_jax.data.prepare.corpus import whole
from baichuan_jax.data.prepare.engine import Block, First, Key, Results, Then

RUNNERS = {
    "direct": "DirectRunner",
    "dask": "apache_beam.runners.dask.dask_runner.DaskRunner",
    "dataflow": "DataflowRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
}
Element = tuple[str, tuple[list[int], int, int, bytes]]  # key, origin, number, piece, content


class Beam:
    """Runs chains as Beam pipelines.

    Args:
      folder: for the results, seen by all workers.
      runner: one of `RUNNERS`.
      options: further flags of Beam, such as `--project=...`.

    Raises:
      ValueError: the runner is unknown.
    """

    def __init__(self, folder: epath.PathLike, runner: str, options: Sequence[str] = ()):
        if runner not in RUNNERS:
            raise ValueError(f"--runner={runner} should be one of local, {', '.join(RUNNERS)}.")
        self._folder = epath.Path(folder)
        self._options = [f"--runner={RUNNERS[runner]}", *options]

    def run(self, name: str, items: Sequence[Any], first: First, *then: Then) -> Results:
        folder = self._folder / f"beam-{name}"  # what `Local` leaves has another form
        return engine.kept(folder, functools.partial(self._run, folder, name, items, first, *then))

    def _run(
        self, folder: epath.Path, name: str, items: Sequence[Any], first: First, *then: Then
    ) -> Results:
        # One for each attempt: workers of a run that was killed may still be writing.
        folder = folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        # Of the flags, only these: Beam would read this process's own.
        pipeline = beam.Pipeline(options=PipelineOptions(self._options))
        blocks = (
            pipeline
            | "items" >> beam.Create(list(enumerate(items)))
            | "spread" >> beam.Reshuffle()
            | f"{name} 0" >> beam.FlatMap(_first, first)
        )
        for number, function in enumerate(then, start=1):
            blocks = (
                blocks
                | f"group {number}" >> beam.GroupByKey()
                | f"{name} {number}" >> beam.FlatMap(_then, function)
            )
        _ = (
            blocks
            | "group results" >> beam.GroupByKey()
            | "write results" >> beam.Map(_write, os.fspath(folder))
        )
        running = pipeline.run()
        running.wait_until_finish()
        if client := getattr(running, "client", None):  # Dask's, which Beam leaves open
            client.close()
        return [
            (key, block)
            for key, path in sorted((_key(path.name), path) for path in folder.glob("*[0-9]"))
            for block in _unpack(path.read_bytes())
        ]


def _name(key: Key) -> str:
    return "-".join(str(int(part)) for part in key)


def _key(name: str) -> Key:
    return tuple(map(int, name.split("-")))


def _elements(origin: Key, pairs: Iterator[tuple[Key, Block]]) -> Iterator[Element]:
    for number, (key, block) in enumerate(pairs):
        for piece, part in enumerate(engine.cut(block)):
            yield _name(key), (list(origin), number, piece, engine.to_bytes(part))


def _first(item: tuple[int, Any], function: First) -> Iterator[Element]:
    number, value = item
    return _elements((number,), function(value))


def _then(group: tuple[str, Any], function: Then) -> Iterator[Element]:
    name, elements = group
    key = _key(name)
    return _elements(key, function(key, _blocks(elements)))


def _blocks(elements: Any) -> list[Block]:
    """The blocks of a key in the order of their origin, which is lost on the way."""
    blocks: dict[tuple, list[Block]] = {}
    for origin, number, _, content in sorted(elements):
        blocks.setdefault((*origin, number), []).append(engine.from_bytes(content))
    return [np.concatenate(pieces) for pieces in blocks.values()]


def _write(group: tuple[str, Any], folder: str) -> None:
    name, elements = group
    contents = [engine.to_bytes(block) for block in _blocks(elements)]
    path = epath.Path(folder) / name
    with whole(path) as partial:
        partial.write_bytes(b"".join(len(c).to_bytes(8, "little") + c for c in contents))


def _unpack(content: bytes) -> Iterator[Block]:
    while content:
        size = int.from_bytes(content[:8], "little")
        yield engine.from_bytes(content[8 : 8 + size])
        content = content[8 + size :]
