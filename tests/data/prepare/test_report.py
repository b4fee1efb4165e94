"""The report tells what the records and the attribute tables hold, and nothing else."""

import itertools
import json
import re

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
from etils import epath

from baichuan_jax.data.prepare import corpus, examples, markdown, plots
from baichuan_jax.data.prepare.funnel import Funnel, largest, paper_left
from baichuan_jax.data.prepare.report import report
from baichuan_jax.data.prepare.survey import EXAMPLES, Scores, documents, survey

SENTENCE = "版权所有，转载必究。"  # 30 bytes


def record(name, sets, reasons=(), /, seconds=2.0, **told):
    counts = {"sets": [list(s) for s in sets], "reasons": [list(r) for r in reasons]}
    return {"name": name, "fingerprint": "", "seconds": seconds, "told": told, "counts": counts}


RECORDS = [
    record("ingest", [("wiki", "und", 60, 6_000), ("web", "und", 40, 4_000)], bad_rows=4),
    record(
        "language",
        [("wiki", "zh", 50, 5_000), ("wiki", "en", 10, 1_000), ("web", "en", 38, 3_900)],
        [("language: fr", 2, 100)],
    ),
    record(
        "exact",
        [("wiki", "zh", 45, 4_500), ("wiki", "en", 10, 1_000), ("web", "en", 20, 2_000)],
        [("exact duplicate", 23, 2_400)],
        largest=[{"document": 0, "copies": 5}],
        groups=2,
    ),
    record(
        "spans",
        [("wiki", "zh", 44, 4_000), ("wiki", "en", 10, 1_000), ("web", "en", 20, 1_750)],
        [("only repeated text", 1, 100)],
    ),
]


@pytest.fixture
def made(tmp_path):
    """Two shards of 40 documents: every third is dropped, every second of the others cut."""
    view = corpus.Corpus(str(tmp_path))
    for shard in range(2):
        texts = [f"第{n}篇 `a|b` <b>.{SENTENCE}尾{n}。" for n in range(40)]
        origins = [f"f{shard}.jsonl:{n}" for n in range(40)]
        columns = [texts, ["wiki"] * 40, ["und"] * 40, origins]
        table = pa.table(columns, schema=corpus.DOCUMENT_SCHEMA)
        corpus.write_parquet(view.document_path(shard), table)
        rows = np.arange(40)
        none = pa.nulls(40, pa.string())
        language = {"reason": none, "language": ["zh"] * 10 + ["en"] * 20 + ["fr"] * 10}
        view.write("language", shard, rows, pa.table(language))
        reasons = np.where(rows % 3 == 0, "exact duplicate", None)
        exact = {"reason": pa.array(reasons, pa.string()), "share": np.float32(rows / 40)}
        view.write("exact", shard, rows, pa.table(exact))
        kept = rows[rows % 3 > 0]
        cut = [text.replace(SENTENCE, "") if n % 2 else None for n, text in enumerate(texts)]
        spans = {
            "text": pa.array(cut, pa.string()).take(pa.array(kept)),
            "repeated_share": np.full(len(kept), 0.25, np.float32),
            "counted": pa.array(kept, pa.uint32()),
        }
        view.write("spans", shard, kept, pa.table(spans))
    return view.after("language").after("exact").after("spans")


def table_under(text, heading):
    """The rows below the header of the first table under a heading, by their first cell."""
    section = text.split(f"# {heading}\n", 1)[1]
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), section.split("\n"))
    rows = [line.strip("| ") for line in itertools.takewhile(bool, lines)]
    cells = [re.split(r" *\| *", row) for row in rows]
    return {row[0]: row[1:] for row in cells[2:]}


def list_under(text, heading):
    section = text.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    return [line for line in section.split("\n") if line.lstrip().startswith("-")]


@pytest.fixture
def text(made, tmp_path):
    rejects = [("a.jsonl", "not JSON")] * 3 + [("b|c.jsonl", "empty file")]
    lines = [json.dumps({"path": path, "row": 1, "reason": why}) for path, why in rejects]
    (tmp_path / "rejects.jsonl").write_text("\n".join(lines) + "\n")
    path = report(tmp_path, made, RECORDS)
    assert path == epath.Path(tmp_path) / "report.md"
    return path.read_text()


