import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import zstandard

from baichuan_jax.data import sources
from baichuan_jax.data.document import Document
from baichuan_jax.data.sources import documents

ROWS = [{"text": "hello\n世界", "lang": "zh"}, {"text": "no language"}, {"text": "", "lang": "en"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(*strings, **options):
    return list(documents(strings, **options))


def expected(name):
    return [Document(row["text"], name, row.get("lang", "und")) for row in ROWS]


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        (".jsonl", bytes),
        (".jsonl.gz", gzip.compress),
        (".jsonl.zst", zstandard.compress),
        # Two frames after each other, as parallel compressors write them.
        (".jsonl.zst", lambda b: zstandard.compress(b[:20]) + zstandard.compress(b[20:])),
    ],
)
def test_json_lines(tmp_path, ending, pack):
    path = tmp_path / f"news{ending}"
    path.write_bytes(pack(JSONL))
    assert read(str(path)) == expected("news")
    assert read(f"other={path}") == expected("other")
    sources.check(str(path))


def test_line_longer_than_a_block(tmp_path):
    text = "长" * 1_500_000
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n" + '{"text": "b"}')
    assert [d.text for d in read(str(path))] == [text, "b"]


def test_parquet(tmp_path):
    path = tmp_path / "table.parquet"
    columns = {"body": ["a", "b"], "tongue": ["en", None], "other": [1, 2]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert read(str(path), text_field="body", language_field="tongue") == [
        Document("a", "table", "en"),
        Document("b", "table", "und"),
    ]


def test_folder_is_read_in_the_order_of_its_paths(tmp_path, caplog):
    for name in ["b/2.txt", "b/1.md", "a.py", "c.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(f"mine={tmp_path}")] == ["a.py", "b/1.md", "b/2.txt"]
    assert "left out 1 files" in caplog.text and ".png" in caplog.text


def test_glob_and_comma(tmp_path):
    for name in ["x-1.txt", "x-2.txt", "y.txt"]:
        (tmp_path / name).write_text(name)
    both = read(f"{tmp_path}/x-*.txt, why={tmp_path}/y.txt")
    assert [d.text for d in both] == ["x-1.txt", "x-2.txt", "y.txt"]
    assert [d.source for d in both] == [tmp_path.name] * 2 + ["why"]


def test_tfds_without_tensorflow(tmp_path):
    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int32)}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            rows = [(i, {"text": t, "n": i}) for i, t in enumerate(["one", "二"])]
            return {"train": iter(rows), "test": iter(rows[:1])}

        def _generate_examples(self):
            raise NotImplementedError

    Tiny(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    options = {"tfds_data_dir": str(tmp_path)}
    assert {d.text for d in read("tfds:tiny", **options)} == {"one", "二"}
    assert read("t=tfds:tiny:1.0.0:test", **options)[0].source == "t"
    sources.check("tfds:tiny", **options)
    with pytest.raises(ValueError, match="absent: no such prepared dataset"):
        sources.check("tfds:absent", **options)
    with pytest.raises(ValueError, match="dev"):
        sources.check("tfds:tiny:dev", **options)
    with pytest.raises(ValueError, match=r"row 1: no field 'body'; it has .*text"):
        sources.check("tfds:tiny", text_field="body", **options)


BAD_ROWS = {
    b'{"text": "a"}\n[1]\n': "row 2: a row must be an object",
    b'{"text": "a"}\n\n{"body": 1, "id": 2}\n': "row 3: no field 'text'; it has body, id",
    b'{"text": "a"}\n{"text": "b"\n': "row 2: not valid JSON",
    b'{"text": "a"}\n' + b"[" * 200_000: "row 2: not valid JSON",
    b'{"text": "a", "n": ' + b"9" * 5_000 + b"}": "row 1: not valid JSON",
    b'{"text": 5}\n': "row 1: 'text' must be a string, not 5",
    b'{"text": "a"}\n{"text": "\xff"}\n': "row 2: byte 11 of it is not UTF-8",
    b'{"text": "ab\\ud800"}\n': "row 1: character 3 of 'text' is a lone surrogate",
    b'{"text": "a", "lang": "../up"}\n': "row 1: 'lang' must be a name",
    b"\n": "holds no document",
}


@pytest.mark.parametrize("content", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_errors_name_file_and_row(tmp_path, content):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=BAD_ROWS[content]) as error:
        read(str(path))
    assert str(path) in str(error.value)


def test_check_reads_the_first_row_of_every_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}')
    (tmp_path / "b.jsonl").write_text("[]")
    with pytest.raises(ValueError, match=r"b\.jsonl, row 1"):
        sources.check(str(tmp_path))
    with pytest.raises(ValueError, match="No source"):
        sources.check(())


