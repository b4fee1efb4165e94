import contextlib
import gzip
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from baichuan_jax.data import embedded, readers, sources
from baichuan_jax.data.prepare import ingest
from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.engine import Local
from baichuan_jax.data.prepare.ingest import IngestConfig
from baichuan_jax.data.readers import Origin

SMALL = IngestConfig(shard_bytes=4_000)


def texts(number, seed=0):
    rng = np.random.default_rng(seed)
    letters = list("abcdefg 中文字")
    return ["".join(rng.choice(letters, rng.integers(1, 400))) for _ in range(number)]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def given(tmp_path):
    """A folder with files of several kinds and sizes, and one file more."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl([{"text": t, "lang": "zh"} for t in texts(60)]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl([{"text": t} for t in texts(9, 1)])))
    for number, text in enumerate(texts(30, 2)):
        (folder / f"c{number:02d}.txt").write_text(text)
    (tmp_path / "more.jsonl").write_bytes(jsonl([{"text": t, "lang": "en"} for t in texts(9, 3)]))
    return f"mixed={folder},more={tmp_path}/more.jsonl"


def run(folder, given, config=SMALL, workers=1, scratch="scratch", **more):
    return ingest.run(folder, given, config, Local(folder / scratch, workers), **more)


def tables(folder):
    paths = sorted((folder / "documents").glob("*.parquet"))
    assert [path.name for path in paths] == [f"{n:05d}.parquet" for n in range(len(paths))]
    return [pq.read_table(path) for path in paths]


def rows(folder):
    return [row for table in tables(folder) for row in table.to_pylist()]


def rejects(folder):
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]


def test_the_documents_of_the_sources_in_their_order(given, tmp_path):
    out = tmp_path / "out"
    told = run(out, given)
    expected = list(sources.documents(given))
    found = rows(out)
    assert [(r["text"], r["source"], r["language"]) for r in found] == [
        (d.text, d.source, d.language) for d in expected
    ]
    assert found[0]["origin"] == f"{tmp_path}/in/a.jsonl:1"
    assert found[70]["origin"] == f"{tmp_path}/in/c01.txt"
    sizes = [sum(len(t.encode()) for t in table["text"].to_pylist()) for table in tables(out)]
    assert told["shards"] == len(sizes) > 5 and max(sizes) < 4_000 + 1_200
    assert told["documents"] == len(expected) and told["bytes"] == sum(sizes)
    assert told["bad_rows"] == 0 and told["reasons"] == {} and rejects(out) == []
    assert list(told["sources"]) == ["mixed", "more"]
    assert told["sources"]["more"]["documents"] == 9
    assert Corpus(str(out)).num_shards() == told["shards"]
    assert [path.name for path in (out / "documents").iterdir() if path.is_dir()] == []


def test_workers_change_nothing(given, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(one, given) == run(two, given, workers=2)
    names = sorted(p.name for p in (one / "documents").iterdir())
    assert names == sorted(p.name for p in (two / "documents").iterdir())
    for name in names:
        content = [(out / "documents" / name).read_bytes() for out in (one, two)]
        assert content[0] == content[1]


def test_small_files_go_together(tmp_path):
    sizes = {"a.txt": 10, "b.txt": 50, "c.txt": 60, "d.txt": 500, "e.txt": 1, "f.txt": 99}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "g.jsonl.gz").write_bytes(b"x" * 20)  # holds about four times as much
    origins = [Origin("s", f"{tmp_path}/{name}") for name in [*sizes, "g.jsonl.gz"]]
    origins += [Origin("", "embedded:100"), Origin("t", "tfds:x")]
    found = [[epath.Path(o.path).name for o in group] for group in ingest.groups(origins, 100)]
    assert found == [
        ["a.txt", "b.txt"],
        ["c.txt"],
        ["d.txt"],
        ["e.txt", "f.txt"],
        ["g.jsonl.gz"],
        ["embedded:100"],
        ["tfds:x"],
    ]


def test_bad_rows_are_listed_and_the_rest_is_read(given, tmp_path):
    folder = tmp_path / "in"
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b'[1]\n{"text": "\xff"}\n{"text": "' + b"x" * 9_000 + b'"}\n')
    (folder / "d.txt").write_bytes(b"")
    (folder / "e.jsonl").write_bytes(b"\n\n")
    packed = gzip.compress(jsonl([{"text": t} for t in texts(200, 5)]))
    (folder / "f.jsonl.gz").write_bytes(packed[:-100])
    out = tmp_path / "out"
    told = run(out, given, IngestConfig(shard_bytes=4_000, max_row_bytes=8_000))
    assert told["reasons"] == {
        "empty file": 2,
        "not an object": 1,
        "not UTF-8": 1,
        "too long": 1,
        "damaged file": 1,
    }
    listed = rejects(out)
    assert [(epath.Path(r["path"]).name, r["row"], r["reason"]) for r in listed] == [
        ("a.jsonl", 61, "not an object"),
        ("a.jsonl", 62, "not UTF-8"),
        ("a.jsonl", 63, "too long"),
        ("d.txt", 0, "empty file"),
        ("e.jsonl", 0, "empty file"),
        ("f.jsonl.gz", 0, "damaged file"),
    ]
    assert listed[0]["preview"] == "[1]" and "a row must be an object" in listed[0]["message"]
    from_cut = [row for row in rows(out) if "f.jsonl.gz" in row["origin"]]
    assert 100 < len(from_cut) < 200
    assert [row["text"] for row in from_cut] == texts(200, 5)[: len(from_cut)]
    assert told["sources"]["mixed"] == {
        "documents": 60 + 9 + 30 + len(from_cut),
        "bytes": told["bytes"] - told["sources"]["more"]["bytes"],
        "bad_rows": 6,
    }


def test_too_many_bad_rows_stop_the_run_and_nothing_is_lost(tmp_path, monkeypatch):
    (tmp_path / "good.jsonl").write_bytes(jsonl([{"text": t} for t in texts(80)]))
    (tmp_path / "bad.jsonl").write_bytes(b"[]\n" * 9 + b"{}\n" * 3 + b'{"text": "x"}\n')
    given, out = f"s={tmp_path}/*.jsonl", tmp_path / "out"
    config = IngestConfig(min_bad_rows=11, max_bad_share=0.1)
    message = (
        r"12 of 93 rows cannot be read \(9 not an object, 3 no text\).*"
        r"config\.ingest\.max_bad_share=0\.1.*12, are in \S*/bad\.jsonl;.*rejects\.jsonl"
    )
    with pytest.raises(ValueError, match=message):
        run(out, given, config)
    assert len(rejects(out)) == 12
    monkeypatch.setattr(readers, "read", None)  # what was read is not read again
    config.max_bad_share = 0.2
    assert run(out, given, config)["documents"] == 81
    monkeypatch.undo()
    # Each source is looked at, too: here the sum over both would do.
    given = f"good={tmp_path}/good.jsonl,bad={tmp_path}/bad.jsonl"
    message = (
        r"12 of 13 rows of the source 'bad' cannot be read, more than config\.max_source_loss=0\.9"
        r" of them.*rejects\.jsonl"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "each", given, config, max_source_loss=0.9)
    assert run(tmp_path / "each", given, config, max_source_loss=0.93)["documents"] == 81
    given = f"s={tmp_path}/*.jsonl"
    few = IngestConfig(min_bad_rows=12, max_bad_share=0.1)
    assert run(tmp_path / "few", given, few)["bad_rows"] == 12


def test_a_source_without_documents_is_an_error(tmp_path, given):
    (tmp_path / "none.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match="source 'void' holds no document"):
        run(tmp_path / "out", f"{given},void={tmp_path}/none.jsonl")
    with pytest.raises(ValueError, match=r"No source.*config\.sources"):
        run(tmp_path / "out", " ")
    with pytest.raises(ValueError, match="no such file"):
        run(tmp_path / "out", f"{tmp_path}/absent.jsonl")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("keeps", [True, False], ids=["engine resumes", "engine starts anew"])
def test_finished_tasks_are_not_done_again(given, tmp_path, monkeypatch, keeps):
    run(tmp_path / "whole", given)
    out, read, opened = tmp_path / "out", readers.read, []

    def watched(origin, *arguments):
        opened.append(origin.path)
        if len(opened) == 20:
            raise Killed
        return read(origin, *arguments)

    monkeypatch.setattr(readers, "read", watched)
    with pytest.raises(Killed):
        run(out, given)
    first = opened.copy()
    if not keeps:
        shutil.rmtree(out / "scratch")
    run(out, given)
    assert not set(opened[20:]) & {f"{tmp_path}/in/a.jsonl", f"{tmp_path}/in/b.jsonl.gz"}
    assert set(first) | set(opened[20:]) == {o.path for o in sources.origins(given)}
    assert rows(out) == rows(tmp_path / "whole")


def test_an_interruption_while_shards_get_their_numbers(given, tmp_path, monkeypatch):
    run(tmp_path / "whole", given)
    out, replace, moved = tmp_path / "out", type(epath.Path("/")).replace, []

    def killing(path, target):
        if "documents/0" in str(target):
            moved.append(target)
            if len(moved) == 3:
                raise Killed
        return replace(path, target)

    monkeypatch.setattr(type(epath.Path("/")), "replace", killing)
    with pytest.raises(Killed):
        run(out, given)
    monkeypatch.undo()
    monkeypatch.setattr(readers, "read", None)
    run(out, given)
    assert rows(out) == rows(tmp_path / "whole")


class Twice:
    """A cluster that does each task twice, and takes what one of both gives."""

    def __init__(self, dying):
        self._dying = dying

    def run(self, name, items, first):
        results = []
        for item in items:
            results += list(first(item))
            with self._dying(), contextlib.suppress(Killed):
                list(first(item))
        return results


def test_a_task_that_is_done_twice(given, tmp_path, monkeypatch):
    told = run(tmp_path / "whole", given)
    assert ingest.run(tmp_path / "late", given, SMALL, Twice(contextlib.nullcontext)) == told

    @contextlib.contextmanager
    def dying():
        # As if it had begun before the other was done; and it does not live to its end.
        exists = type(epath.Path("/")).exists
        with monkeypatch.context() as patch:
            patch.setattr(ingest, "write_parquet", killed)
            patch.setattr(
                type(epath.Path("/")), "exists", lambda p: p.name != "done.json" and exists(p)
            )
            yield

    def killed(*arguments):
        raise Killed

    assert ingest.run(tmp_path / "both", given, SMALL, Twice(dying)) == told
    for out in (tmp_path / "late", tmp_path / "both"):
        assert rows(out) == rows(tmp_path / "whole")
        assert [path.name for path in (out / "documents").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("scratch", ["scratch", "other"], ids=["resumes", "starts anew"])
@pytest.mark.parametrize("deleted", range(4))
def test_an_interruption_while_the_parts_are_deleted(
    given, tmp_path, monkeypatch, scratch, deleted
):
    (tmp_path / "in" / "a.jsonl").open("ab").write(b"[1]\n")
    told, out = run(tmp_path / "whole", given), tmp_path / "out"
    rmtree = type(epath.Path("/")).rmtree

    def killed(path):
        if "parts" in path.name:
            files = [folder / name for folder, _, names in path.walk() for name in names]
            for file in sorted(files)[:deleted]:
                file.unlink()
            raise Killed
        rmtree(path)

    monkeypatch.setattr(type(epath.Path("/")), "rmtree", killed)
    with pytest.raises(Killed):
        run(out, given)
    monkeypatch.undo()
    assert run(out, given, scratch=scratch) == told
    assert rows(out) == rows(tmp_path / "whole")
    assert rejects(out) == rejects(tmp_path / "whole") != []
    assert [path.name for path in (out / "documents").iterdir() if path.is_dir()] == []


def test_documents_that_were_deleted_are_missed(given, tmp_path):
    run(tmp_path, given)
    shutil.rmtree(tmp_path / "documents")
    with pytest.raises(ValueError, match=r"00000\.parquet is missing: delete the scratch folder"):
        run(tmp_path, given)


def test_no_text_is_lost_for_its_label(tmp_path, monkeypatch, caplog):
    labels = ["C++", "c#", "Jupyter Notebook", "C++", ["en"], "zh-CN", " English ", None]
    lines = [{"text": f"text {n}", "lang": label} for n, label in enumerate(labels)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(lines))
    told = run(tmp_path / "out", f"{tmp_path}/a.jsonl")
    expected = ["code", "code", "und", "code", "und", "zh-CN", "en", "und"]
    assert [row["language"] for row in rows(tmp_path / "out")] == expected
    assert told["bad_rows"] == 0 and told["languages"] == [
        ["C++", "code", 2],
        ["c#", "code", 1],
        ["Jupyter Notebook", "und", 1],
        ["['en']", "und", 1],
        [" English ", "en", 1],
    ]
    assert "2 rows say 'C++' for their language: code." in caplog.text
    monkeypatch.setattr(ingest, "_LABELS", 1)
    told = run(tmp_path / "few", f"{tmp_path}/a.jsonl")
    assert told["languages"] == [["C++", "code", 2]]
    lines = [{"text": "x", "lang": f"no name {n}"} for n in range(9)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(lines))
    monkeypatch.setattr(ingest, "_LABELS", 3)
    told = run(tmp_path / "many", f"{tmp_path}/a.jsonl")
    assert told["languages"][0] == ["others", "und", 6] and len(told["languages"]) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_field", ""),
        ("max_row_bytes", 0),
        ("shard_bytes", -1),
        ("max_bad_share", 1.5),
        ("min_bad_rows", -2),
    ],
)
def test_wrong_fields(field, value):
    IngestConfig().check()
    with pytest.raises(ValueError, match=rf"config\.ingest\.{field}={value} "):
        IngestConfig(**{field: value}).check()


def test_changed_files_are_read_again(given, tmp_path):
    out = tmp_path / "out"
    run(out, given)
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl([{"text": "short"}]))
    told = run(out, given, scratch="new")  # and shards that are no longer needed go
    assert told["shards"] == len(tables(out)) and rows(out)[0]["text"] == "short"


def test_the_embedded_corpus(tmp_path):
    told = run(tmp_path / "out", "embedded:30000", IngestConfig())
    expected = [(d.text, d.source) for d in embedded.corpus(30_000)]
    assert [(r["text"], r["source"]) for r in rows(tmp_path / "out")] == expected
    assert set(told["sources"]) == {source for _, source in expected}
    assert rows(tmp_path / "out")[0]["origin"] == "embedded:30000:1"


def test_source_files_are_code(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.py").write_text("print('hello')\n")
    (tmp_path / "in" / "b.md").write_text("Hello\n")
    run(tmp_path, str(tmp_path / "in"))
    assert [row["language"] for row in rows(tmp_path)] == ["code", "und"]
