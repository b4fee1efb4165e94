"""Documents in shards, and what each stage says about them, row by row.

    DIRECTORY/documents/00000.parquet          text, source, language, origin; never changed
    DIRECTORY/attributes/STAGE/00000.parquet   one row for each row of the documents

A stage writes attributes of the documents that the stages before it kept. Three of them change
what later stages see: `reason` (why the document is dropped; null: it is not), `text` and
`language` (null: unchanged). The others are scores. So a document is read together with what
is known of it by reading the same rows of some files, and a stage that is run again touches
its own files only.

A document's id is its shard << 32 | its row, uint64.
"""

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

OVERRIDES = ("text", "language")
DOCUMENT_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("text", "source", "language", "origin")]
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents as they are after some stages; small, so that it can go to any worker.

    Attributes:
      directory: of the documents and the attributes.
      stages: whose attributes apply, in order.
    """

    directory: str
    stages: tuple[str, ...] = ()

    def save(self) -> None:
        """Writes the stages down, for `load`."""
        with whole(epath.Path(self.directory) / "corpus.json") as partial:
            partial.write_text(json.dumps({"stages": self.stages}))

    def after(self, stage: str) -> "Corpus":
        """The documents as they are after one more stage."""
        return dataclasses.replace(self, stages=(*self.stages, stage))

    def num_shards(self) -> int:
        return len(list((epath.Path(self.directory) / "documents").glob("*.parquet")))

    def document_path(self, shard: int) -> epath.Path:
        return epath.Path(self.directory) / "documents" / f"{shard:05d}.parquet"

    def attribute_path(self, stage: str, shard: int) -> epath.Path:
        return epath.Path(self.directory) / "attributes" / stage / f"{shard:05d}.parquet"

    def num_rows(self, shard: int) -> int:
        """Rows of a shard, dropped ones included."""
        with self.document_path(shard).open("rb") as file:
            return pq.ParquetFile(file).metadata.num_rows

    def read(self, shard: int, *columns: str) -> pa.Table:
        """The kept documents of a shard: `row` (uint32) and the columns asked for.

        Columns are those of the documents, as edited, and the attributes of the stages.

        Raises:
          ValueError: no stage has written such a column.
        """
        table = self._aligned(shard, columns)
        kept = pc.is_null(table["reason"])
        return table.drop_columns("reason").filter(kept)

    def read_all(self, shard: int, *columns: str) -> pa.Table:
        """As `read`, but dropped documents too, and with `reason` and the `stage` that gave it."""
        return self._aligned(shard, columns)

    def _aligned(self, shard: int, columns: tuple[str, ...]) -> pa.Table:
        of_documents = [name for name in columns if name in DOCUMENT_SCHEMA.names]
        found = dict(_read(self.document_path(shard), of_documents))
        size = self.num_rows(shard)
        nothing = pa.nulls(size, pa.string())
        reason, by = nothing, nothing
        for stage in self.stages:
            attributes = _read(self.attribute_path(stage, shard), ["reason", *columns])
            for name, values in attributes.items():
                if name == "reason":
                    first = pc.and_(pc.is_null(reason), pc.is_valid(values))
                    by = pc.if_else(first, stage, by)
                    reason = pc.coalesce(reason, values)
                elif name in OVERRIDES and name in found:
                    found[name] = pc.coalesce(values, found[name])
                else:
                    found[name] = values
        if missing := set(columns) - set(found) - {"reason", "stage"}:
            raise ValueError(
                f"{self.directory}: none of the stages {', '.join(self.stages) or '(none)'} has"
                f" written {', '.join(sorted(missing))}."
            )
        row = pa.array(np.arange(size, dtype=np.uint32))
        ordered = {name: found[name] for name in columns if name in found}
        return pa.table({"row": row, **ordered, "reason": reason} | _if("stage", by, columns))

    def write(self, stage: str, shard: int, rows: np.ndarray | pa.Array, attributes: pa.Table):
        """Writes the attributes of these rows; the others get nulls."""
        rows = np.asarray(rows)
        if len(rows) != len(attributes):
            raise ValueError(f"{stage}: {len(attributes)} attributes for {len(rows)} rows.")
        places = np.zeros(self.num_rows(shard), np.int64)
        absent = np.ones(len(places), bool)
        places[rows], absent[rows] = np.arange(len(rows)), False
        write_parquet(
            self.attribute_path(stage, shard), attributes.take(pa.array(places, mask=absent))
        )


def load(directory: epath.PathLike) -> Corpus:
    """The documents that `experiments.prepare_data` has left in its working folder.

    Raises:
      ValueError: it has not finished there.
    """
    path = epath.Path(directory).expanduser() / "corpus.json"
    if not path.exists():
        raise ValueError(f"{directory}: no {path.name}, so no prepare_data has finished here.")
    return Corpus(str(path.parent), tuple(json.loads(path.read_text())["stages"]))


def write_parquet(path: epath.Path, table: pa.Table) -> None:
    """Writes a table whole or not at all."""
    with whole(path) as partial, partial.open("wb") as file:
        pq.write_table(table, file, compression="zstd", row_group_size=1 << 14)


@contextlib.contextmanager
def whole(path: epath.Path) -> Iterator[epath.Path]:
    """A name to write to, which becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A cluster may run the same work twice at a time, so each has a name of its own.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    yield partial
    partial.replace(path)


def ids(shard: int, rows: np.ndarray) -> np.ndarray:
    """Document ids, uint64, of rows of a shard."""
    return np.uint64(shard << 32) | np.asarray(rows).astype(np.uint64)


def shard_of(ids: np.ndarray) -> np.ndarray:
    """int64: the shards of document ids."""
    return (ids >> np.uint64(32)).astype(np.int64)


def row_of(ids: np.ndarray) -> np.ndarray:
    """uint32: the rows of document ids, in their shards."""
    return (ids & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _read(path: epath.Path, columns: list[str]) -> dict[str, pa.ChunkedArray]:
    with path.open("rb") as file, pq.ParquetFile(file) as parquet:
        names = [name for name in dict.fromkeys(columns) if name in parquet.schema_arrow.names]
        table = parquet.read(names)
    return {name: table[name] for name in names}


def _if(name: str, values: pa.Array, wanted: tuple[str, ...]) -> dict[str, pa.Array]:
    return {name: values} if name in wanted else {}