def test_damaged_files(tmp_path):
    # Enough text for several blocks inside a frame; half of it must never pass for all of it.
    content = b"".join(b'{"text": "%d"}\n' % i for i in range(20_000))
    for ending, pack in {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}.items():
        for damage in (lambda b: b[: len(b) // 2], lambda b: b"\x00" * 30 + b[30:]):
            path = tmp_path / f"cut{ending}"
            path.write_bytes(damage(pack(content)))
            with pytest.raises(ValueError, match=r"cut.*damaged or cut off"):
                read(str(path))
    path = tmp_path / "cut.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.parquet.*not readable as Parquet"):
        read(str(path))


def test_parquet_errors(tmp_path):
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(ValueError, match=r"p\.parquet: no column 'text'; it has body, n"):
        sources.check(str(path))
    with pytest.raises(ValueError, match=r"p\.parquet, row 1: 'n' must be a string"):
        read(str(path), text_field="n")
    raw = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(np.array([0, 1, 2], np.int32)), pyarrow.py_buffer(b"a\xff")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), path)
    with pytest.raises(ValueError, match=r"p\.parquet, row 2: byte 1 of it is not UTF-8"):
        read(str(path))


def test_text_file_errors(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"fine \xe4\xb8")
    with pytest.raises(ValueError, match=r"bad\.txt: byte 6"):
        read(str(path))
    path.write_bytes(b"\xe4\xb8\xad" * 400_000)  # the check's 1 MiB ends inside a character
    sources.check(str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/none.jsonl", "no such file or folder"),
        ("{}/*.jsonl", "no file matches"),
        ("{}/**/*.jsonl", "name the folder"),
        ("{}", "no file in this folder"),
        ("{}/data.csv", "its ending is none of"),
        ("a b={}", "needs a name"),
        ("x=embedded:", "without a name"),
        ("embedded:lots", "embedded:BYTES"),
        ("tfds:", "should be tfds:DATASET"),
    ],
)
def test_unusable_sources(tmp_path, source, message):
    if source.endswith(".csv"):
        (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match=message):
        sources.check(source.format(tmp_path))


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me" / "in").mkdir(parents=True)
    file = tmp_path / "me" / "in" / "a.txt"
    file.write_text("one")
    for source in ("~", "~/in", "~/in/a.txt", "~/in/*.txt", "x=~/in"):
        assert [origin.path for origin in sources.origins(source)] == [str(file)]
    assert sources.origins("~")[0].source == "me"
    assert sources.stamp("~/in") != sources.stamp("~")
    assert sources.expected_bytes("~/in") == 3
    with pytest.raises(ValueError, match="no such file or folder"):
        sources.origins("~/none.txt")


def test_stamp_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = sources.stamp(str(path))
    assert sources.stamp(str(path)) == before
    path.write_text("four")
    assert sources.stamp(str(path)) != before
    assert sources.stamp("embedded:") == sources.stamp("embedded:")


def test_expected_bytes_where_they_can_be_told(tmp_path):
    (tmp_path / "a.txt").write_text("三个字")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    assert sources.expected_bytes(f"{tmp_path},embedded:1000") == 9 + 14 + 1_000
    (tmp_path / "c.jsonl.gz").write_bytes(b"")
    assert sources.expected_bytes([str(tmp_path)]) is None