def test_the_funnel_beside_the_papers(text):
    assert "100 documents of 10.00 kB came in; 74 of 6.75 kB are left, 67.50% of the text" in text
    assert "4 rows could not be read." in text
    assert table_under(text, "The funnel") == {
        "raw": ["100", "10.00", "100.00", "", "100.00"],
        "language": ["98", "9.90", "99.00", "1.00"],
        "exact": ["75", "7.50", "75.00", "24.00", "70.11", "29.89"],
        "spans": ["74", "6.75", "67.50", "7.50", "50.81", "14.47"],
    }
    assert paper_left()["documents"] == 31.68


def test_the_funnel_by_language_and_source(text):
    # A language is first known after the stage of that name: 100% is what it had then.
    assert table_under(text, "By language") == {
        "raw": ["100", "10.00", "100.00", "0", "0.00", "0.00", "0", "0.00", "0.00"],
        "language": ["0", "0.00", "0.00", "50", "5.00", "100.00", "48", "4.90", "100.00"],
        "exact": ["0", "0.00", "0.00", "45", "4.50", "90.00", "30", "3.00", "61.22"],
        "spans": ["0", "0.00", "0.00", "44", "4.00", "80.00", "30", "2.75", "56.12"],
    }
    spans = ["54", "5.00", "83.33", "20", "1.75", "43.75"]
    assert table_under(text, "By source")["spans"] == spans


def test_many_sources_are_summed_up():
    sets = [(f"s{n}", "en", 1, 10 * n) for n in range(30)]
    funnel = Funnel([record("ingest", sets), record("exact", sets[10:])])
    by = largest(funnel, 0, 24)
    assert funnel.sizes("ingest", by)["other"] == (6, 10 * (0 + 1 + 2 + 3 + 4 + 5))
    assert funnel.sizes("exact", by)["s29"] == (1, 290)
    assert "s9" not in funnel.sizes("exact", by)


def test_what_was_dropped_or_cut(text):
    section = text.split("## What was dropped, and why")[1].split("Examples of each")[0]
    assert [line.strip("| ") for line in section.strip().split("\n")[2:]] == [
        "language | language: fr | 2 | 0.10 | 1.00",
        "exact | exact duplicate | 23 | 2.40 | 24.00",
        "spans | only repeated text | 1 | 0.10 | 1.00",
        "spans | (edited in documents that stay) |  | 0.65 | 6.50",
    ]


def test_examples_of_what_was_dropped_or_cut(text, made):
    dropped = list_under(text, "exact: exact duplicate")
    assert len(dropped) == EXAMPLES == len(set(dropped))
    rows = [re.match(r"- wiki, `f([01])\.jsonl:(\d+)`: ", line).groups() for line in dropped]
    assert all(int(row) % 3 == 0 for _, row in rows) and len({shard for shard, _ in rows}) == 2
    assert dropped[0].endswith(f": ``第{rows[0][1]}篇 `a|b` <b>.{SENTENCE}尾{rows[0][1]}。``")
    edited = list_under(text, "spans: cut from documents that stay")
    assert len(edited) == EXAMPLES
    assert all(f"<b>.[-{SENTENCE}-]尾" in line for line in edited)


def test_examples_depend_on_the_seed_only(made):
    first, again, other = (survey(made, ["zh"], seed) for seed in (0, 0, 1))
    assert first.dropped == again.dropped and first.edited == again.edited
    key = ("exact", "exact duplicate")
    assert set(first.dropped[key]) != set(other.dropped[key])


