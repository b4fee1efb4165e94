import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import linear, sentences
from baichuan_jax.data.prepare.sentences import SentencesConfig
from baichuan_jax.data.prepare.text import NEWLINES, join, tokens

CHINESE = "清晨的港口很安静。夜里回来的渔船都停靠在岸边！街上还有人吗？没有人。"
ENGLISH = "The harbour lay quiet in the early light. Nobody was about yet, it seemed. "


def table(texts, language):
    languages = [language] * len(texts)
    return pa.table(
        {"text": pa.array(texts, pa.string()), "language": pa.array(languages, pa.string())}
    )


def left(text, language="zh", **options):
    found = sentences.sentences(table([text], language), SentencesConfig(**options))
    edited = found["text"][0].as_py()
    return text if edited is None else edited


BAD = [
    "★★★★★★★★★★ 好评",
    "✨🎉🔥🎁✨🎉🔥🎁 抢购",
    "快来买啊！！！！！！",
    "WOW !!!!!!",
    "第一章............................12",
    "第二章 …………………………",
    "首页 | 新闻 | 体育 | 财经 | 娱乐",
    "Latest news » World affairs » Europe » France",
    "国内｜国际｜军事｜社会",
    "https://a.com/x https://b.com/y, https://c.com/z",
    "Read more",
    "[Continue reading]",
    "Click here to download the app",
    "点击查看全文 >>",
    "查看更多",
    "更多精彩 >",
    "手机报价,手机大全,手机图片,手机论坛,智能手机,二手手机,手机评测,手机游戏,手机软件",
    "cheap shoes, buy shoes, shoes online, best shoes, shoes sale, red shoes, shoes shop, shoes",
]


@pytest.mark.parametrize("bad", BAD)
def test_goes(bad):
    for text, language in ((CHINESE, "zh"), (ENGLISH.strip(), "en")):
        assert left(f"{text}\n{bad}\n{text}", language) == f"{text}\n{text}"
        assert left(f"{text}\n{bad}\n{text}", "code") == f"{text}\n{bad}\n{text}"


GOOD = [
    "预估烹饪难度：★★★★",
    "真的吗？！他喊道。",
    "Really?! he cried. No!",
    "……他沉默了。",
    "And so it went on...",
    "约翰·史密斯和让·雅克·卢梭都来了。",
    "| 名称 | 类型 | 默认值 | 说明 |",
    "Name | Type | Default | Meaning\n--- | --- | --- | ---\nrate | float | zero | speed",
    "参见 https://a.com/x 和 https://b.com/y。",
    "[a](https://a.com)、[b](https://b.com)、[c](https://c.com)。",
    "Read more about memory in the next chapter.",
    "More information",
    "了解更多命令行参数的用法，请参考手册。",
    "苹果、香蕉、橘子、葡萄、西瓜、梨、桃、杏、李子、樱桃",
    "北京市、上海市、天津市、重庆市、南京市、杭州市、广州市、深圳市、成都市、武汉市",
    "第一军往镂方道，第二军往长岑道，第三军往海冥道，第四军往盖马道，第五军往建安道，第六军往南苏道，第七军往辽东道，第八军往玄菟道。",
    "flour, sugar, butter, eggs, milk, salt, yeast, vanilla, almonds, raisins",
    "------------------------",
    "========================",
    "* * *",
    "x = a[0], b[1], c[2], d[3]",
    "# 查看更多",
    "    Read more",
    "```\n★★★★★★★★★★\nRead more\n```",
    "$$\\sum_{i=1}^{n} x_i ≥ 0$$",
    "临江仙\n□□□□□□□，□□□□□□。\n莫交闲虑到心头。",
    "枯藤老树昏鸦，小桥流水人家，古道西风瘦马。",
    "",
]


@pytest.mark.parametrize("good", GOOD)
def test_stays(good):
    assert left(f"{CHINESE}\n{good}\n{CHINESE}") == f"{CHINESE}\n{good}\n{CHINESE}"
    assert left(f"{ENGLISH}\n{good}\n{ENGLISH}", "en") == f"{ENGLISH}\n{good}\n{ENGLISH}"


def test_cuts_inside_a_line_keep_the_line():
    assert left(f"{CHINESE}买啊！！！！！！！！\n{CHINESE}\n") == f"{CHINESE}\n{CHINESE}\n"
    assert left(f"★★★★★★★★★★\n{CHINESE}") == CHINESE
    assert left(f"{ENGLISH}Wow!!!!!! {ENGLISH}", "en") == f"{ENGLISH}{ENGLISH}"


def test_what_was_broken_off_goes_with_the_invitation():
    text = f"{ENGLISH}The man in the blue coat then … Read more\n{ENGLISH}"
    assert left(text, "en") == f"{ENGLISH}\n{ENGLISH}"
    # Not from one line, or one document, to the next.
    assert left(f"{ENGLISH}So he waited…\nRead more\n{ENGLISH}", "en") == (
        f"{ENGLISH}So he waited…\n{ENGLISH}"
    )
    found = sentences.sentences(table([f"{ENGLISH}So…", "Read more"], "en"), SentencesConfig())
    assert found["reason"].to_pylist() == [None, "low-quality sentences"]
    assert found["text"].to_pylist() == [None, ""]


