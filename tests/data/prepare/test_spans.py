import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import corpus, engine, spans, text

NOTICE = (
    "本文由自由软件社区翻译并维护，转载时请保留全部署名信息，并注明原文出处以及译者姓名，"
    "谢谢各位读者的配合与支持。"
)
THREE = (
    "The valley was quiet that morning, and nobody had yet lit a fire in the village.",
    "Far below, the river carried the last of the ice towards the mill and the bridge.",
    "An old man stood at the gate and counted the carts that came down from the pass.",
)
POEM = "锦瑟无端五十弦，一弦一柱思华年。\n庄生晓梦迷蝴蝶，望帝春心托杜鹃。\n"


def own(*words):
    """Some sentences that no other document has."""
    return " ".join(f"About {word} there is a thing or two that nobody said." for word in words)


def write(folder, shards, language="en"):
    made = corpus.Corpus(str(folder))
    for shard, texts in enumerate(shards):
        columns = {
            "text": texts,
            "source": ["s"] * len(texts),
            "language": [language] * len(texts),
            "origin": [None] * len(texts),
        }
        table = pa.table(columns, schema=corpus.DOCUMENT_SCHEMA)
        corpus.write_parquet(made.document_path(shard), table)
    return made


def deduplicate(folder, shards, language="en", workers=1, **settings):
    """The texts after the stage, None where the document is dropped; shares; the report."""
    made = write(folder, shards, language)
    config = dataclasses.replace(spans.SpansConfig(), **settings)
    told = spans.run(made, "spans", engine.Local(folder / "work", workers), config)
    texts, shares = [], []
    for shard in range(len(shards)):
        table = made.after("spans").read_all(shard, "text", "reason", "repeated_share").to_pydict()
        assert set(table["reason"]) <= {None, spans.REASON}
        pairs = zip(table["text"], table["reason"], strict=True)
        texts += [None if reason else content for content, reason in pairs]
        shares += table["repeated_share"]
    return texts, shares, told


def test_a_repeated_paragraph_stays_in_the_first_document_only(tmp_path):
    first = f"# 甲\n\n{own('tea')}\n\n{NOTICE}\n\n{own('rice')}\n"
    # Spacing, punctuation and width do not matter.
    other = NOTICE.replace("，", " , ").replace("。", "!")
    second = f"# 乙\n\n{own('salt', 'oil')}\n\n{other}\n\n{own('wine')}\n"
    third = f"{own('silk', 'jade')}\n{NOTICE}"
    texts, shares, told = deduplicate(tmp_path, [[first], [second, third]])
    assert texts == [
        first,
        f"# 乙\n\n{own('salt', 'oil')}\n\n{own('wine')}\n",
        f"{own('silk', 'jade')}\n",
    ]
    assert shares == [0, 0, 0]  # it is unique now
    assert told["largest"] == [{"documents": 3, "text": NOTICE}]
    assert told["characters"] == len(first + second + third)
    assert told["cut"] == len(other) + 2 + len(NOTICE)
    assert told["repeated"] == told["cut"] + len(NOTICE) + 2


def test_short_lines_stay(tmp_path):
    lines = [
        "## 参考资料\n\n",
        "import numpy as np\n",
        "    return self.forward(inputs)\n",
        "何当共剪西窗烛，却话巴山夜雨时。\n",
        "It was the best of times.\n",
    ]
    documents = [own(f"a{n}") + "\n" + line + own(f"b{n}") for n, line in enumerate(lines * 2)]
    texts, shares, told = deduplicate(tmp_path, [documents])
    assert texts == documents
    assert told["cut"] == 0
    # So they stay repeated, but for those that say next to nothing.
    assert [share > 0 for share in shares] == [False, True, True, True, True] * 2


def test_three_sentences_go_together_and_two_do_not(tmp_path):
    first = f"{own('one')} {' '.join(THREE)} {own('two')}"
    two = f"{own('three')} {THREE[0]} {THREE[1]} {own('four', 'five')}"
    # The same three, over the end of a paragraph.
    three = f"{own('six')} {THREE[0]}\n\n{THREE[1]} {THREE[2]} {own('seven', 'eight')}"
    turned = f"{own('nine')} {THREE[1]} {THREE[0]} {THREE[2]} {own('ten')}"
    texts, shares, _ = deduplicate(tmp_path, [[first, two, three, turned]])
    assert texts == [first, two, f"{own('six')} \n\n{own('seven', 'eight')}", turned]
    assert shares == [0, 0, 0, 0]


