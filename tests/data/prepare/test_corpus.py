"""Attributes stand beside the rows they are of, through drops and edits."""

import numpy as np
import pyarrow as pa
import pytest
from etils import epath

from baichuan_jax.data.prepare import corpus


@pytest.fixture
def documents(tmp_path):
    table = pa.table(
        {
            "text": ["a", "b", "c", "d"],
            "source": ["s", "s", "t", "t"],
            "language": ["und", "en", "en", "und"],
            "origin": ["f:1", "f:2", "g:1", "g:2"],
        },
        schema=corpus.DOCUMENT_SCHEMA,
    )
    view = corpus.Corpus(str(tmp_path))
    corpus.write_parquet(view.document_path(0), table)
    return view


def test_stages_drop_edit_and_score(documents):
    first = pa.table({"reason": pa.array(["too short", None, None, None]), "score": [1, 2, 3, 4]})
    documents.write("one", 0, np.arange(4), first)
    after = documents.after("one")
    assert after.read(0, "text").to_pydict() == {"row": [1, 2, 3], "text": ["b", "c", "d"]}

    rows = after.read(0).column("row")
    second = pa.table(
        {
            "reason": pa.array([None, "copy", None], pa.string()),
            "text": pa.array([None, None, "D"], pa.string()),
            "language": pa.array(["zh", None, None], pa.string()),
        }
    )
    after.write("two", 0, rows, second)
    both = after.after("two")
    assert both.read(0, "text", "language", "score").to_pydict() == {
        "row": [1, 3],
        "text": ["b", "D"],
        "language": ["zh", "und"],
        "score": [2, 4],
    }
    everything = both.read_all(0, "origin", "stage").to_pydict()
    assert everything == {
        "row": [0, 1, 2, 3],
        "origin": ["f:1", "f:2", "g:1", "g:2"],
        "reason": ["too short", None, "copy", None],
        "stage": ["one", None, "two", None],
    }
    assert after.read(0, "text")["text"].to_pylist() == ["b", "c", "d"]  # as it was in between


def test_a_column_that_nobody_wrote_and_rows_that_do_not_fit(documents):
    with pytest.raises(ValueError, match=r"none of the stages .* has written quality"):
        documents.read(0, "quality")
    with pytest.raises(ValueError, match="one: 1 attributes for 2 rows"):
        documents.write("one", 0, np.arange(2), pa.table({"score": [1]}))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = epath.Path(tmp_path) / "folder" / "file"
    with pytest.raises(RuntimeError), corpus.whole(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert not path.exists()
    with corpus.whole(path) as partial:
        partial.write_text("all")
    assert path.read_text() == "all"


def test_ids():
    assert corpus.ids(3, np.array([0, 5], np.uint32)).tolist() == [3 << 32, (3 << 32) + 5]
