import gzip
import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import safety, text
from baichuan_jax.data.prepare.linear import BITS, Linear
from baichuan_jax.data.prepare.safety import SafetyConfig

CORPUS = pathlib.Path(__file__).parents[4] / "shared" / "data" / "corpus"

# What is to be dropped, by category.
BAD = {
    "gambling": [
        "澳门赌场官网最新上线！真人百家乐、时时彩、六合彩应有尽有，新用户注册送彩金，首存优惠天天有，"
        "信誉平台，提款秒到账。足球投注、体育投注首选，博彩公司直营，欢迎加入。",
        "澳門賭場官網最新上線！真人百家樂、時時彩、六合彩，首存優惠，註冊送彩金，信譽平台，提款快。",
        "Best online casino: claim your bonus, no deposit bonus and 200 free spins, play online"
        " slots and live casino games, or get free bets at the best betting sites. Bet now!",
    ],
    "pornography": [
        "国产自拍 偷拍自拍 成人电影 无码视频 AV女优 三级片 激情小说 在线看片 免费观看 高清 最新",
        "FREE PORN videos every day: hardcore porn, amateur porn, XXX videos, live sex cams with"
        " horny girls, milf and blowjob clips. Watch porn movies on the biggest porn tube now.",
    ],
    "scams": [
        "专业代开发票，办证刻章，代办文凭，信用卡套现，高仿手表，办假证，联系电话微信同号，诚信。",
        "Buy Viagra online without prescription! Cheap Viagra, generic Cialis, weight loss pills"
        " and male enhancement products. Payday loans and replica watches also available here.",
    ],
    "violence": [
        "出售枪支弹药，气枪专卖，手枪专卖，军用枪支货到付款，另有迷药出售，听话水，请加联系方式。"
    ],
    "hate": [
        "White power! The kikes and the niggers and all race traitors bring white genocide upon us,"
        " the mud races will pay, racial holy war now.",
    ],
}
# What has such words, but is not that.
GOOD = [
    "警方通报：近日，我市公安机关破获一起特大网络赌博案，抓获犯罪嫌疑人三十二名，冻结资金两千余万元。"
    "经查，该团伙搭建赌博网站，以百家乐等形式吸引参赌人员，从中抽头渔利。网络赌博属违法行为。",
    "第三百六十三条 以牟利为目的，制作、复制、出版、贩卖、传播淫秽物品的，处三年以下有期徒刑、拘役"
    "或者管制，并处罚金；情节严重的，处三年以上十年以下有期徒刑，并处罚金。",
    "性传播疾病是主要通过性接触传播的一组疾病，包括梅毒、淋病、尖锐湿疣和生殖器疱疹等。"
    "阴茎、阴道、宫颈和肛门均可受累，应及早就医，避免性交，并通知性伴侣检查。",
    "“You said a nigger would never do it,” said the old man. The nigger had gone by then, and the"
    " niggers on the landing said nothing. It was a hard word of a hard country, and Huck used it"
    " as everyone did, without a thought.",
    "Breast cancer screening finds tumours early. The examination of the breast, vagina and cervix"
    " is routine in gynaecology, and patients should ask about sexual intercourse, anal fissures"
    " and erectile dysfunction, for which sildenafil (Viagra) may be prescribed.",
    "The commission said that online gambling must be licensed. Sports betting remains legal in two"
    " states, while the bill to allow casinos failed in the senate after a debate of nine hours.",
    "滚动轴承由内圈、外圈、滚动体和保持架组成。量子比特码是一种纠错码，码间串扰可以用均衡器消除。",
]


def documents(texts, language="und"):
    return pa.table(
        {
            "text": pa.array(texts, pa.string()),
            "language": [language] * len(texts),
        }
    )


@pytest.fixture(scope="module")
def terms():
    return safety.read_terms(SafetyConfig())


def test_drops_what_is_full_of_bad_terms(terms):
    for category, texts in BAD.items():
        found = safety.score(documents(texts), SafetyConfig(), terms)
        assert found["reason"].to_pylist() == [f"safety: {category}"] * len(texts)
        assert found["safety"].to_pylist() == [0] * len(texts)
    # Width and case do not matter; nor does what is around it, as long as it is not too much.
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in BAD["gambling"][2])
    found = safety.score(documents([wide, GOOD[0] + BAD["gambling"][0]]), SafetyConfig(), terms)
    assert found["reason"].to_pylist() == ["safety: gambling"] * 2


def test_keeps_what_only_mentions_them(terms):
    found = safety.score(documents([*GOOD, "", None]), SafetyConfig(), terms)
    assert found["reason"].to_pylist() == [None] * (len(GOOD) + 2)
    assert min(found["safety"].to_pylist()) < 1  # some terms are there
    # Dense, but always the same; many, but in a long text.
    same = "online casino " * 50
    rare = BAD["gambling"][0] + GOOD[6] * 60
    found = safety.score(documents([same, rare]), SafetyConfig(), terms)
    assert found["reason"].to_pylist() == [None, None]


