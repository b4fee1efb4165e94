import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import corpus, decontaminate, engine, text
from baichuan_jax.data.prepare.decontaminate import DecontaminateConfig

FILLER = (
    "The harbour froze early that year, and the fishermen mended their nets indoors until March."
    " Nobody remembered a winter like it, although the priest kept a book in which he wrote down"
    " the weather of every day since he had come to the island as a young man."
)
MATH = (
    "Marta picks 14 baskets of plums on Monday and twice as many on Tuesday. If each basket holds"
    " 30 plums and she sells them for 2 dollars a dozen, how many dollars does she earn in all?"
)
STEPS = "On Tuesday she picks 14*2=28 baskets, so she has 42 baskets, 42*30=1260 plums. #### 210"
CHINESE = (
    "下列关于植物细胞在高浓度蔗糖溶液中发生质壁分离现象的叙述，正确的是哪一项？请结合实验说明理由"
)
OPTIONS = [
    "原生质层的伸缩性比细胞壁小",
    "细胞液的浓度小于外界溶液",
    "今宵酒醒何处杨柳岸晓风残月",
    "水",
]
PASSAGE = (
    "昔者有人，家在河之南，欲渡而无舟，乃伐木为筏，三日而成，"
    "载其妻子以行，中流而筏解，幸遇渔者救之。"
)
LICENCE = (
    "This work is licensed under the Creative Commons Attribution Share Alike 4.0 International"
    " License, and you may copy, share and adapt it for any purpose, even commercially."
)


def items(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def lines(*values):
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values)


def found(against, *documents, **settings):
    """The items, as (file, number) pairs, that each of the documents holds."""
    index = decontaminate.build(DecontaminateConfig(against=against, **settings))
    row, item, _ = decontaminate.held_items(text.join(documents), index)
    held = [[] for _ in documents]
    for r, i in zip(row.tolist(), item.tolist(), strict=True):
        name = index.files[index.items["file"][i]].rpartition("/")[2]
        held[r].append((name, int(index.items["number"][i])))
    return held


@pytest.fixture
def math(tmp_path):
    return items(tmp_path / "math.jsonl", lines({"question": MATH, "answer": STEPS}, {"id": 3}))


def test_a_copy_is_found_wherever_it_stands(math):
    held = [("math.jsonl", 1)]
    spaced = MATH.upper().replace(", ", " ,\n").replace(" ", "  ")
    documents = [MATH, FILLER + MATH, f"{FILLER}\n{spaced}\n{FILLER}", FILLER, "", "plums"]
    assert found(math, *documents) == [held, held, held, [], [], []]


def test_a_copy_with_some_words_changed_is_found_and_a_part_is_not(math):
    words = MATH.split()
    changed = " ".join([*words[:17], "PEARS", *words[18:]])
    torn = " ".join(w for n, word in enumerate(words) for w in [word, "um"][: 2 - (n % 6 > 0)])
    half = " ".join(words[: len(words) // 2])
    assert found(math, changed, torn, half, f"{half} {FILLER}") == [[("math.jsonl", 1)], [], [], []]
    assert found(math, half, coverage=0.4) == [[("math.jsonl", 1)]]


def test_multiple_choice(tmp_path):
    path = items(tmp_path / "exam.csv", "")
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "question", "A", "B", "C", "D", "answer"])
        rows.writerow([0, CHINESE, *OPTIONS, "B"])
        rows.writerow([1, "Which gas,\nmost of all, do plants take in?", *"abcd", "A"])
    question = [("exam.csv", 2)]
    documents = {
        CHINESE: question,
        f"{FILLER}{CHINESE}A. {OPTIONS[0]} B. {OPTIONS[1]}": question,
        "，".join(OPTIONS[:2]): [],  # too little of the item
        "柳永：" + OPTIONS[2] + "。": [],
        "Which gas, most of all, do plants take in?": [],  # too short for one whole reason
        "": [],
    }
    assert found(path, *documents) == list(documents.values())
    # Options are of 39 and 36 bytes; the second is too short to be found by a part of it.
    first, second = OPTIONS[:2]
    for enough, held in ((36, [question, question, []]), (38, [question, [], []])):
        assert found(path, first[:-1] + first, second, second[:-1], enough_bytes=enough) == held


