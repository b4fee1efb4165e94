"""A small truth set of near-duplicates: made documents, known edits, exact similarity.

The similarity is computed in plain Python over the texts themselves, with its own tokens, and
shares nothing with the code under test.
"""

import collections
import dataclasses
import itertools
import random
import re
import unicodedata

from baichuan_jax.data.prepare import traditional

_ENGLISH = """
river stone market winter garden letter teacher window bridge morning village silver paper
engine forest ocean harbour kitchen doctor summer mountain travel answer question number
simple yellow quiet early heavy borrow carry measure report system model training language
science history music picture story road field animal weather machine computer water fire
earth the of and to in a is was for on with at by from they we you he she it have had not
but when where which after before under over between during without small large new old
good long great little own other many
"""
_CHINESE = """
河流 石头 市场 冬天 花园 书信 老师 窗户 大桥 早晨 村庄 白银 纸张 发动机 森林 海洋 港口
厨房 医生 夏天 高山 旅行 回答 问题 数字 简单 黄色 安静 早 沉重 借用 搬运 测量 报告 系统
模型 训练 语言 科学 历史 音乐 图画 故事 道路 田野 动物 天气 机器 计算机 水 火 土地 的
了 和 在 是 不 有 这 那 我们 他们 你 她 它 为 与 从 到 以后 以前 下面 上面 之间 期间
没有 小 大 新 旧 好 长 伟大 一些 自己 其他 许多 国家 经济 发展 电脑 学习 观点 认为 应该
讨论 关于 图书馆 头发 万里 云朵
"""
_WORDS = {"en": _ENGLISH.split(), "zh": _CHINESE.split()}
_SHINGLE = 5
Sentence = list[str]


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, and what it says without any folding that has to be asked for."""

    text: str
    plain: str
    edit: str


def texts(language: str, originals: int, seed: int) -> list[Text]:
    """Documents in 'en' or 'zh', and edited versions of them; the originals are edit ''."""
    rng = random.Random(f"{language} {seed}")
    found = []
    boilerplate = [_sentences(rng, language, 3) for _ in range(4)]
    for _ in range(originals):
        sentences = _sentences(rng, language, rng.randint(15, 45))
        found.append(_text(language, sentences, ""))
        for name, edit in _EDITS.items():
            edited = edit(rng, language, sentences, boilerplate)
            found.append(_text(language, edited, name))
        found.append(_disguise(rng, found[-1 - len(_EDITS)].text))
    if language == "zh":
        found += [_traditional(text.text) for text in found if text.edit == ""]
    rng.shuffle(found)
    return found


def jaccard(texts: list[str]) -> dict[tuple[int, int], float]:
    """Similarity of the 5-token shingles of all pairs that share one; i < j."""
    shingles = [_shingles(text) for text in texts]
    holders = collections.defaultdict(list)
    for number, own in enumerate(shingles):
        for shingle in own:
            holders[shingle].append(number)
    shared = collections.Counter()
    for numbers in holders.values():
        shared.update(itertools.combinations(numbers, 2))
    return {
        (i, j): both / (len(shingles[i]) + len(shingles[j]) - both)
        for (i, j), both in shared.items()
    }


def _shingles(text: str) -> set[tuple[str, ...]]:
    folded = unicodedata.normalize("NFKC", text).lower()
    tokens = re.findall(r"[a-z0-9_]+|[\u3400-\u9fff]", folded)
    count = max(1, len(tokens) - _SHINGLE + 1) if tokens else 0
    return {tuple(tokens[start : start + _SHINGLE]) for start in range(count)}


def _sentences(rng: random.Random, language: str, count: int) -> list[Sentence]:
    words = _WORDS[language]
    return [[rng.choice(words) for _ in range(rng.randint(5, 14))] for _ in range(count)]


def _text(language: str, sentences: list[Sentence], edit: str) -> Text:
    lines = []
    for start in range(0, len(sentences), 4):
        some = sentences[start : start + 4]
        if language == "zh":
            lines.append("".join("".join(sentence) + "。" for sentence in some))
        else:
            lines.append(" ".join(" ".join(sentence).capitalize() + "." for sentence in some))
    text = "\n".join(lines)
    return Text(text, text, edit)


def _insert(rng, language, sentences, boilerplate):
    edited = list(sentences)
    for sentence in _sentences(rng, language, rng.randint(1, len(sentences) // 4)):
        edited.insert(rng.randint(0, len(edited)), sentence)
    return edited


def _delete(rng, language, sentences, boilerplate):
    gone = rng.sample(range(len(sentences)), rng.randint(1, len(sentences) // 3))
    return [sentence for number, sentence in enumerate(sentences) if number not in gone]


def _reorder(rng, language, sentences, boilerplate):
    paragraphs = [sentences[start : start + 6] for start in range(0, len(sentences), 6)]
    rng.shuffle(paragraphs)
    return [sentence for paragraph in paragraphs for sentence in paragraph]


def _frame(rng, language, sentences, boilerplate):
    header, footer = rng.sample(boilerplate, 2)
    return [*header[: rng.randint(1, 3)], *sentences, *footer[: rng.randint(0, 3)]]


def _substitute(rng, language, sentences, boilerplate):
    share = rng.uniform(0.002, 0.04)
    words = _WORDS[language]
    return [
        [rng.choice(words) if rng.random() < share else word for word in sentence]
        for sentence in sentences
    ]


_EDITS = {
    "insertion": _insert,
    "deletion": _delete,
    "reordering": _reorder,
    "header and footer": _frame,
    "substitution": _substitute,
}


def _disguise(rng: random.Random, text: str) -> Text:
    """The same words in another case, width and spacing."""
    changes = [
        str.upper,
        lambda word: word.replace(" ", "  \n"),
        lambda word: "".join(
            chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in word
        ),
        lambda word: word,
    ]
    pieces = re.split(r"(?<=[.。])", text)
    disguised = "".join(rng.choice(changes)(piece) for piece in pieces)
    return Text(disguised, disguised, "case and width")


def _traditional(text: str) -> Text:
    back = dict(zip(traditional.PAIRS[1::2], traditional.PAIRS[::2], strict=True))
    return Text("".join(back.get(letter, letter) for letter in text), text, "traditional")