def test_the_largest_clusters(made, tmp_path):
    told = {
        "exact": {"largest": [{"document": (1 << 32) + 3, "copies": 1234}]},
        "spans": {"largest": [{"documents": 40, "text": "a\n`b`"}]},
    }
    lines = examples.clusters(made, told)
    assert "- 1,234 copies:" in lines
    assert any(line.startswith("  - wiki, `f1.jsonl:3`: ``第3篇") for line in lines)
    assert "- 40 documents: `` a `b` ``" in lines
    near = {"documents": {"largest": [{"kept": 5, "size": 3, "members": [7, 1 << 32]}]}}
    semantic = {
        "documents": 52, "clusters": 8, "dropped_at": {"0.03": 0.012, "0.1": 0.5},
        "largest": [{"documents": 9, "sources": {"wiki": 8, "web": 1}, "examples": [2]}],
    }  # fmt: skip
    for stage, later in (("documents", made), ("clusters", made.after("documents"))):
        for shard in range(2):
            later.write(stage, shard, np.zeros(0, np.uint32), pa.table({"reason": []}))
    view = made.after("documents").after("clusters")
    lines = examples.clusters(view, near | {"clusters": semantic})
    shown = re.findall(r"`(f\d\.jsonl:\d+)`", "".join(lines))
    assert shown == ["f0.jsonl:5", "f0.jsonl:7", "f1.jsonl:0", "f0.jsonl:2"]
    assert "- 9 documents (wiki 8, web 1):" in lines
    assert "1.20% at 0.03, 50.00% at 0.1" in "".join(lines)
    assert "[-" not in "".join(lines) and any("尾5。" in line for line in lines)


def test_documents_are_as_they_were_at_their_stage(made):
    kept, dropped = 1, 3  # the first is cut by spans, the other dropped before
    before = corpus.Corpus(made.directory, made.stages[:2])
    assert SENTENCE in documents(before, [kept])[kept]["text"]
    after = documents(made, [kept, dropped, (1 << 32) + 39])
    assert [SENTENCE in document["text"] for document in after.values()] == [False, True, True]
    assert after[(1 << 32) + 39]["origin"] == "f1.jsonl:39"


def test_few_row_groups_are_read(tmp_path):
    view = corpus.Corpus(str(tmp_path))
    size = 3 * (1 << 14)
    columns = [list(map(str, range(size))), ["s"] * size, ["en"] * size, ["o"] * size]
    table = pa.table(columns, schema=corpus.DOCUMENT_SCHEMA)
    corpus.write_parquet(view.document_path(0), table)
    wanted = [0, (1 << 14) - 1, 1 << 14, size - 1]
    assert [document["text"] for document in documents(view, wanted).values()] == [
        str(number) for number in wanted
    ]


CUTS = {
    ("一。二二。三。", "一。三。"): "一。[-二二。-]三。",
    ("abc。", "c。"): "[-ab-]c。",
    ("a\nb\n", "a\n"): "a\n[-b\n-]",
    (
        "甲。乙一。乙二。丙",
        "甲。乙二。丙",
    ): "甲。[-乙一。-]乙二。丙",  # not '甲。乙[-一。乙-]二。丙'
    ("x" * 90 + "。" + "y" * 200 + "。z", "x" * 90 + "。z"): (
        "x" * 39 + "。[-" + "y" * 160 + "…-]z"
    ),
}


@pytest.mark.parametrize("texts", CUTS, ids=range(len(CUTS)))
def test_what_an_edit_took_out(texts):
    assert examples.cut(*texts) == CUTS[texts]


def test_text_as_code_in_one_line():
    assert markdown.code("a\n\tb\x1b[31m\u202e c", 20) == "`a b [31m c`"
    assert markdown.code("`a``", 20) == "``` `a`` ```"
    assert markdown.code("a" * 30, 20) == f"`{'a' * 20}…`"
    assert markdown.code(" " * 300 + "b", 20) == "` … `".replace(" … ", "…")
    assert markdown.table(("a|b", "n"), [("x\ny", "1")]) == [
        "| a\\|b | n |", "| --- | ---: |", "| x y | 1 |"
    ]  # fmt: skip


