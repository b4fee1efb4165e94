"""Reading on after bad rows; the strict reading is tested in test_sources.py."""

import codecs
import gzip
import json
import tracemalloc
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import zstandard

from baichuan_jax.data import readers, sources
from baichuan_jax.data.readers import Options, Origin

ROWS = [
    (b'{"text": "first", "lang": "en"}', None),
    (b"[1]", "not an object"),
    (b'{"body": 1}', "no text"),
    (b'{"text": 5}', "text is no string"),
    (b'{"text": null}', "text is no string"),
    (b'{"text": "ab\\ud800"}', "lone surrogate"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "b"', "not JSON"),
    (b"", None),  # a blank line is no row
    (b'{"text": "' + b"x" * 5_000 + b'"}', "too long"),
    (b'{"text": "a", "lang": "../up"}', "language is no name"),
    ('{"text": "最后"}'.encode(), None),
]
PACK = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.compress,
}


def read(path, source="s", **options):
    bad = []
    found = list(readers.read(Origin(source, str(path)), Options(**options), bad.append))
    return [(row, document.text) for row, document in found], bad


@pytest.mark.parametrize("ending", PACK)
def test_every_bad_row_is_named_and_the_others_are_read(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(PACK[ending](b"\n".join(row for row, _ in ROWS)))
    texts, bad = read(path, max_row_bytes=4_000)
    assert texts == [(1, "first"), (12, "最后")]
    expected = [(n, reason) for n, (_, reason) in enumerate(ROWS, 1) if reason]
    assert [(each.row, each.reason) for each in bad] == expected
    assert all(each.path == str(path) for each in bad)
    assert bad[0].preview == "[1]" and bad[6].preview == '{"text": "b"'
    assert len(bad[7].preview) == 200 and "max_row_bytes=4,000" in bad[7].message


def test_the_strict_reading_says_the_same(tmp_path):
    for number, (row, reason) in enumerate(ROWS):
        if reason and reason != "too long":
            path = tmp_path / f"{number}.jsonl"
            path.write_bytes(row)
            _, [bad] = read(path)
            with pytest.raises(ValueError) as error:
                list(sources.documents(str(path)))
            assert str(error.value) == str(bad)


def test_a_language_that_is_no_name_may_get_one(tmp_path):
    path = tmp_path / "a.jsonl"
    labels = ["zh", "C++", None, ["en"], 7, "Jupyter Notebook"]
    path.write_text("\n".join(json.dumps({"text": "x", "lang": each}) for each in labels))
    bad, asked = [], []

    def name(label):
        asked.append(label)
        return "named"

    found = list(readers.read(Origin("s", str(path)), Options(), bad.append, name))
    languages = [document.language for _, document in found]
    assert languages == ["zh", "named", "und", "named", "named", "named"]
    assert asked == ["C++", ["en"], 7, "Jupyter Notebook"] and bad == []
    path.write_text('{"text": 5, "lang": "C++"}')  # what is no text stays a bad row
    assert list(readers.read(Origin("s", str(path)), Options(), bad.append, name)) == []
    assert [each.reason for each in bad] == ["text is no string"] and len(asked) == 4


@pytest.mark.parametrize("ending", PACK)
def test_a_byte_order_mark_is_no_text(tmp_path, ending, monkeypatch):
    path = tmp_path / f"a{ending}"
    rows = '{"text": "\ufeff一"}\n{"text": "2"}'  # only the file's own goes
    path.write_bytes(PACK[ending](codecs.BOM_UTF8 + rows.encode()))
    assert read(path) == ([(1, "\ufeff一"), (2, "2")], [])
    with monkeypatch.context() as patch:
        patch.setattr(readers, "_BLOCK", 2)
        assert read(path) == ([(1, "\ufeff一"), (2, "2")], [])
    path.write_bytes(PACK[ending](codecs.BOM_UTF8))
    assert read(path) == ([], [])
    text = tmp_path / "a.txt"
    text.write_bytes(codecs.BOM_UTF8 + "很好".encode())
    assert read(text) == ([(0, "很好")], [])
    assert read(text, head=True) == ([(0, "很好")], [])


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_rows_before_a_cut_are_read(tmp_path, ending):
    content = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(60_000))
    packed = PACK[ending](content)
    path = tmp_path / f"cut{ending}"
    path.write_bytes(packed[: len(packed) // 2])
    texts, [bad] = read(path)
    assert (bad.row, bad.reason) == (0, "damaged file")
    make = (
        zlib.decompressobj(31) if "gz" in ending else zstandard.ZstdDecompressor().decompressobj()
    )
    lines = make.decompress(packed[: len(packed) // 2]).split(b"\n")[:-1]
    assert len(lines) > 10_000
    assert texts == [(n, json.loads(line)["text"]) for n, line in enumerate(lines, 1)]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_huge_line_is_passed_over_in_little_memory(tmp_path, ending):
    path = tmp_path / f"huge{ending}"
    path.write_bytes(PACK[ending](b'{"text": "' + b"x" * 30_000_000 + b'"}\n{"text": "b"}'))
    tracemalloc.start()
    texts, [bad] = read(path, max_row_bytes=100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == [(2, "b")]
    assert (bad.row, bad.reason) == (1, "too long") and "30,000,012 bytes" in bad.message
    assert peak < 6_000_000


def test_lines_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BLOCK", 7)
    lines = [json.dumps({"text": "x" * n}).encode() for n in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    texts, bad = read(path, max_row_bytes=len(lines[25]))
    assert texts == [(n + 1, "x" * n) for n in range(26)]
    assert [each.row for each in bad] == list(range(27, 41))


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("很好".encode())
    assert read(path) == ([(0, "很好")], [])
    texts, [bad] = read(path, max_row_bytes=5)
    assert texts == [] and (bad.row, bad.reason) == (0, "too long")
    path.write_bytes(b"fine \xe4")
    texts, [bad] = read(path)
    assert texts == [] and bad.reason == "not UTF-8" and bad.preview.startswith("fine")


def test_parquet(tmp_path):
    path = tmp_path / "p.parquet"
    raw = pyarrow.StringArray.from_buffers(
        3, pyarrow.py_buffer(np.array([0, 1, 2, 3], np.int32)), pyarrow.py_buffer(b"a\xffc")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), path)
    texts, [bad] = read(path)
    assert texts == [(1, "a"), (3, "c")] and (bad.row, bad.reason) == (2, "not UTF-8")
    _, [bad] = read(path, text_field="body")
    assert (bad.row, bad.reason) == (0, "no text")

    rows = [f"text {n}" * 50 for n in range(2_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=1_000)
    whole = path.read_bytes()
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 400 + whole[start + 400 :])
    texts, [bad] = read(path)
    assert texts == [(n, text) for n, text in enumerate(rows[: len(texts)], 1)]
    assert 700 < len(texts) <= 1_000
    assert (bad.row, bad.reason) == (0, "damaged file")
    path.write_bytes(whole[:-20])
    texts, [bad] = read(path)
    assert texts == [] and bad.reason == "damaged file"


def test_tfds(tmp_path):
    class Lengths(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": iter([(i, {"text": "x" * i}) for i in range(1, 9)])}

        def _generate_examples(self):
            raise NotImplementedError

    Lengths(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    texts, bad = read("tfds:lengths", tfds_data_dir=str(tmp_path), max_row_bytes=6)
    assert sorted(text for _, text in texts) == ["x" * i for i in range(1, 7)]
    assert [each.reason for each in bad] == ["too long"] * 2
    assert sorted([row for row, _ in texts] + [each.row for each in bad]) == list(range(1, 9))
    texts, bad = read("tfds:lengths", tfds_data_dir=str(tmp_path), text_field="body")
    assert texts == [] and [each.reason for each in bad] == ["no text"] * 8


def test_origins_name_their_sources(tmp_path):
    for name in ("b.txt", "a.jsonl"):
        (tmp_path / name).write_text("")
    found = sources.origins(f"mine={tmp_path}, embedded:9, t=tfds:x:1.0.0:test")
    assert found == [
        Origin("mine", f"{tmp_path}/a.jsonl"),
        Origin("mine", f"{tmp_path}/b.txt"),
        Origin("", "embedded:9"),
        Origin("t", "tfds:x:1.0.0:test"),
    ]
    assert [origin.is_file for origin in found] == [True, True, False, False]