def test_a_source_is_no_copy_because_an_item_quotes_it(tmp_path):
    question = (
        f"古人云：“{PASSAGE}”这则寓言所说明的哲学道理，与下列哪一项最为接近？试加以分析，并联系生活中"
        "的实例说明。要求观点明确，论述清楚，字数不少于二百字，不得抄袭材料中的原文，否则酌情扣分。"
    )
    path = items(tmp_path / "essay.json", [{"question": question}])
    assert found(path, PASSAGE * 2, question + PASSAGE) == [[], [("essay.json", 1)]]


def test_a_long_passage_and_its_questions(tmp_path):
    passage = " ".join(f"In year {n} the river {n % 7} rose by {n % 13} feet." for n in range(99))
    item = {"context": passage, "qas": [{"question": MATH, "answers": {"text": ["210", STEPS]}}]}
    path = items(tmp_path / "reading.json", {"version": "2", "data": [{"paragraphs": [item]}] * 2})
    held = [("reading.json", 1), ("reading.json", 2)]
    assert found(path, passage, passage[:1500], MATH, STEPS) == [held, [], held, []]


def test_what_most_items_share_is_not_looked_for(tmp_path):
    many = [{"q": f"{MATH} {n} {n + 1} {FILLER}", "licence": LICENCE} for n in range(30)]
    path = items(tmp_path / "many.jsonl", lines(*many))
    assert found(path, LICENCE, many[7]["q"]) == [[], [("many.jsonl", n + 1) for n in range(30)]]
    few = items(tmp_path / "few.jsonl", lines(*many[:5]))
    assert len(found(few, LICENCE)[0]) == 5


FORMS = {
    "a.jsonl": lines({"q": MATH}, {"q": STEPS}),
    "b.jsonl.gz": lines(MATH, [MATH, 1, None]) + "\n\n",
    "c.json": [{"q": MATH}, {"nested": {"deep": [[MATH]]}}],
    "d.json": {"canary": "do not train", "examples": [{"input": MATH, "target": "A"}, {"x": 1}]},
    "e.json": {"7": {"q": STEPS}, "8": {"q": MATH}},
    "f.json": {"q": MATH, "choices": {"text": ["a", "b"]}},
    "g.json": "\ufeff" + lines({"q": MATH}, {"q": STEPS}),  # JSONL by another name
    "h.json.gz": {"train": [{"q": STEPS}], "test": [{"q": MATH}]},
    "i.csv": f'"{MATH}",a,b\n"{STEPS}",c,d\n',
    "j.csv.gz": f'question\r\n"{MATH}"\r\n',
}
PLACES = [[1], [1, 2], [1, 2], [1], [2], [1], [1], [2], [1], [2]]
ITEMS = [2, 2, 2, 3, 2, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "places", "count"), list(zip(FORMS, PLACES, ITEMS, strict=True)), ids=list(FORMS)
)
def test_forms_of_files(tmp_path, name, places, count):
    path = items(tmp_path / name, FORMS[name])
    index = decontaminate.build(DecontaminateConfig(against=path))
    assert len(index.items) == count
    assert found(path, f"{FILLER} {MATH}") == [[(name, place) for place in places]]


BAD_FILES = {
    "a.jsonl": (b'{"q": "a"}\n{"q": \n', r"a.jsonl, row 2: not valid JSON"),
    "b.json": (b'[{"q": "a"},\n', r"b.json: not valid JSON"),
    "c.json": (b"", r"c.json: not valid JSON"),
    "d.json": (b"[" * 200_000, r"d.json: not valid JSON"),
    "e.csv": (b"a,\xff", r"e.csv: byte 3 of it is not UTF-8"),
    "f.csv.gz": (gzip.compress(b"a,b" * 999)[:-9], r"f.csv.gz: not readable"),
    "g.jsonl.gz": (b"no gzip", r"g.jsonl.gz: not readable"),
    "i.jsonl": (b'["a"]\n["\\ud800"]', r"i.jsonl, item 2: holds a lone surrogate"),
    "h.parquet": (b"", r"h.parquet: its ending is none of .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        decontaminate.build(DecontaminateConfig(against=str(tmp_path / name)))


def test_nothing_to_take_out(tmp_path):
    with pytest.raises(ValueError, match="No evaluation set is named"):
        decontaminate.fingerprint(DecontaminateConfig(against=" ,"))
    (tmp_path / "notes.txt").write_text("a")
    for missing in ("", "/*.json", "/sub", "/sub.json", "/notes.txt"):
        with pytest.raises(ValueError, match=str(tmp_path)):
            decontaminate.fingerprint(DecontaminateConfig(against=f"{tmp_path}{missing}"))


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("short_ngram", 0, "positive and below config.decontaminate.ngram=13"),
        ("short_ngram", 13, "positive and below config.decontaminate.ngram=13"),
        ("coverage", 0, r"in \(0, 1\]"),
        ("coverage", 70, r"in \(0, 1\]"),
        ("enough_bytes", 0, "1 or more"),
    ],
)
def test_wrong_settings_are_named(field, value, right):
    with pytest.raises(
        ValueError, match=rf"config\.decontaminate\.{field}={value} must be {right}"
    ):
        DecontaminateConfig(**{field: value}).check()