def test_each_rule_can_be_switched_off(tmp_path):
    first = f"{own('one')}\n{NOTICE}\n{own('two')} {' '.join(THREE)} {own('three')}"
    second = f"{own('four')}\n{NOTICE}\n{own('five')} {' '.join(THREE)} {own('six')}"
    expected = {
        (True, True): f"{own('four')}\n{own('five')} {own('six')}",
        (True, False): second.replace(NOTICE + "\n", ""),
        (False, True): second.replace(" ".join(THREE) + " ", ""),
        (False, False): second,
    }
    for number, ((paragraphs, sentences), left) in enumerate(expected.items()):
        switches = {"paragraphs": paragraphs, "sentences": sentences}
        texts, _, _ = deduplicate(tmp_path / str(number), [[first, second]], **switches)
        assert texts == [first, left]


def test_repetition_inside_a_document_is_left_alone(tmp_path):
    document = f"{NOTICE}\n{own('one')}\n{NOTICE}\n{NOTICE}\n"
    texts, shares, told = deduplicate(tmp_path, [[document], [own("two")]])
    assert texts == [document, own("two")]
    assert shares == [0, 0] and told["repeated"] == 0


def test_a_document_that_would_lose_nearly_all_is_dropped(tmp_path):
    body = "\n".join(own(f"{word} alone") + own(word) for word in ["one", "two", "three", "four"])
    much = f"{body}\n{own('mine')}\n"
    some = f"{body}\n{own('a', 'b', 'c', 'd', 'e')}\n"
    texts, shares, _ = deduplicate(tmp_path, [[body, much, some, body + " "]])
    assert texts == [body, None, f"{own('a', 'b', 'c', 'd', 'e')}\n", None]
    assert shares[0] == shares[2] == 0


ROW = "| `{}` | 表示在不更改变量的内存地址的情况下直接修改变量的值，对网络训练结果影响不大。 |\n"
CALL = "result_{0} = compute(inputs, {0}, mode='exact', tolerance=1e-{0}, iterations=1000)\n"
TERM = "&= \\sum_{{i=1}}^n \\langle \\mathbf{{v}}_i, \\mathbf{{w}}_{0} \\rangle + x_{0} \\\\\n"


@pytest.mark.parametrize(
    ("begin", "line", "end"),
    [
        ("| 参数 | 备注 |\n| --- | --- |\n", ROW, ""),
        ("  ```python\n", CALL, "  ```\n"),
        ("$$\\begin{aligned}\n", TERM, "\\end{aligned}$$\n"),
    ],
    ids=["table", "code", "formula"],
)
def test_blocks_that_are_no_prose_go_as_a_whole(tmp_path, begin, line, end):
    def document(word, lines, before):
        block = begin + "".join(map(line.format, lines)) + end
        return f"{own(word)}\n\n{before}\n\n{block}\n{own(word + 's', word + 'es')}\n"

    first = document("cat", "abcd", NOTICE)
    part, only, all_ = (
        document("dog", "abxcd", NOTICE),
        document("cow", "abcd", "Mine."),
        document("owl", "abcd", NOTICE),
    )
    settings = {"paragraph_bytes": 30, "window_bytes": 90}
    texts, _, _ = deduplicate(tmp_path, [[first, part, only, all_]], **settings)
    assert texts[:3] == [first, part.replace(NOTICE + "\n\n", ""), only]
    assert texts[3] == f"{own('owl')}\n\n{own('owls', 'owles')}\n"


def test_stubs_and_separators_go_with_their_line(tmp_path):
    entry = f"{THREE[0]}\n   ***\n   {THREE[1]} {THREE[2]}\n\n"
    first = f"{own('cat')}\n\n6. {entry}{own('cats', 'kitten')}"
    second = f"{own('dog')}\n\n***\n7. {entry}{own('dogs', 'puppy')}"
    # As whole paragraphs they would be too short to go.
    texts, _, _ = deduplicate(tmp_path, [[first, second]], paragraph_bytes=1000)
    assert texts == [first, f"{own('dog')}\n\n***\n{own('dogs', 'puppy')}"]