def test_histograms_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    values[:4] = [np.nan, np.inf, 0, -0.0]
    groups, dropped = np.arange(20_000) % 2, values > 1.5
    scores = Scores(np.zeros((3, 1 << 16), np.int64))
    for part in np.split(np.arange(20_000), 4):
        scores.add(values[part], groups[part], dropped[part])
    edges = np.array([0, 0.5, 1, 2, 4])  # those of bins too, so the counts are exact
    rows = [values[groups == 0], values[groups == 1], values[dropped]]
    expected = [np.histogram(row[np.isfinite(row)], edges)[0] for row in rows]
    assert scores.between(edges).tolist() == np.array(expected).tolist()
    edges = np.linspace(-3, 3, 20)  # and these are not
    expected = [np.histogram(row[np.isfinite(row)], edges)[0] for row in rows]
    assert np.abs(scores.between(edges) - expected).max() < 20
    finite = values[np.isfinite(values)]
    for share in (0, 0.05, 0.5, 0.95, 1):
        expected = np.quantile(finite, share)
        assert scores.quantile(share) == pytest.approx(expected, rel=0.01, abs=2e-4)


def test_a_histogram_shows_all_but_the_tails():
    values = np.concatenate([np.linspace(0.95, 0.99, 100), np.ones(900), [-7, 7]])
    scores = Scores(np.zeros((2, 1 << 16), np.int64))
    scores.add(values.astype(np.float32), np.zeros(1002, np.int64), values > 1)
    counts, edges = scores.histogram(outside=0.005, most=48)
    assert counts.sum() == pytest.approx(1000, abs=1) and counts[0, -1] == 900
    assert edges[0] == pytest.approx(0.95, abs=0.01) and edges[-1] == pytest.approx(1, abs=0.01)
    same = Scores(np.zeros((2, 1 << 16), np.int64))
    same.add(np.full(5, 0.25, np.float32), np.zeros(5, np.int64), np.zeros(5, bool))
    assert same.histogram(outside=0.001, most=48)[0].tolist() == [[5.0], [0.0]]


def test_scores_by_language(made, text):
    found = survey(made, ["zh", "en"])
    assert found.languages == ["zh", "en", "other"]
    share = found.scores["exact", "share"].counts.sum(axis=1)
    assert share.tolist() == [20, 40, 20, 28]  # by language, and what the stage dropped
    assert set(found.scores) == {("exact", "share"), ("spans", "repeated_share")}
    row = table_under(text, "Scores")["spans: repeated_share"]
    assert row == ["52", "0.25", "0.25", "0.25", "0.25", "0.25"]


def test_rejects_and_times(text):
    assert table_under(text, "Rows that could not be read") == {
        "not JSON": ["3"],
        "empty file": ["1"],
    }
    assert "| `a.jsonl` | 3 | not JSON |" in text and "`b\\|c.jsonl` | 1 | empty file" in text
    times = table_under(text, "Time")
    assert times["exact"] == ["2.0", "25.0", "0.0"] and times["all"][0] == "8.0"


def test_sampling_and_shards(made, tmp_path):
    sets = {
        "wiki.zh": {
            "documents": 1000, "kept": 900, "repeated": 90, "bytes": 4_000,
            "effective_bytes": 3_950, "scale": 0.75,
        }
    }  # fmt: skip
    part = {"documents": 990, "utf8_bytes": 0, "tokens": 123_456, "rows": 30, "padding": 0.0123}
    packed = {"sets": {"wiki.zh": {"train": part, "eval": part}}, "weights": {"wiki.zh": 5.0}}
    left = RECORDS[-1]["counts"]["sets"]
    records = [
        *RECORDS,
        record("tokens", left, documents=74, bytes=6_750, tokens=2_700),
        record("mixture", left, sets=sets, counts=[100, 810, 90]),
        record("pack", left, [("no text", 0, 0)], **packed),
    ]
    text = report(tmp_path, made, records).read_text()
    assert "They are 2,700 tokens of 2.50 bytes." in text and "no text" not in text
    expected = ["1,000", "900", "90", "4.00", "3.95", "0.75"]
    assert table_under(text, "Sampling")["wiki.zh"] == expected
    assert "| wiki.zh | train | 990 | 123,456 | 30 | 1.23 | 100.00 |" in text


