"""Folding, tokens, n-grams and sentences, against what plain Python makes of each text."""

import itertools
import random
import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import text

SAMPLES = [
    *(
        "",
        "Hello wor",
        'ld_1 你好，世界。”他说： "Yes." Then 3.14... x?! ok',
        "",
        "。。\n\n  a\r\nb.",
    ),
    *("ＡＢＣ　１２３ｶﾅ", "𠀀𠀁 😀 naïve Straße", "한국어 и русский", "々〇", "!", "end .", "\n"),
]
LETTERS = 'aB3_ .!?\n\r”’")。！；…，你好Ａ１　é𠀀·'

HASHES = [0x59525CE6D16F1DDB, 0x120B0327C86096FE, 0x72C5A9B80BCB6459, 0x784801D3B9E6367F]
NGRAMS = [0xB22AF6E80B33223E, 0x77CCBABDA6985DE5]
SENTENCES = [0x236FF68C3F5014F3]


def random_texts(count, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=rng.randint(0, 40))) for _ in range(count)]


def pieces(texts, found):
    """The pieces of each text that tokens or spans cut out."""
    whole = "".join(texts)
    cut = [whole[start:end] for start, end in zip(found.starts, found.ends, strict=True)]
    return [cut[start:end] for start, end in itertools.pairwise(found.rows)]


def plain_fold(character):
    for changed in (unicodedata.normalize("NFKC", character), character):
        if len(changed) == 1:
            lower = changed.casefold()
            return lower if len(lower) == 1 else changed


def plain_tokens(string):
    kinds = "".join(
        "h" if re.match("[々〇\u3400-\u9fff\U00020000-\U0003ffff]", letter)
        else "w" if letter.isalnum() or letter == "_" else " "
        for letter in map(plain_fold, string)
    )  # fmt: skip
    return [string[match.start() : match.end()] for match in re.finditer("h|w+", kinds)]


@pytest.mark.parametrize("seed", range(3))
def test_tokens(seed):
    texts = SAMPLES + random_texts(200, seed)
    tokens = text.tokens(text.join(texts))
    assert pieces(texts, tokens) == [plain_tokens(string) for string in texts]
    # Two tokens have the same hash just if they fold to the same.
    names = ["".join(map(plain_fold, token)) for row in pieces(texts, tokens) for token in row]
    assert_same_classes(names, tokens.hashes)
    # Nothing depends on the texts around.
    for n, string in enumerate(texts[:40]):
        own = text.tokens(text.join([string])).hashes
        np.testing.assert_array_equal(own, tokens.hashes[tokens.rows[n] : tokens.rows[n + 1]])


def assert_same_classes(names, hashes):
    by_name = dict(zip(names, hashes.tolist(), strict=True))
    assert [by_name[name] for name in names] == hashes.tolist()
    assert len(set(by_name.values())) == len(by_name)


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_ngrams(n):
    texts = SAMPLES + random_texts(200, 7)
    tokens = text.tokens(text.join(texts))
    hashes, rows = text.ngrams(tokens, n)
    expected = []
    for start, end in itertools.pairwise(tokens.rows):
        own = tokens.hashes[start:end].tolist()
        count = max(1, len(own) - n + 1) if own else 0
        expected.append([tuple(own[place : place + n]) for place in range(count)])
    assert np.diff(rows).tolist() == list(map(len, expected))
    assert_same_classes(list(itertools.chain(*expected)), hashes)


def test_ngrams_of_very_few_tokens():
    for string, count in (("", 0), ("a", 1), ("a b", 1), ("a b c", 1), ("a b c d", 2)):
        hashes, rows = text.ngrams(text.tokens(text.join([string])), 3)
        assert (len(hashes), rows.tolist()) == (count, [0, count])


def test_hashes_never_change():
    """Whatever was prepared with an earlier version must still match."""
    tokens = text.tokens(text.join(["Hello, 世界 ＡＢＣ!"]))
    assert tokens.hashes.tolist() == HASHES
    assert text.ngrams(tokens, 3)[0].tolist() == NGRAMS
    assert text.sentences(text.join(["Hello, 世界!"])).hashes.tolist() == SENTENCES


def test_fold():
    pairs = {
        **{"Ａ": "a", "Z": "z", "１": "1", "①": "1", "　": " ", "！": "!", "ｶ": "カ", "É": "é"},
        **{"Σ": "σ", "ς": "σ", "⼀": "一", "豈": "豈", "ﬁ": "ﬁ", "ß": "ß", "萬": "萬", "…": "…"},
    }
    folded = text.fold(text.join(["".join(pairs)]).codes) & text.CODE_MASK
    assert "".join(map(chr, folded)) == "".join(pairs.values())
    kinds = text.fold(text.join(["a_9é한가 \n.，😀你々〇𠀀"]).codes) >> text.CLASS_SHIFT
    assert kinds.tolist() == [text.WORD] * 6 + [text.SEPARATOR] * 5 + [text.HAN] * 4
    table = text.fold(np.arange(0x110000, dtype=np.uint32))
    np.testing.assert_array_equal(text.fold(table & text.CODE_MASK), table)