def test_sets_are_read_before_any_work(tmp_path, math):
    DecontaminateConfig().check()
    DecontaminateConfig(against=math).check()
    for name, (content, message) in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"config\.decontaminate\.against=.*{message}"):
            DecontaminateConfig(against=f"{math},{tmp_path / name}").check()


def test_names_of_sets(tmp_path, caplog):
    for name in ["mmlu/test/law.csv", "mmlu/val/law.csv", "gsm.jsonl", "more/x.json", "more/y.txt"]:
        items(tmp_path / name, [] if name.endswith("json") else "1\n")
    against = f"{tmp_path}/mmlu, {tmp_path}/gsm.jsonl,mine={tmp_path}/more,{tmp_path}/g*.jsonl"
    index = decontaminate.build(DecontaminateConfig(against=against))
    assert index.sets.tolist() == ["gsm", "mine", "mmlu/test", "mmlu/val", tmp_path.name]
    assert "left out 1 files" in caplog.text


def write(folder, shards):
    made = corpus.Corpus(str(folder))
    for shard, texts in enumerate(shards):
        columns = {"text": texts} | {name: ["x"] * len(texts) for name in ("source", "language")}
        table = pa.table(columns | {"origin": [None] * len(texts)}, schema=corpus.DOCUMENT_SCHEMA)
        corpus.write_parquet(made.document_path(shard), table)
        reasons = pa.table({"reason": pa.array([None] * len(texts), pa.string())})
        made.write("before", shard, np.arange(len(texts)), reasons)
    return made.after("before")


@pytest.mark.parametrize("workers", [1, 2])
def test_stage(tmp_path, math, workers):
    exam = items(tmp_path / "exam.json", [{"q": CHINESE}, {"q": PASSAGE}, {"q": "short"}])
    long_ = f"{MATH} {CHINESE} {PASSAGE} {FILLER}"
    made = write(tmp_path, [[FILLER, f"{FILLER} {MATH}", ""], [], [long_, CHINESE, PASSAGE[:20]]])
    config = DecontaminateConfig(against=f"{math},exam={exam}")
    told = decontaminate.run(made, "clean", engine.Local(tmp_path / "work", workers), config)
    assert told == {
        "sets": {
            "exam": {"items": 3, "long_enough": 2, "seen": 2, "documents": 2},
            "math": {"items": 2, "long_enough": 1, "seen": 1, "documents": 2},
        }
    }
    after = made.after("clean")
    columns = ("reason", "evaluation_items", "evaluation_item")
    rows = [
        list(zip(*(after.read_all(shard, *columns)[c].to_pylist() for c in columns), strict=True))
        for shard in range(3)
    ]
    clean = (None, 0, None)
    assert rows == [
        [clean, ("evaluation text: math", 1, f"{math}, item 1"), clean],
        [],
        [
            # It holds three, and most bytes of this one.
            ("evaluation text: math", 3, f"{math}, item 1"),
            ("evaluation text: exam", 1, f"{exam}, item 1"),
            clean,
        ],
    ]
    # Another content of the same file is another index.
    before = decontaminate.fingerprint(config)
    items(tmp_path / "exam.json", [{"q": CHINESE}])
    assert decontaminate.fingerprint(config) != before
    told = decontaminate.run(made, "clean", engine.Local(tmp_path / "again", workers), config)
    assert told["sets"]["exam"] == {"items": 1, "long_enough": 1, "seen": 1, "documents": 2}