def test_fences_of_one_document_do_not_reach_the_next():
    texts = [f"```\n{CHINESE}", f"{CHINESE}\n查看更多\n", f"```\nx\n```\n{CHINESE}\n查看更多\n"]
    found = sentences.sentences(table(texts, "zh"), SentencesConfig())
    assert found["removed_sentences"].to_pylist() == [0, 1, 1]


def test_documents_with_little_left_go():
    rest = "手机报价,手机大全,手机图片,手机论坛,智能手机,二手手机,手机评测,手机游戏,手机软件"
    texts = [f"{rest}\n港口很安静。", f"{rest}\n{CHINESE * 3}", None, "", "\n \n"]
    found = sentences.sentences(table(texts, "zh"), SentencesConfig())
    assert found["reason"].to_pylist() == ["low-quality sentences", None, None, None, None]
    assert found["removed_sentences"].to_pylist() == [1, 1, 0, 0, 0]
    assert found["removed_share"][0].as_py() == pytest.approx(36 / 41)
    assert found["text"].to_pylist()[1:] == [CHINESE * 3, None, None, None]
    assert found.schema.field("removed_sentences").type == pa.uint32()
    assert sentences.sentences(table([], "zh"), SentencesConfig()).schema == found.schema


def test_limits_can_be_set():
    text = f"{ENGLISH}\nWOW !!!!!!"
    assert left(text, "en", max_exclaimed=0.9) == text
    assert left(text, "en") == f"{ENGLISH}\n"


def test_rows_do_not_depend_on_each_other(monkeypatch):
    texts = [f"{CHINESE}\n{one}\n{CHINESE}" for one in [*BAD, *GOOD]] + ["", None]
    together = sentences.sentences(table(texts, "zh"), SentencesConfig())
    alone = [sentences.sentences(table([one], "zh"), SentencesConfig()) for one in texts]
    assert together == pa.concat_tables(alone)
    monkeypatch.setattr(sentences, "_BATCH", 300)
    again = sentences.sentences(table(texts, "zh"), SentencesConfig())
    assert again.combine_chunks() == together.combine_chunks()


def test_classifier(tmp_path):
    """Weights that know one bad word: sentences with it, and long enough, have low scores."""
    weights = np.zeros((1, 1 << linear.BITS), np.float32)
    singles, _ = linear.features(tokens(join(["casino"])).hashes)
    weights[0, singles] = -400
    linear.Linear(weights, np.full(1, 3, np.float32)).save(tmp_path / "good.npz")
    options = {"classifier": str(tmp_path / "good.npz")}
    bad = "They all went to the casino and lost whatever they had."
    assert left(f"{ENGLISH}{bad} {ENGLISH}", "en", **options) == f"{ENGLISH}{ENGLISH}"
    assert left(f"{ENGLISH}{bad} {ENGLISH}", "code", **options) == f"{ENGLISH}{bad} {ENGLISH}"
    assert left(f"{ENGLISH}{bad} {ENGLISH}", "en", min_score=0.0, **options).count("casino") == 1
    assert left(f"{ENGLISH}A casino. {ENGLISH}", "en", **options).count("casino") == 1
    assert left(f"{ENGLISH}`x` {bad[:-1]} `y`. {ENGLISH}", "en", **options).count("casino") == 1
    with pytest.raises(FileNotFoundError):
        left(ENGLISH, "en", classifier=str(tmp_path / "none.npz"))


@pytest.mark.parametrize("end", NEWLINES)
def test_every_newline_ends_a_line(end):
    document = f"{CHINESE}{end}# 查看更多{end}{CHINESE}{end}查看更多{end}{CHINESE}"
    assert left(document) == f"{CHINESE}{end}# 查看更多{end}{CHINESE}{end}{CHINESE}"


def test_wrong_settings_are_named(tmp_path):
    SentencesConfig().check()
    shares = ("max_ornaments", "max_leaders", "max_exclaimed", "max_keyword_share")
    wrong = {name: (20, r"in \[0, 1\]") for name in (*shares, "min_score", "max_removed")}
    wrong |= {"min_keywords": (0, "1 or more"), "scored_from": (-1, "0 or more")}
    for field, (value, right) in wrong.items():
        message = rf"config\.sentences\.{field}={value} must be {right}"
        with pytest.raises(ValueError, match=message):
            SentencesConfig(**{field: value}).check()
    (tmp_path / "bad.npz").write_bytes(b"no classifier")
    for name in ("none.npz", "bad.npz", ""):
        with pytest.raises(ValueError, match=r"config\.sentences\.classifier=.* must be a file"):
            SentencesConfig(classifier=str(tmp_path / name)).check()
    weights = np.zeros((1, 1 << linear.BITS), np.float32)
    linear.Linear(weights, np.zeros(1, np.float32)).save(tmp_path / "good.npz")
    SentencesConfig(classifier=str(tmp_path / "good.npz")).check()