def test_simplified():
    traditional, simplified = (
        "語言模型學習圖書館裡的電腦發展ＡＢ",
        "语言模型学习图书馆里的电脑发展ab",
    )
    one, other = (text.fold(text.join([t]).codes, True) for t in (traditional, simplified))
    np.testing.assert_array_equal(one, other)
    assert (text.fold(text.join([traditional]).codes) != other).sum() == 10
    hashes = [text.tokens(text.join([t]), simplify=True).hashes for t in (traditional, simplified)]
    np.testing.assert_array_equal(*hashes)


SENTENCES_OF = {
    "你好。世界！真的？？是；等……完": ["你好。", "世界！", "真的？？", "是；", "等……", "完"],
    "他说：“好。”然后走了。": ["他说：“好。”", "然后走了。"],
    "One. Two? Three!\nFour": ["One. ", "Two? ", "Three!\n", "Four"],
    'He said "Yes." Then (no!) she.': ['He said "Yes." ', "Then (no!) ", "she."],
    "v3.14 of a.b.c, e.g.this": ["v3.14 of a.b.c, e.g.this"],
    "Wait... what?!  ok": ["Wait... ", "what?!  ", "ok"],
    "a\n\n  b. \n c": ["a\n\n", "  b. \n", " c"],
    " . \n": [" . \n"],
    "a\r\nb\u2028c": ["a\r\n", "b\u2028", "c"],
    '"." . )\n)': ['"." ', ". ", ")\n", ")"],
    "": [],
}


def test_sentences_and_paragraphs():
    texts = list(SENTENCES_OF)
    joined = text.join(texts)
    assert pieces(texts, text.sentences(joined)) == list(SENTENCES_OF.values())
    lines = [re.findall(r"[^\n\r\u2028]*[\n\r\u2028]+|[^\n\r\u2028]+", string) for string in texts]
    assert pieces(texts, text.paragraphs(joined)) == lines


def test_every_newline_ends_a_line():
    for end in text.NEWLINES:
        texts = [f"a{end}b", f"{end}{end}a{end}\n{end}b{end}", end, ""]
        joined = text.join(texts)
        lines = [[f"a{end}", "b"], [end * 2, f"a{end}\n{end}", f"b{end}"], [end], []]
        assert pieces(texts, text.paragraphs(joined)) == lines
        assert pieces(texts, text.sentences(joined)) == lines
    codes = np.arange(0x110000, dtype=np.uint32)
    assert "".join(map(chr, codes[text.is_newline(codes)])) == "".join(sorted(text.NEWLINES))


@pytest.mark.parametrize("cut", [text.sentences, text.paragraphs])
def test_spans(cut):
    texts = SAMPLES + list(SENTENCES_OF) + random_texts(300, 3)
    joined = text.join(texts)
    spans = cut(joined)
    found = pieces(texts, spans)
    assert ["".join(row) for row in found] == texts  # they tile
    content = ["".join(plain_tokens(span)) for row in found for span in row]
    assert spans.sizes.tolist() == list(map(len, content))
    assert_same_classes(["".join(map(plain_fold, span)) for span in content], spans.hashes)
    for string, row in zip(texts, found, strict=True):
        assert pieces([string], cut(text.join([string]))) == [row]  # whatever the texts around
    lines = pieces(texts, text.paragraphs(joined))
    if cut is text.sentences:  # sentences are cut out of lines
        ends = [set(itertools.accumulate(map(len, row))) for row in found]
        ends_of_lines = [set(itertools.accumulate(map(len, row))) for row in lines]
        assert all(few <= many for few, many in zip(ends_of_lines, ends, strict=True))


def test_without():
    texts = ["One. Two. Three.", "一。二。", "", "only"]
    joined = text.join(texts)
    spans = text.sentences(joined)
    drop = np.zeros(len(spans.starts), bool)
    assert text.without(joined, spans, drop) == [None] * 4
    drop[[1, 3, 4]] = True
    assert text.without(joined, spans, drop) == ["One. Three.", "", None, None]


def test_join_takes_any_strings():
    texts = ["a", "", "你𠀀", "é"]
    expected = text.join(texts)
    assert expected.starts.tolist() == [0, 1, 1, 3, 4]
    assert expected.codes.tolist() == [0x61, 0x4F60, 0x20000, 0xE9]
    padded = pa.array(["xx", *texts, "yy"])
    forms = [
        pa.array(texts),
        padded[1:5],
        pa.chunked_array([padded[1:3], padded[3:3], padded[3:5]]),
        pa.array(texts, pa.large_string()),
        pa.array(["a", None, "你𠀀", "é"]),
        pa.array(["xx", "a", None, "你𠀀", "é"])[1:],
    ]
    for form in forms:
        joined = text.join(form)
        assert joined.codes.tolist() == expected.codes.tolist()
        assert joined.starts.tolist() == expected.starts.tolist()
        assert list(text.batches(form, 2)) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    for nothing in ([], pa.array([], pa.string()), pa.chunked_array([], pa.string())):
        assert text.join(nothing).starts.tolist() == [0]
        assert list(text.batches(nothing)) == []
        assert text.sentences(text.join(nothing)).rows.tolist() == [0]
        assert text.tokens(text.join(nothing)).rows.tolist() == [0]
    with pytest.raises(ValueError, match="surrogate"):
        text.join(["\ud800"])


def test_batches():
    texts = ["abc", "", "de", "f" * 10, "g", "h"]
    rows = [slice(0, 3), slice(3, 4), slice(4, 6)]
    assert list(text.batches(texts, 5)) == rows
    assert list(text.batches(pa.array(texts), 5)) == rows