def test_evaluation_sets_counts_and_classifiers(made, tmp_path):
    head = {"documents": [1_000, 2_000], "held_out": [90, 210], "accuracy": 0.987, "auc": 0.99}
    mmlu = {"items": 14_042, "long_enough": 9_000, "seen": 12, "documents": 34}
    records = [
        *RECORDS,
        record("privacy", RECORDS[-1]["counts"]["sets"], emails=1_500),
        record("decontaminate", RECORDS[-1]["counts"]["sets"], sets={"mmlu": mmlu}),
        record("quality", RECORDS[-1]["counts"]["sets"], all=head, fingerprint="f"),
    ]
    text = report(tmp_path, made, records).read_text()
    assert table_under(text, "Evaluation sets in the corpus") == {
        "mmlu": ["14,042", "9,000", "12", "34"]
    }
    assert "| privacy | emails | 1,500 |" in text
    assert "Nothing was removed by: privacy, decontaminate, quality." in text
    assert "| quality | all | 1,000 | 2,000 | 300 | 98.70 | 0.9900 |" in text


def bars(path, *colours):
    """Lengths of the bars of these colours in pixels, from the top: [colours, bars]."""
    image = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    image = image[:, : image.shape[1] * 4 // 5]  # right of it is the legend
    lengths = []
    for colour in colours:
        rows = (image == colour).all(axis=-1).sum(axis=1)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], rows > 0, [0]])))
        lengths.append([rows[start:end].max() for start, end in edges.reshape(-1, 2)])
    return np.array(lengths)


BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)


def test_the_bars_of_the_funnel_are_as_long_as_they_should_be(tmp_path):
    path = epath.Path(tmp_path) / "plots" / "funnel.png"
    kept = {
        "languages": {"zh": [80, 20], "en": [20, 20]},
        "sources": {"a": [60, 30], "b": [40, 10]},
    }
    plots.funnel(path, ["ingest", "exact"], kept, {"exact": 70})
    first, second = bars(path, BLUE, ORANGE)
    assert first / first[0] * 80 == pytest.approx([80, 20, 60, 30], abs=1)
    assert second / first[0] * 80 == pytest.approx([20, 20, 40, 10], abs=1)


def test_the_picture_of_the_funnel_is_by_language_and_by_source(made, tmp_path, monkeypatch):
    drawn, draw = [], plots.funnel
    monkeypatch.setattr(plots, "funnel", lambda *all: drawn.append(all) or draw(*all))
    many = [(f"s{n}", "zh", 1, 10 * n) for n in range(1, 9)]  # 360 bytes
    last = record("spans", many[:5])
    text = report(tmp_path, made, [record("ingest", many), *RECORDS[1:3], last]).read_text()
    [(path, stages, kept, paper)] = drawn
    assert path.exists() and "](plots/funnel.png)" in text and paper["spans"] == 50.81
    assert stages == ["ingest", "language", "exact", "spans"]
    assert list(kept) == ["by language", "by source"]
    assert kept["by language"]["zh"][0] == 100
    sources = kept["by source"]
    assert set(sources) == {"web", "wiki", "s8", "s7", "s6", "other"}
    assert sources["s8"] == pytest.approx([100 * 80 / 360, 0, 0, 0])
    assert sources["other"] == pytest.approx(
        [100 * (10 + 20 + 30 + 40 + 50) / 360, 0, 0, 100 * 150 / 360]
    )


def test_a_corpus_with_nothing_to_tell(tmp_path):
    view = corpus.Corpus(str(tmp_path))
    corpus.write_parquet(view.document_path(0), corpus.DOCUMENT_SCHEMA.empty_table())
    view.write("exact", 0, np.zeros(0, np.uint32), pa.table({"reason": pa.nulls(0, pa.string())}))
    records = [record("ingest", [], seconds=0), record("exact", [], seconds=0)]
    text = report(tmp_path, view.after("exact"), records).read_text()
    assert "0 documents" in text and "## Scores" not in text
    assert table_under(text, "Time")["exact"] == ["0.0", "0.0"]