@pytest.mark.skipif(not CORPUS.exists(), reason=f"needs {CORPUS}")
@pytest.mark.parametrize("language", ["zh", "en"])
def test_real_text_is_kept(terms, language):
    with gzip.open(CORPUS / f"{language}.jsonl.gz") as file:
        texts = [json.loads(line)["text"] for line in file]
    found = safety.score(documents(texts), SafetyConfig(), terms)
    assert found["reason"].null_count == len(texts)
    assert np.mean(found["safety"].to_numpy() < 0.9) < 0.005


def test_finds_all_terms_and_nothing_else():
    """Against a search for each term at each place."""
    rng = np.random.default_rng(0)
    alphabet = ["甲", "乙", "丙", " ab", " c", ",", "\n", " "]

    def draw(size):
        return "".join(rng.choice(alphabet, size))

    # One spelling of each: of several, the last would count.
    spelled = {
        _words(term): term.strip(" ,\n") for term in (draw(size) for size in [1, 2, 3, 4, 6] * 12)
    }
    spelled = {words: term for words, term in spelled.items() if words}
    listed = [("x", term, 1.0) for term in spelled.values()]
    texts = [draw(rng.integers(0, 120)) for _ in range(40)]
    made = safety.make_terms(listed)
    known = {words: len(term) for words, term in spelled.items()}
    joined = text.join(texts)
    found = safety.find(text.tokens(joined, True), made)
    got = set(zip(found.rows, found.starts, found.ends, strict=True))
    assert len(got) == len(found.rows)
    expected = set()
    for row, content in enumerate(texts):
        tokens = list(_tokens(content))
        places = []
        for first in range(len(tokens)):
            for count in range(1, 9):
                part = tokens[first : first + count]
                words = tuple(content[a:b] for a, b in part)
                if len(part) == count and part[-1][1] - part[0][0] <= known.get(words, 0):
                    places.append((part[0][0], part[-1][1]))
        for a, b in places:
            if not any((c <= a and b <= d) and (c, d) != (a, b) for c, d in places):
                start = joined.starts[row]
                expected.add((row, start + a, start + b))
    assert len(expected) > 200
    assert got == expected


def _tokens(content):
    start = None
    for at, character in enumerate(content + " "):
        word = character in "abc"
        if start is not None and not word:
            yield start, at
            start = None
        if word and start is None:
            start = at
        if character in "甲乙丙":
            yield at, at + 1


def _words(term):
    return tuple(term[a:b] for a, b in _tokens(term))


def test_han_terms_stand_together_and_words_have_one_sign_between():
    made = safety.make_terms([("x", "澳门赌场", 1.0), ("x", "free spins", 1.0)])
    texts = ["澳门赌场", "澳门。赌场", "澳 门 赌 场", "free  spins", "free-spins", "free\nspins"]
    texts += ["freespins", "Free Spins!", "unfree spins"]
    found = safety.find(text.tokens(text.join(texts), True), made)
    assert found.rows.tolist() == [0, 4, 5, 7]


def test_no_match_goes_from_text_to_text():
    made = safety.make_terms([("x", "a b c", 1.0), ("x", "甲乙", 1.0)])
    for texts in (["a b", "c"], ["a", "b c"], ["甲", "乙"], ["", "甲"], ["a b c", "甲乙", ""]):
        found = safety.find(text.tokens(text.join(texts), True), made)
        assert found.rows.tolist() == ([0, 1] if len(texts) == 3 else [])


def test_scores_grow_with_share_and_variety():
    made = safety.make_terms([("x", "bad", 1.0), ("x", "worse", 2.0), ("y", "odd", 1.0)])
    config = SafetyConfig(min_share=0.1, min_terms=2)
    filler = "fine " * 100
    texts = [
        "bad worse " + filler[: 5 * 98],
        "bad " * 5 + filler[: 5 * 95],
        "worse bad odd",
        "odd " * 3,
    ]
    scores = safety.list_scores(text.tokens(text.join([*texts, ""]), True), made, config)
    np.testing.assert_allclose(scores, [[0.3, 0], [0.5, 0], [1, 0.5], [0, 0.5], [0, 0]])


