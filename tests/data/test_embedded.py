import re
import shutil

import pytest

from baichuan_jax.data import embedded, sources
from baichuan_jax.data.dialogue import dialogue, in_words

SMALL = 60_000


def test_corpus_has_every_kind_of_text_and_the_size_asked_for():
    documents = list(embedded.corpus(SMALL))
    size = sum(len(d.text.encode()) for d in documents)
    assert 0.5 * SMALL < size <= SMALL
    assert {(d.source, d.language) for d in documents} == {
        ("docs", "en"),
        ("python", "code"),
        ("dialogue", "zh"),
        ("dialogue", "en"),
    }
    assert len({d.text for d in documents}) == len(documents)
    assert max(len(d.text) for d in documents) <= embedded.MAX_CHARACTERS
    assert documents == list(sources.documents(f"embedded:{SMALL}"))


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """Makes a small installed Python at a place, its files written in a given order."""
    monkeypatch.setattr(embedded, "PACKAGES", ())
    prose = "This function returns the number of lines that it has read so far. " * 5

    def install(place, names):
        root = tmp_path / place
        for name in names:
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            same = "copy" if "copy" in name else name
            file.write_text(f'"""About {same}. {prose}"""\n\nVALUE = "{same}"\n' * 2)
        monkeypatch.setattr(embedded.sysconfig, "get_path", lambda _: str(root))
        return list(embedded.corpus(20_000))

    return install


def test_corpus_depends_on_content_alone(installation):
    names = ["a.py", "json/b.py", "json/c.py", "copy1.py", "copy2.py", "test/d.py", "data.bin"]
    first = installation("here", names)
    assert installation("elsewhere/deep", reversed(names)) == first
    real = [d.text for d in first if d.source != "dialogue"]
    assert sum("About copy" in text for text in real) == 2  # once as prose, once as source text
    assert not any("test/d.py" in text for text in real)
    assert sum(d.source == "docs" for d in first) == 4


def test_corpus_survives_unreadable_files(installation, tmp_path):
    installation("place", ["good.py"])
    (tmp_path / "place/latin1.py").write_bytes(b"# caf\xe9\n" * 100)
    (tmp_path / "place/template.py").write_text("def {name}(:\n" * 100)
    texts = [d.text for d in embedded.corpus(20_000) if d.source == "docs"]
    assert len(texts) == 1 and "good.py" in texts[0]
    shutil.rmtree(tmp_path / "place")  # a Python without its sources
    assert {d.source for d in embedded.corpus(20_000)} == {"dialogue"}


def test_long_text_is_cut_at_a_line():
    text = "a line of text\n" * 2_000
    cut = embedded._cut(text)
    assert len(cut) <= embedded.MAX_CHARACTERS and cut.endswith("a line of text")
    assert len(embedded._cut("x" * 50_000)) == embedded.MAX_CHARACTERS


def test_dialogue_is_deterministic_and_bilingual():
    documents = list(dialogue(300, seed=3))
    assert documents == list(dialogue(300, seed=3))
    assert documents[:100] == list(dialogue(100, seed=3))
    assert documents != list(dialogue(300, seed=4))
    chinese = sum(d.language == "zh" for d in documents)
    assert 100 < chinese < 200
    for document in documents:
        assert ("：" in document.text) == (document.language == "zh")


def test_dialogue_sums_are_right():
    operate = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "×": lambda a, b: a * b,
        "÷": lambda a, b: a // b,
    }
    sums = 0
    for document in dialogue(1_000, seed=0):
        for a, sign, b, result in re.findall(r"(\d+) ([-+×÷]) (\d+) = (\d+)", document.text):
            assert operate[sign](int(a), int(b)) == int(result), document.text
            sums += 1
    assert sums > 500


def test_dialogue_sums_in_words_are_right():
    value = {language: {in_words(n, language): n for n in range(10_000)} for language in (0, 1)}
    assert all(len(words) == 10_000 for words in value.values())  # no two numbers alike
    english = r"(?:^|: )([\w -]+) (plus|minus|times|divided by) ([\w -]+) is ([\w -]+)\."
    chinese = r"：([零-龥]+)(加|减|乘以|除以)([零-龥]+)等于([零-龥]+)。"
    operate = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    operate |= {"divided by": int.__floordiv__, "加": int.__add__, "减": int.__sub__}
    operate |= {"乘以": int.__mul__, "除以": int.__floordiv__}
    sums = 0
    for document in dialogue(1_000, seed=0):
        zh = document.language == "zh"
        for a, sign, b, result in re.findall(chinese if zh else english, document.text):
            a, b, result = (value[zh][words.lower()] for words in (a, b, result))
            assert operate[sign](a, b) == result, document.text
            sums += 1
    assert sums > 100


def test_dialogue_times_are_right():
    checked = 0
    for document in dialogue(1_000, seed=0):
        times = re.findall(
            r"(\d+):(\d\d)(?:，过| now\. What time is it in )(\d+)[^：:]*[：:][^：:]*?(\d+):(\d\d)",
            document.text,
        )
        for hour, minute, later, end_hour, end_minute in times:
            end = int(hour) * 60 + int(minute) + int(later)
            assert (end - int(end_hour) * 60 - int(end_minute)) % 720 == 0, document.text
            assert 1 <= int(end_hour) <= 12
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("number", "chinese", "english"),
    [
        (0, "零", "zero"),
        (15, "十五", "fifteen"),
        (110, "一百一十", "one hundred and ten"),
        (1005, "一千零五", "one thousand and five"),
        (2340, "二千三百四十", "two thousand three hundred and forty"),
    ],
)
def test_numbers_in_words(number, chinese, english):
    assert (in_words(number, True), in_words(number, False)) == (chinese, english)