SHORT = {
    **dict.fromkeys(["孕妇及婴儿禁用本品。", "No.", "42 people.", "B2.", "1234."], True),
    **dict.fromkeys(["---", "7.", "b."], False),
}


@pytest.mark.parametrize(("short", "stays"), SHORT.items())
def test_a_short_rest_that_says_something_stays(tmp_path, short, stays):
    """It stands nowhere else; what it follows, or begins with, does."""
    three = " ".join(THREE)
    before, after = f"{own('dog')}\n", own("dogs", "puppy", "bone")
    first = f"{own('cat')}\n{three}\n{own('cats', 'kitten')}"
    if short != "---":  # or it would be of the first sentence
        texts, _, _ = deduplicate(tmp_path / "a", [[first, f"{before}{short} {three}\n{after}"]])
        assert texts == [first, f"{before}{short} \n{after}" if stays else before + after]
    texts, _, _ = deduplicate(tmp_path / "b", [[first, f"{before}{three} {short}\n{after}"]])
    # A number is a label only where a line begins.
    assert texts == [first, before + after if short == "---" else f"{before}{short}\n{after}"]


def test_a_short_rest_goes_if_an_earlier_document_has_it(tmp_path):
    long = "".join(f"山中的{c}树在春天开出白色的花朵，到了秋天便结满红色的果实。" for c in "桃李")
    line = "旧时的人们上山采集果实。然后一起背回村里晒干。很甜。"  # too short to go by itself
    documents = [f"{own(f'{w}s', f'{w}es')}\n{long}\n{line}\n{own(w)}" for w in ("cat", "dog")]
    texts, _, _ = deduplicate(tmp_path, [documents])
    assert texts == [documents[0], f"{own('dogs', 'doges')}\n{own('dog')}"]
    other = documents[1].replace("很甜", "很酸")
    texts, _, _ = deduplicate(tmp_path / "other", [[documents[0], other]])
    assert texts == [documents[0], f"{own('dogs', 'doges')}\n很酸。\n{own('dog')}"]


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("sentence_window", 0, "1 or more"),
        ("min_characters", -1, "0 or more"),
        ("paragraph_bytes", -1, "0 or more"),
        ("window_bytes", -1, "0 or more"),
        ("largest", -1, "0 or more"),
        ("max_loss", 70, r"in \[0, 1\]"),
        ("max_loss", float("nan"), r"in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_named(field, value, right):
    with pytest.raises(ValueError, match=rf"config\.spans\.{field}={value} must be {right}"):
        spans.SpansConfig(**{field: value}).check()
    spans.SpansConfig().check()


def test_code_takes_no_part_unless_told(tmp_path):
    documents = [f"# {own(word)}\n{NOTICE}\n# {own(word, word)}" for word in ("one", "two")]
    texts, shares, told = deduplicate(tmp_path / "no", [documents], language="code")
    assert texts == documents and shares == [None, None] and told["characters"] == 0
    texts, _, _ = deduplicate(tmp_path / "yes", [documents], language="code", code=True)
    assert texts[0] == documents[0] and NOTICE not in texts[1]


@pytest.mark.parametrize("seed", range(4))
def test_beside_a_loop_over_strings(tmp_path, seed):
    """Random documents of few sentences, and the rules once more in plain Python."""
    rng = np.random.default_rng(seed)
    words = [f"Sentence number {n} is of some length and says what it says." for n in range(30)]

    def line():
        return " ".join(words[rng.integers(30)] for _ in range(rng.integers(1, 6)))

    documents = ["\n".join(line() for _ in range(rng.integers(0, 7))) for _ in range(40)]
    settings = {"paragraph_bytes": 100, "window_bytes": 120, "sentence_window": 2, "max_loss": 1.0}
    shards = [documents[:9], [], documents[9:10], documents[10:]]
    texts, shares, _ = deduplicate(tmp_path, shards, **settings)

    def content(string):
        return "".join(c for c in string.lower() if c.isalnum())

    paragraphs, windows = [], []
    for document in documents:
        lines = [[f"{s}." for s in part.split(". ")] for part in document.split("\n")]
        lines = [[s.replace("..", ".") for s in part if s != "."] for part in lines]
        flat = [content(s) for part in lines for s in part]
        paragraphs.append([tuple(content(s) for s in part) for part in lines if part])
        windows.append([(flat[i], flat[i + 1]) for i in range(len(flat) - 1)])
    for number in range(40):
        lengths = [len(p) for p in paragraphs[number]]
        line_of = np.repeat(np.arange(len(lengths)), lengths)
        flat = [s for p in paragraphs[number] for s in p]
        again, drop, long = np.zeros((3, len(flat)), bool)
        for kind, least in ((paragraphs, 100), (windows, 120)):
            elsewhere = {u for n in range(40) if n != number for u in kind[n]}
            earlier = {u for n in range(number) for u in kind[n]}
            for place, unit in enumerate(kind[number]):
                inside = line_of == place if kind is paragraphs else np.zeros(len(flat), bool)
                if kind is windows:
                    inside[place : place + 2] = True
                size = sum(map(len, unit))
                stays = kind is paragraphs and size < least
                again |= inside & (unit in elsewhere) & stays
                long |= inside & (unit in elsewhere) & (size >= least)
                drop |= inside & (unit in earlier) & (size >= least)
        left = "".join(s for s, gone in zip(flat, drop, strict=True) if not gone)
        assert content(texts[number]) == left
        sizes = np.array([len(s) for s in flat])
        share = sizes[again & ~long & ~drop].sum() / max(1, sizes[~drop].sum())
        assert shares[number] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_goes_that_stands_nowhere_else(tmp_path, seed):
    """Of random documents of long and short sentences, many of them unique."""
    rng = np.random.default_rng(seed)
    pool = [f"This is sentence {n}, and it says what it has to say." for n in range(6)]
    pool += ["Not so.", "2.", "Yes!", "***", "好。"]

    def line(number):
        chosen = [pool[i] for i in rng.integers(len(pool), size=rng.integers(1, 8))]
        if rng.random() < 0.3:
            chosen.insert(rng.integers(len(chosen) + 1), f"Own{number}.")
        return " ".join(chosen)

    documents = ["\n".join(line(f"{n}x{m}") for m in range(rng.integers(1, 9))) for n in range(60)]
    settings = {"paragraph_bytes": 60, "window_bytes": 60, "max_loss": 1.0}
    texts, _, told = deduplicate(tmp_path, [documents], **settings)
    assert told["cut"] > 1000

    def said(string):
        return set(text.sentences(text.join([string])).hashes.tolist())

    earlier = said("2.") | said("***")  # which say nothing
    for before, after in zip(documents, texts, strict=True):
        assert said(before) - said(after) <= earlier
        earlier |= said(before)


def test_the_same_with_other_shards_and_workers(tmp_path):
    documents = [
        f"{own(f'a{n}', f'b{n}', f'c{n}')}\n{NOTICE}\n{' '.join(THREE)} {own(f'd{n % 3}')}\n{POEM}"
        for n in range(8)
    ]
    cuts = {"one": [documents], "four": [documents[:1], documents[1:3], [], documents[3:]]}
    results = {}
    for name, shards in cuts.items():
        results[name] = deduplicate(tmp_path / name, shards)
    results["two workers"] = deduplicate(tmp_path / "w", cuts["four"], workers=2)
    assert results["one"] == results["four"] == results["two workers"]
    assert results["one"][0][0] == documents[0] and NOTICE not in "".join(results["one"][0][1:])
    assert "".join(results["one"][0]).count(POEM) == 8


def test_many_spans_move_in_parts(tmp_path, monkeypatch):
    documents = [f"{own(f'c{n}')}\n{NOTICE}\n{own(f'd{n}')}" for n in range(6)]
    expected = deduplicate(tmp_path / "once", [documents])
    monkeypatch.setattr(spans, "_FLUSH", 1)
    monkeypatch.setattr(text, "batches", lambda t, _batches=text.batches: _batches(t, 100))
    assert deduplicate(tmp_path / "parts", [documents]) == expected
    assert json.dumps(expected[2])