def test_lists_of_the_user(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text(
        "# mine\nspam\tbuy gold\t2\n\nspam\t黄金\nchat\tonline casino\nspam\tfree spins\t0\n"
    )
    config = SafetyConfig(lists=str(path))
    made = safety.read_terms(config)
    assert made.categories == (*safety.DEFAULT_TERMS, "spam", "chat")
    tokens = text.tokens(text.join(["Buy gold!", "黄金", "online casino", "free spins"]), True)
    found = safety.find(tokens, made)
    assert found.rows.tolist() == [0, 1, 2]  # 0 has switched the last off
    categories = [made.categories[made.category[t]] for t in found.terms]
    assert categories == ["spam", "spam", "chat"]  # a later list moves a term
    assert made.weights[found.terms].tolist() == [2, 1, 1]
    only = safety.read_terms(SafetyConfig(lists=str(path), default_lists=False))
    assert only.categories == ("spam", "chat") and len(only.keys) == 3
    nothing = safety.read_terms(SafetyConfig(default_lists=False))
    found = safety.score(documents(["buy gold"] * 2), SafetyConfig(), nothing)
    assert found["reason"].null_count == 2 and found["safety"].to_pylist() == [1, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("spam", "should be CATEGORY<TAB>TERM"),
        ("spam\ta\tb", "should be CATEGORY<TAB>TERM"),
        ("spam\ta\t-1", "weight of 0 or more"),
        ("spam\ta\tnan", "weight of 0 or more"),
        ("spam\ta\t1\tmore", "should be CATEGORY<TAB>TERM"),
        ("\ta", "should be CATEGORY<TAB>TERM"),
        ("spam\t---", "'---' has 0 words"),
        ("spam\ta b c d e f g h i", "has 9 words"),
    ],
)
def test_bad_lists(tmp_path, line, message):
    path = tmp_path / "mine.tsv"
    path.write_text(f"spam\tfine\n{line}\n")
    with pytest.raises(ValueError, match=r"mine.tsv, line 2: ") as error:
        safety.read_terms(SafetyConfig(lists=str(path)))
    assert message in str(error.value)


def test_refuses_bad_settings(tmp_path, terms):
    with pytest.raises(ValueError, match=r"none\.tsv is no file"):
        safety.read_terms(SafetyConfig(lists=str(tmp_path / "none.tsv")))
    (tmp_path / "latin.tsv").write_bytes(b"spam\tcaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin.tsv: byte 9 .*UTF-8"):
        safety.read_terms(SafetyConfig(lists=str(tmp_path / "latin.tsv")))
    SafetyConfig().check()
    for field, value, message in (
        ("min_share", 0.0, "must be above 0"),
        ("min_terms", 0, "must be 1 or more"),
        ("max_unsafe", 2.0, "must be between 0 and 1"),
        ("positive", "laws", "'laws' should be SOURCE=FACTOR"),
        ("unsafe", "bad.txt", "needs config.safety.safe, too"),
        ("safe", "good.txt", "needs config.safety.unsafe, too"),
        ("classifier", "none.npz", ".*none.npz"),
    ):
        with pytest.raises(ValueError, match=f"^config.safety.{field}={value}:? {message}"):
            SafetyConfig(**{field: value}).check()
    with pytest.raises(ValueError, match=r"latin.tsv: byte 9 .*UTF-8"):
        SafetyConfig(lists=str(tmp_path / "latin.tsv")).check()


def test_positive_sources():
    assert safety.factors("laws=2, care=1.5") == {"laws": 2, "care": 1.5}
    for wrong in ("laws", "laws=", "laws=0", "laws=-1", "laws=inf", "=2", "laws=two"):
        with pytest.raises(ValueError, match="should be SOURCE=FACTOR"):
            safety.factors(wrong)
    assert safety.factors("laws=2", ["laws", "web"]) == {"laws": 2}
    with pytest.raises(ValueError, match="no source 'lows', only laws, web"):
        safety.factors("lows=2", ["laws", "web"])


@pytest.mark.parametrize("simplify", [False, True])
def test_the_classifier_drops_too(terms, simplify, tmp_path):
    weights = np.zeros((1, 1 << BITS), np.float32)
    model = Linear(weights, np.float32([-3]), simplify=simplify)
    hashes = text.tokens(text.join(["恨", "hate"]), True).hashes
    weights[0, (hashes >> np.uint64(64 - BITS)).astype(int)] = 12
    path = tmp_path / "unsafe.npz"
    model.save(path)
    texts = ["我恨你", "恨", "hate!", "love", BAD["gambling"][0]]
    found = safety.score(documents(texts), SafetyConfig(), terms, str(path))
    expected = model.score(text.join(texts))
    dropped = ["safety: classifier" if p > 0.9 else None for p in expected[:4]]
    assert dropped.count(None) == 2
    assert found["reason"].to_pylist() == [*dropped, "safety: gambling"]
    np.testing.assert_allclose(found["safety"].to_numpy(), [*(1 - expected[:4]), 0], atol=1e-6)
    lenient = safety.score(documents(texts), SafetyConfig(max_unsafe=1), terms, str(path))
    assert lenient["reason"].to_pylist()[:4] == [None] * 4
