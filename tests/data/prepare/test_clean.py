"""For every rule a document that must go and its neighbour that must stay."""

import base64
import dataclasses
import gzip
import itertools
import json
import pathlib
import random

import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import clean, pieces, text
from baichuan_jax.data.prepare.clean import CleanConfig

ENGLISH = (
    "The harbour lay quiet in the early light, and the boats that had come in during the night"
    " were tied up along the wall.\nNobody was about yet. A man in a blue coat walked slowly to"
    " the end of the pier, looked at the water for a while, and went back to the inn where he had"
    " left his luggage.\n"
)
CHINESE = (
    "清晨的港口很安静，夜里回来的渔船都停靠在岸边。街上还没有人，只有一个穿蓝色大衣的男人慢慢走到码头的尽头，"
    "看了一会儿海水，又回到他放行李的旅店里去了。\n老板正在生火，问他要不要喝一碗热粥，他点了点头。\n"
)
POEMS = [
    "静夜思\n李白\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
    "登鹳雀楼\n白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。",
    "十六字令\n蔡伸\n天。\n休使圆蟾照客眠。\n人何在，桂影自婵娟。",
    "天净沙・秋思\n马致远\n枯藤老树昏鸦，小桥流水人家，古道西风瘦马。\n夕阳西下，断肠人在天涯。",
]
COUPLETS = (
    "云对雨，雪对风，晚照对晴空。来鸿对去燕，宿鸟对鸣虫。三尺剑，六钧弓，岭北对江东。人间清暑殿，天上广寒宫。"
    "两岸晓烟杨柳绿，一园春雨杏花红。两鬓风霜，途次早行之客；一蓑烟雨，溪边晚钓之翁。\n"
    "沿对革，异对同，白叟对黄童。江风对海雾，牧子对渔翁。颜巷陋，阮途穷，冀北对辽东。池中濯足水，门外打头风。"
    "梁帝讲经同泰寺，汉皇置酒未央宫。尘虑萦心，懒抚七弦绿绮；霜华满鬓，羞看百炼青铜。\n"
)
CLASSICAL = (
    "臣密言：臣以险衅，夙遭闵凶。生孩六月，慈父见背；行年四岁，舅夺母志。祖母刘愍臣孤弱，躬亲抚养。臣少多疾病，"
    "九岁不行，零丁孤苦，至于成立。既无伯叔，终鲜兄弟，门衰祚薄，晚有儿息。外无期功强近之亲，内无应门五尺之僮，"
    "茕茕孑立，形影相吊。而刘夙婴疾病，常在床蓐，臣侍汤药，未曾废离。\n"
)
MANUAL = """---
title: SHOW SCHEMAS
---

# SHOW SCHEMAS

`SHOW SCHEMAS` 语句是 [`SHOW DATABASES`](/sql-statements/show-databases.md) 的别名。

| 列名 | 类型 | 说明 |
| --- | --- | --- |
| `Database` | VARCHAR(64) | 数据库名 |

```sql
SHOW SCHEMAS LIKE 'test%';
```

## 另请参阅

* [SHOW DATABASES](/sql-statements/show-databases.md)
"""
API = """.. _cn_api_paddle_abs:

abs
-------------------------------

.. py:function:: paddle.abs(x, name=None)

求绝对值。

参数
:::::::::
    - **x** (Tensor) - 输入的 Tensor，数据类型为 float32、float64。
    - **name** (str，可选) - 具体用法请参见 :ref:`api_guide_Name`，一般无需设置，默认值为 None。

返回
:::::::::
输出 Tensor，与 x 维度相同、数据类型相同。

代码示例
:::::::::

COPY-FROM: paddle.abs
"""
PYTHON = '''"""Adds."""


def add(a: int, b: int) -> int:
    """The sum."""
    return a + b
'''
FRENCH = (
    "Il faisait beau ce matin et nous sommes partis de bonne heure pour le village de mes parents,"
    " où la maison est restée vide depuis la mort de mon oncle il y a bientôt trois ans."
)
NOISE = base64.b64encode(np.random.default_rng(0).bytes(3_000)).decode()


def table(texts, languages):
    return pa.table(
        {"text": pa.array(texts, pa.string()), "language": pa.array(languages, pa.string())}
    )


def reason(document, language, config=None):
    return clean.clean(table([document], [language]), config or CleanConfig())["reason"][0].as_py()


def cut(document, language="zh"):
    found = clean.clean(table([document], [language]), CleanConfig())
    left = found["text"][0].as_py()
    return (document if left is None else left), found["cut_lines"][0].as_py()


def english_words(count, seed=0):
    """A sentence of words drawn by chance, grammar among them."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abdeiklmnorst", k=6)) for _ in range(count)]
    return " ".join(rng.choice(["the", "of", word, word]) for word in words) + "."


def han(count, seed=0, alphabet="山水花鸟虫鱼金木火土江河湖海春夏秋冬东西南北"):
    rng = random.Random(seed)
    return "".join(rng.choice(alphabet) for _ in range(count))


PEOPLE = "".join(f"{han(9, seed)}的人，在{han(4, seed)}。" for seed in range(60))
STAYS = [
    (ENGLISH, "en"), (CHINESE, "zh"), *((poem, "zh") for poem in POEMS), (COUPLETS, "zh"),
    (CLASSICAL * 2, "zh"), (CLASSICAL.replace("，", "").replace("。", "") * 2, "zh"),
    (MANUAL, "zh"), (API, "zh"), (PYTHON, "code"), (FRENCH, "fr"), ("Xqzt brgl.", "und"),
    ("วันนี้อากาศดีมากเราไปเดินเล่นในสวนสาธารณะ" * 5, "th"),
    ("오늘은 날씨가 좋아서 공원에 산책을 갔습니다.", "ko"),
    ("今日はとても天気がいいので、公園へ散歩に行きました。", "ja"),
]  # fmt: skip


@pytest.mark.parametrize(("document", "language"), STAYS)
def test_stays(document, language):
    assert reason(document, language) is None


GOES = [
    # language, reason, what goes, what stays
    ("en", "empty", " \n\t\u200b ", ENGLISH),
    ("zh", "empty", "", CHINESE),
    ("code", "empty", "\n\n", PYTHON),
    ("xx", "empty", "", "x"),
    ("zh", "garbled", CHINESE.encode().decode("gbk", "replace"), CHINESE),
    ("zh", "garbled", CHINESE + "�" * 10, CHINESE + "�"),
    ("zh", "garbled", "锟斤拷" * 20 + CHINESE, "“锟斤拷”是乱码里最常见的字。" + CHINESE),
    ("en", "garbled", ENGLISH + "\ue000\ue001\x01\x02" * 5, ENGLISH + "\ue000"),
    ("fr", "garbled", FRENCH.encode().decode("latin-1") * 2, FRENCH + " À «\xa0Noël\xa0»"),
    ("fr", "garbled", "“où” — é".encode().decode("cp1252", "replace") * 9 + FRENCH, FRENCH),
    ("en", "symbols: mostly digits", ENGLISH + "1234 5678 " * 60, ENGLISH + "1234 5678 " * 5),
    ("code", "symbols: mostly digits", "x = [" + "1234, " * 200 + "]", PYTHON),
    ("zh", "length: too short", "今天天气真不错", "两个黄鹂鸣翠柳，一行白鹭上青天。窗含"),
    ("en", "length: too short", "Nice product, would buy again!", english_words(31)),
    ("code", "length: too short", "x = 1\n", "def double(number):\n    return number + number\n"),
    ("zh", "symbols: too many", "★" * 60 + CHINESE, "★★★★★" + CHINESE),
    ("en", "symbols: too many", "=|=|=|=|= " * 80 + ENGLISH, "= | = | " + ENGLISH),
    ("zh", "symbols: data", f"{CHINESE}\n{NOISE}", f"{PEOPLE}\n{NOISE[:400]}"),
    ("en", "symbols: data", f"{ENGLISH}\n{NOISE}", f"{ENGLISH}\nhttps://x.org/{NOISE[:80]}"),
    ("zh", "repetition: duplicate lines", "今天限时优惠，快来抢购吧。\n" * 4,
     CHINESE + "（完）\n" * 4),
    ("en", "repetition: duplicate lines", ENGLISH + ENGLISH + ENGLISH, ENGLISH + "}\n}\n}\n}\n"),
    ("zh", "repetition: n-grams", "".join(han(9, i) + CHINESE[:40] for i in range(20)),
     PEOPLE),
    ("en", "repetition: n-grams", " ".join([ENGLISH.replace("\n", " ")] * 3), english_words(400)),
    ("zh", "repetition: one phrase", "".join("买手机" + han(2, i) for i in range(40)),
     CHINESE + "买手机买手机"),
    ("en", "repetition: one phrase",
     " ".join(f"Access the records {english_words(6, i)}" for i in range(20)), ENGLISH),
    ("zh", "words: no sentences", " ".join(han(4, i) for i in range(80)), han(90) + CHINESE * 2),
    ("en", "words: no sentences",
     " ".join(w for w in english_words(120).split() if len(w) > 3), english_words(80)),
    ("en", "words: too short", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2, ENGLISH),
    ("en", "words: too long", "the of " + " ".join("a" * 25 for _ in range(40)), ENGLISH),
    ("en", "lines: bullets", "".join(f"- {english_words(8, i)}\n" for i in range(30)),
     "The list:\n" + "".join(f"- {english_words(8, i)}\n" for i in range(10)) + ENGLISH),
    ("en", "lines: ellipses", "".join(f"{english_words(12, i)}..\n" for i in range(6)) + ENGLISH,
     ENGLISH + "".join(f"{english_words(12, i)}\n" for i in range(6)) + "So he waited...\n"),
    ("en", "lines: a list", "\n".join(english_words(3, i)[:-1] for i in range(30)),
     "\n".join(english_words(3, i) for i in range(30))),
    ("en", "boilerplate: lorem ipsum", "Lorem ipsum dolor sit amet, the of and to. " + ENGLISH,
     ENGLISH + english_words(300) + " Lorem ipsum is the text that printers use."),
    ("en", "boilerplate: most lines",
     "Home | About us | Contact\nWe use cookies to improve it.\nBye.",
     "Home | About us | Contact\n" + ENGLISH),
    ("zh", "boilerplate: most lines",
     "上一篇：没有了\n下一篇：港口的早晨\n版权所有\n京ICP备12345678号\n正文",
     CHINESE + "上一篇：没有了\n下一篇：港口的早晨\n"),
    ("code", "code: long lines", "x='" + "ab c" * 1_100 + "'\n", "x='" + "ab c" * 30 + "'\n"),
    ("code", "code: long lines", ("x = f(a, b) + " * 30 + "0\n") * 9, ("x = f(a, b)\n") * 9),
    ("code", "code: few letters", "((0,1),(2,3));[[{}]];\n" * 9, PYTHON),
    ("code", "code: data",
     f"key = (\n'{NOISE[:70]}'\n'{NOISE[70:140]}'\n'{NOISE[140:210]}'\n)", PYTHON),
    ("code", "code: generated", "# Code generated by protoc. DO NOT EDIT.\n" + PYTHON,
     PYTHON + "# a note: do not edit this\n"),
    ("code", "code: generated",
     "// This file was automatically generated.\nint x = 5;\nint y = 6;\n",
     "// Random numbers are generated by this file.\nint x = 5;\n"),
]  # fmt: skip


@pytest.mark.parametrize(("language", "expected", "goes", "stays"), GOES)
def test_rules(language, expected, goes, stays):
    assert reason(goes, language) == expected
    assert reason(stays, language) is None


def test_every_rule_has_a_test():
    kinds = {"all": None, "characters": "zh", "words": "en", "code": "code"}
    tested = {(kind, expected) for kind, expected, *_ in GOES}
    for name, language in kinds.items():
        for field in dataclasses.fields(getattr(CleanConfig(), name)):
            why = field.metadata["reason"]
            assert any(why == w and language in (None, k) for k, w in tested), (name, field.name)


def test_limits_can_be_set():
    config = CleanConfig()
    config.words.min_words = 1_000
    assert reason(ENGLISH, "en", config) == "length: too short"
    assert reason(CHINESE, "zh", config) is None


FRAMES = [
    "Please enable JavaScript to view this page.",
    "JavaScript must be enabled in order to use this site.",
    "Your browser does not support the video tag.",
    "We use cookies to give you the best experience.",
    "By continuing to use this site you agree to our use of cookies.",
    "Accept all cookies",
    "© 2019 Acme Ltd.",
    "Copyright (c) 2010 Acme. All rights reserved.",
    "Home | About Us | Contact",
    "Home » Blog",
    "Skip to main content",
    "Previous Post: The boats",
    "Leave a Reply",
    "Your email address will not be published.",
    "Sign up for our weekly newsletter",
    "You must be logged in to post a comment.",
    "Share this post",
    "Proudly powered by WordPress",
    "上一篇：秋日的港口",
    "下一页",
    "当前位置：首页 > 新闻 > 正文",
    "您的位置: 首页",
    "首页 > 国内 > 正文",
    "首页 | 新闻中心 | 联系我们",
    "版权所有 2019 某某公司",
    "Copyright © 2003-2019 某某网",
    "京ICP备05012345号-1",
    "京公网安备 11010802012345号",
    "点击查看更多",
    "阅读全文 >>",
    "【返回首页】",
    "责任编辑：李雷",
    "发布时间：2019-01-01 浏览次数：1024",
    "免责声明：以上内容不代表本站观点。",
    "本站内容均来自网络，如有侵权请联系删除。",
    "转载请注明出处",
    "未经许可不得转载",
    "扫一扫二维码关注我们",
    "欢迎关注我们的微信公众号",
    "相关阅读：",
    "您的浏览器不支持 HTML5 视频。",
]
PROSE = [
    "Home is where the heart is.",
    "Cookies are baked for twelve minutes.",
    "Next, the article explains copyright in detail.",
    "We used cookies and milk to lure him out of the cave.",
    "Share this burden with your friends, he said to them.",
    "JavaScript is a language that browsers run.",
    "About us there was nothing but snow.",
    "# Search",
    "- Help",
    "Contact",
    "Copyright law protects authors.",
    "上一篇文章介绍了安装方法，这一篇介绍用法。",
    "下一步，点击“保存”按钮。",
    "点击 **Create** 创建集群。",
    "首页显示最近的十条消息。",
    "返回列表中元素的个数。",
    "版权所有者可以授权他人使用作品。",
    "关注民生，是政府的责任。",
    "本网络由两层组成。",
    "浏览器支持多种图片格式。",
    "分享是一种美德。",
    "登录",
    "参考资料：",
]


@pytest.mark.parametrize("line", FRAMES)
def test_lines_of_the_frame_are_cut(line):
    assert cut(f"{line}\n{CHINESE}") == (CHINESE, 1)
    assert cut(f"{ENGLISH}\n  {line}  \n\n{CHINESE}", "en") == (f"{ENGLISH}\n{CHINESE}", 1)
    assert cut(f"{PYTHON}{line}\n", "code") == (f"{PYTHON}{line}\n", 0)


@pytest.mark.parametrize("line", PROSE)
def test_lines_of_the_text_are_not(line):
    assert cut(f"{CHINESE}{line}\n{CHINESE}") == (f"{CHINESE}{line}\n{CHINESE}", 0)


def test_long_lines_are_never_cut():
    line = "We use cookies, " + "and we use milk, " * 10 + "for breakfast."
    assert cut(f"{line}\n{ENGLISH}", "en")[1] == 0


def test_cutting_can_be_switched_off():
    config = CleanConfig(cut_lines=False)
    found = clean.clean(table(["上一篇：没有了\n" + CHINESE], ["zh"]), config)
    assert found["text"].null_count == 1 and found["cut_lines"].to_pylist() == [0]


def test_lines_are_those_of_all_stages():
    rng = random.Random(3)
    letters = "ab 版。" + text.NEWLINES
    texts = ["".join(rng.choices(letters, k=rng.randint(0, 30))) for _ in range(200)]
    joined = text.join(["", *texts, "a\r\n\r\nb", ""])
    found, lines = clean._lines(joined, text.tokens(joined)), text.paragraphs(joined)
    for field in ("starts", "ends", "sizes", "rows"):
        np.testing.assert_array_equal(getattr(found, field), getattr(lines, field))


@pytest.mark.parametrize("end", text.NEWLINES)
def test_every_newline_ends_a_line(end):
    document = f"{CHINESE}版权所有 2019{end}上一篇：没有了{end}{end}{CHINESE}"
    assert cut(document) == (f"{CHINESE}{CHINESE}", 2)
    assert cut(f"{ENGLISH}{end}\r{end}Leave a Reply{end}") == (f"{ENGLISH}{end}\r{end}", 1)


@pytest.mark.parametrize(
    ("kind", "field", "value", "right"),
    [
        ("all", "max_digits", 40, "a share"),
        ("all", "min_visible", -1, "0 or more"),
        ("characters", "max_symbols", -0.1, "a share"),
        ("characters", "min_grammar", float("nan"), "a share"),
        ("words", "max_word_length", -1.0, "0 or more"),
        ("words", "max_placeholder", 1.5, "a share"),
        ("code", "max_mean_line", -1.0, "0 or more"),
    ],
)
def test_wrong_limits_are_named(kind, field, value, right):
    config = CleanConfig()
    config.check()
    config.code.max_mean_line = config.words.max_word_length = 1e9  # no limit
    config.check()
    setattr(getattr(config, kind), field, value)
    message = rf"config\.clean\.{kind}\.{field}={value} must be {right}"
    with pytest.raises(ValueError, match=message):
        config.check()


def test_columns():
    documents = table([ENGLISH * 2, None, "上一篇：无\n" + CHINESE], ["en", None, "zh"])
    found = clean.clean(documents, CleanConfig())
    assert found["reason"].to_pylist() == ["repetition: n-grams", "empty", None]
    assert found["duplicate_line_share"].to_pylist() == pytest.approx([0.5, 0, 0])
    assert found["symbol_share"].to_pylist() == [0, 0, 0]
    assert found["text"].to_pylist() == [None, None, CHINESE]
    assert found.schema.field("cut_lines").type == pa.uint32()
    assert clean.clean(table([], []), CleanConfig()).schema == found.schema


def test_rows_do_not_depend_on_each_other(monkeypatch):
    documents = [(d, k) for d, k in STAYS] + [(d, k) for k, _, *both in GOES for d in both]
    texts, languages = zip(*documents, strict=True)
    together = clean.clean(table(texts, languages), CleanConfig())
    alone = [clean.clean(table([d], [k]), CleanConfig()) for d, k in documents]
    assert together == pa.concat_tables(alone)
    monkeypatch.setattr(clean, "_LARGE_BATCH", 700)
    assert (
        clean.clean(table(texts, languages), CleanConfig()).combine_chunks()
        == together.combine_chunks()
    )


@pytest.mark.parametrize("n", [1, 3, 10])
def test_ngrams_against_counting(n):
    rng = random.Random(n)
    texts = ["".join(rng.choices("甲乙丙 ab", k=rng.randint(0, 120))) for _ in range(60)] * 2
    tokens = text.tokens(text.join(texts))
    least = np.array([2 + i % 3 for i in range(len(texts))])
    repeats, commonest = clean._ngrams(tokens, n, least)
    for i, (first, last) in enumerate(itertools.pairwise(tokens.rows)):
        hashes = tokens.hashes[first:last].tolist()
        grams = [tuple(hashes[k : k + n]) for k in range(max(1, len(hashes) - n + 1))]
        counts = [c for c in (grams.count(g) for g in set(grams)) if c >= least[i]]
        assert repeats[i] == sum(c - 1 for c in counts)
        assert commonest[i] == max(counts, default=0)


@pytest.mark.parametrize("cut_into", [text.paragraphs, text.sentences])
def test_pieces_against_plain_python(cut_into):
    rng = random.Random(5)
    texts = ["".join(rng.choices("aé1 ,。\n\t好★\ufffd", k=rng.randint(0, 50))) for _ in range(99)]
    joined, whole = text.join(texts), "".join(texts)
    spans = cut_into(joined)
    found = pieces.Pieces.of(joined, spans)
    kinds = {"a": 1, "é": 2, "好": 3, "1": 5, "。": 6, ",": 7, "★": 8, "\ufffd": 9}
    for i, piece in enumerate(whole[a:b] for a, b in zip(spans.starts, spans.ends, strict=True)):
        counts = np.bincount([kinds.get(letter, 0) for letter in piece], minlength=10)
        assert found.classes[i].tolist() == counts.tolist()
        assert (found.words[i], found.visible[i]) == (len(piece.split()), counts[1:].sum())
        assert whole[found.starts[i] : found.ends[i]] == piece.strip()
    strings = pieces.strings(joined.codes, found.starts, found.ends)
    assert strings.to_pylist() == [
        whole[a:b] for a, b in zip(found.starts, found.ends, strict=True)
    ]
    assert pieces.strings(joined.codes, found.starts[:0], found.ends[:0]).to_pylist() == []


def test_totals():
    values = np.arange(12).reshape(6, 2)
    found = pieces.totals(values, np.array([0, 0, 2, 6, 6]))
    assert found.tolist() == [[0, 0], [2, 4], [28, 32], [0, 0]]
    assert pieces.totals(np.array([True, True]), np.array([0, 2])).tolist() == [2]
    assert pieces.totals(np.zeros(0), np.array([0, 0])).tolist() == [0]


def test_real_text_survives():
    """Verse, classical and modern prose and manuals: of each kind, hardly anything goes."""
    folder = pathlib.Path(__file__).parents[4] / "shared" / "data" / "corpus"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: no real text to look at")
    for name, most in (("zh", 0.002), ("en", 0.03)):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in itertools.islice(file, 0, None, 8)]
        rows = [row for row in rows if "c4_demo" not in row["source"]]
        found = clean.clean(
            table([r["text"] for r in rows], [r["lang"] for r in rows]), CleanConfig()
        )
        assert (len(rows) - found["reason"].null_count) / len(rows) < most
