"""Drops harmful documents before pre-training, and raises good sources (§4.1).

Two filters, as in the paper: word lists, and a classifier trained on unsafe and safe examples.

A list says little about one word and much about many: a document is dropped where terms of one
category are both dense and of several kinds. Laws, news, medicine, dictionaries and novels have
such words, too, but few of them, or always the same. The lists here are small on purpose. They
have what advertisements and abuse are full of and other texts hardly ever say, and no plain word
of anatomy, crime, gambling or history. Give your own by `lists`.

All terms are looked for at once: a table of bits, by the hash of their first two tokens, leaves
few places to look at, however many terms there are.

Shapes: K tokens of a batch, N documents, L terms, M matches.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from etils import epath

from baichuan_jax.data import sources
from baichuan_jax.data.prepare import linear, text
from baichuan_jax.data.prepare.text import Tokens

MAX_TOKENS = 8  # of a term
FIELDS = ("config.safety.unsafe", "config.safety.safe", "config.safety.classifier")
_PAIR_MULTIPLIER = np.uint64(0xA0761D6478BD642F)  # odd: the first constant of wyhash

# Category -> terms, separated by commas. Offensive by nature.
DEFAULT_TERMS = {
    "violence": """
        crush video, snuff video, hitman for hire, hire a hitman, how to make a bomb,
        how to build a bomb, make a pipe bomb, buy guns online, untraceable guns,
        go kill yourself, slit your throat, i will kill you all, beheading video, gore video,
        snuff film, torture video, execution video,
        血腥视频, 虐杀视频, 砍头视频, 杀人视频, 处决视频, 肢解视频, 虐猫视频, 自制炸弹, 自制炸药,
        炸弹配方, 炸药配方, 炸弹制作教程, 出售枪支, 枪支出售, 枪支专卖, 手枪专卖, 手枪出售,
        气枪专卖, 气枪出售, 猎枪专卖, 仿真枪专卖, 出售子弹, 子弹出售, 弩箭专卖, 买凶杀人,
        雇佣杀手, 杀手网, 出售迷药, 迷药专卖, 迷药出售, 听话水, 杀你全家, 砍死你, 军用枪支出售""",
    "pornography": """
        porn videos, free porn, porn tube, porn movies, porn pics, hardcore porn, amateur porn,
        teen porn, gay porn, lesbian porn, xxx videos, xxx movies, xxx porn, sex videos, sex tube,
        sex cams, live sex, sex chat, sex dating, nude pics, nude cams, nude girls, horny girls,
        horny milf, milf, milfs, blowjob, blowjobs, cumshot, cumshots, creampie, gangbang,
        bukkake, deepthroat, handjob, camgirl, camgirls, webcam girls, hentai, escort girls,
        escort services, adult dating, erotic massage, wet pussy, tight pussy, big cock,
        huge cock, big tits, huge tits, big boobs, big ass, hot babes, porn video, sex video,
        xxx video, sex cam, escort service,
        色情视频, 色情电影, 色情直播, 色情小说, 色情图片, 色情片, 成人视频, 成人电影, 成人小说,
        成人直播, 成人影院, 黄色视频, 黄色电影, 黄色小说, 看黄片, 黄片网站, 毛片网站, 免费a片,
        av女优, av在线, av电影, 无码av, 无码视频, 无码专区, 有码视频, 日韩无码, 国产自拍,
        自拍偷拍, 偷拍自拍, 东京热, 激情视频, 激情小说, 裸聊, 裸体直播, 约炮, 同城一夜情,
        同城援交, 援交妹, 楼凤兼职, 小姐上门, 美女上门服务, 小姐包夜, 莞式服务, 强奸乱伦,
        乱伦小说, 人妻熟女, 熟女人妻, 淫水, 淫妻, 骚逼, 骚穴, 操逼, 鸡巴, 大肉棒, 巨乳, 爆乳,
        颜射, 性奴, 丝袜诱惑, 制服诱惑, 在线看片, 三级片在线""",
    "hate": """
        nigger, niggers, kike, kikes, fucking faggot, fucking faggots, wetback, wetbacks,
        towelhead, towelheads, raghead, ragheads, sand nigger, gook, gooks, spics, trannies,
        subhuman scum, subhuman race, race traitor, race traitors, mud races, white power,
        white genocide, gas the jews, kill all jews, dirty jews, filthy jews, filthy muslims,
        kill all muslims, racial holy war,
        支那猪, 支那贱畜, 死黑鬼, 黑鬼滚, 高丽棒子, 犹太猪, 白皮猪, 黄皮猴, 死基佬, 死人妖,
        死瘸子, 劣等民族, 劣等种族, 低等民族, 低等人种, 杂种民族, 杀光黑人, 杀光犹太人,
        滚出我们国家""",
    "gambling": """
        casino bonus, mobile casino, no deposit bonus, free spins, wagering requirements,
        real money slots, progressive jackpot, best online casino, top online casino,
        real money casino, casino bonus code, casino promo code, no deposit casino, welcome bonus,
        deposit bonus, free bets, play online slots, play slots online, live casino games,
        play for real money, claim your bonus, online casino reviews, best betting site, bet now,
        澳门赌场, 博彩平台, 博彩论坛, 真人娱乐, 真人百家乐, 百家乐, 时时彩, 北京赛车pk10,
        幸运飞艇, 六合彩, 六合彩特码, 特码资料, 老虎机游戏, 送彩金, 彩金优惠, 首存优惠, 投注平台,
        投注网站, 滚球投注, 现金网, 皇冠体育, 新葡京, 太阳城娱乐, 金沙娱乐, 威尼斯人娱乐,
        娱乐城开户, 棋牌平台, 德州扑克平台, 信誉平台, 网上真人赌场, 真人荷官, 体育投注首选,
        足球投注平台, 网上投注平台, 博彩公司直营, 博彩导航, 注册送, 电子老虎机开户,
        赌场官网""",
    "scams": """
        cheap viagra, buy viagra, viagra online, generic viagra, buy cialis, cialis online,
        generic cialis, cheap cialis, buy levitra, payday loans, cash advance loans,
        bad credit loans, make money fast, replica watches, replica handbags, fake ids,
        fake passports, male enhancement, penis enlargement, enlargement pills, weight loss pills,
        double your bitcoin, guaranteed profits, claim your prize, buy followers, cloned cards,
        fake id, payday loan, cloned card, counterfeit bills for sale,
        代开发票, 发票代开, 代办发票, 办证刻章, 刻章办证, 代办证件, 办假证, 高仿手表, 高仿包,
        精仿手表, 刷单兼职, 兼职刷单, 日入过万, 日赚千元, 躺赚, 稳赚不赔, 包赚不赔, 无抵押贷款,
        信用卡套现, 枪手替考, 替考包过, 考试包过, 代办文凭, 文凭办理, 办理文凭, 收购银行卡,
        出售银行卡, 跑分平台, 出售假币, 假币出售, 窃听器专卖, 手机监听器, 复制手机卡, 壮阳药,
        伟哥专卖, 增大增粗, 丰胸产品""",
}


@dataclasses.dataclass
class SafetyConfig:
    """What is harmful, and what is worth more."""

    default_lists: bool = True  # the terms of this file
    # Files of more, a term a line: CATEGORY<TAB>TERM[<TAB>WEIGHT]. They come after the default
    # ones; the weight 0 switches a term off.
    lists: str = ""
    # A document is dropped where a category's terms are so many for its tokens (each counted by
    # its weight), and so many different ones.
    min_share: float = 0.01
    min_terms: int = 4
    unsafe: str = ""  # sources of unsafe examples, for the classifier
    safe: str = ""  # sources of safe ones
    classifier: str = ""  # or a classifier that is trained already: a file `Linear.save` wrote
    max_unsafe: float = 0.9  # documents that the classifier finds more likely unsafe are dropped
    positive: str = ""  # SOURCE=FACTOR,…: sources that are seen so many times more often in the mix

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong, or the list and its line."""
        if not self.min_share > 0:
            raise ValueError(f"config.safety.min_share={self.min_share} must be above 0.")
        if self.min_terms < 1:
            raise ValueError(f"config.safety.min_terms={self.min_terms} must be 1 or more.")
        if not 0 <= self.max_unsafe <= 1:
            raise ValueError(f"config.safety.max_unsafe={self.max_unsafe} must be between 0 and 1.")
        factors(self.positive)
        read_terms(self)
        linear.check_choice(FIELDS, self.unsafe, self.safe, self.classifier)


@dataclasses.dataclass(frozen=True)
class Terms:
    """Terms to look for, sorted by their keys: the hash of their first two tokens, or of one."""

    categories: tuple[str, ...]
    tokens: np.ndarray  # uint64 [L, MAX_TOKENS]; 0 after the last
    counts: np.ndarray  # int64 [L] of tokens
    lengths: np.ndarray  # int64 [L], characters
    weights: np.ndarray  # float64 [L]
    category: np.ndarray  # int64 [L], in `categories`
    kinds: np.ndarray  # int64 [L]; terms that differ by a plural s are of one kind
    keys: np.ndarray  # uint64 [L]


@dataclasses.dataclass(frozen=True)
class Matches:
    """Where terms are, in the order of the text."""

    terms: np.ndarray  # int64 [M]
    rows: np.ndarray  # int64 [M], of the texts
    starts: np.ndarray  # int64 [M], in the codes
    ends: np.ndarray  # int64 [M]


def score(
    documents: pa.Table, config: SafetyConfig, terms: Terms, classifier: str = ""
) -> pa.Table:
    """Drops unsafe documents; a local stage.

    Args:
      documents: with `text` and `language`.
      terms: see `read_terms`.
      classifier: the file of what `linear_training.fit` gives; '': the lists decide alone.

    Returns:
      One row a document: `reason` ("safety: CATEGORY", "safety: classifier", or null); `safety`
      (float32: 1 for what no filter minds, 0 for what the lists drop; at most 1 - the
      classifier's probability).

    Raises:
      ValueError: the file is no classifier.
    """
    model = linear.load(classifier) if classifier else None
    texts, languages = documents["text"], documents["language"].to_pylist()
    listed = np.zeros((len(documents), len(terms.categories)))
    unsafe = np.zeros(len(documents))
    for rows in text.batches(texts):
        joined = text.join(texts[rows])
        tokens = text.tokens(joined, simplify=True)
        listed[rows] = list_scores(tokens, terms, config)
        if model is not None and model.simplify:
            unsafe[rows] = model.score_tokens(tokens, languages[rows])
        elif model is not None:
            unsafe[rows] = model.score(joined, languages[rows])
    worst = listed.max(axis=1, initial=0)
    names = np.array([f"safety: {name}" for name in (*terms.categories, "classifier")], object)
    by_list = worst >= 1
    kind = np.where(by_list, listed.argmax(1) if listed.size else 0, len(names) - 1)
    dropped = by_list | (unsafe > config.max_unsafe)
    return pa.table(
        {
            "reason": pa.array(names[kind], pa.string(), mask=~dropped),
            "safety": pa.array(1 - np.maximum(worst, unsafe), pa.float32()),
        }
    )


def list_scores(tokens: Tokens, terms: Terms, config: SafetyConfig) -> np.ndarray:
    """float64 [N, categories]: how much of a category's terms each text has; 1 is too much.

    The score is the share of the tokens that are terms, or the number of different terms (a plural
    is no other), each divided by what is too much of it, whichever is less.
    """
    num_rows, num_categories = len(tokens.rows) - 1, len(terms.categories)
    found = find(tokens, terms)
    cells = found.rows * num_categories + terms.category[found.terms]
    size = num_rows * num_categories
    hits = np.bincount(cells, terms.weights[found.terms], minlength=size)
    _, first = np.unique(np.stack([cells, terms.kinds[found.terms]]), axis=1, return_index=True)
    different = np.bincount(cells[first], minlength=size)
    most = np.repeat(np.maximum(config.min_share * np.diff(tokens.rows), 1e-9), num_categories)
    scores = np.minimum(hits / most, different / config.min_terms)
    return np.minimum(scores, 1).reshape(num_rows, num_categories)


def find(tokens: Tokens, terms: Terms) -> Matches:
    """All places of all terms, but none that lies inside another.

    A match is not longer than its term as it is written: Han characters stand beside each other,
    and words have one sign between them.
    """
    last = np.repeat(tokens.rows[1:], np.diff(tokens.rows))  # of each token: where its text ends
    places, which = [], []
    for keys, of_width in (
        (tokens.hashes, terms.counts == 1),
        (_pair_keys(tokens.hashes), terms.counts > 1),
    ):
        chosen = np.flatnonzero(of_width)
        at, term = _same(keys, terms.keys[chosen])
        places.append(at)
        which.append(chosen[term])
    at, term = np.concatenate(places), np.concatenate(which)
    inside = at + terms.counts[term] <= last[at]
    at, term = at[inside], term[inside]
    good = np.ones(len(at), bool)
    for n in range(MAX_TOKENS):
        token = tokens.hashes[np.minimum(at + n, max(len(tokens.hashes) - 1, 0))]
        good &= (n >= terms.counts[term]) | (token == terms.tokens[term, n])
    starts, ends = tokens.starts[at], tokens.ends[np.minimum(at + terms.counts[term], last[at]) - 1]
    good &= ends - starts <= terms.lengths[term]
    at, term, starts, ends = at[good], term[good], starts[good], ends[good]
    order = np.lexsort((term, -ends, starts))
    at, term, starts, ends = at[order], term[order], starts[order], ends[order]
    furthest = np.maximum.accumulate(np.concatenate([[-1], ends]))[:-1]
    outer = ends > furthest
    rows = np.searchsorted(tokens.rows, at[outer], "right") - 1
    return Matches(term[outer], rows, starts[outer], ends[outer])


def read_terms(config: SafetyConfig) -> Terms:
    """The terms of the config's lists.

    Raises:
      ValueError: names the file and the line at fault.
    """
    listed = []  # category, term, weight
    if config.default_lists:
        for category, joined in DEFAULT_TERMS.items():
            listed += [(category, term.strip(), 1.0) for term in joined.split(",")]
    for path in sources.split(config.lists):
        listed += _read_list(epath.Path(path).expanduser())
    return make_terms(listed)


def make_terms(listed: Sequence[tuple[str, str, float]]) -> Terms:
    """Terms of (category, term, weight); a later one replaces an earlier, and 0 removes it.

    Raises:
      ValueError: a term has no token, or too many.
    """
    categories = tuple(dict.fromkeys(category for category, _, _ in listed))
    found = text.tokens(text.join([term for _, term, _ in listed]), simplify=True)
    counts = np.diff(found.rows)
    for (_, term, _), count in zip(listed, counts, strict=True):
        if not 1 <= count <= MAX_TOKENS:
            raise ValueError(
                f"The term {term!r} has {count} words or Han characters; it should have 1 to"
                f" {MAX_TOKENS}."
            )
    at = np.minimum(found.rows[:-1, None] + np.arange(MAX_TOKENS), max(len(found.hashes) - 1, 0))
    hashes = np.where(np.arange(MAX_TOKENS) < counts[:, None], found.hashes[at], np.uint64(0))
    pairs = hashes[:, 0] * _PAIR_MULTIPLIER + hashes[:, 1]
    keys = np.where(counts == 1, hashes[:, 0], pairs)
    numbers = np.array([categories.index(category) for category, _, _ in listed], np.int64)
    weights = np.array([weight for _, _, weight in listed], np.float64)
    _, first = np.unique(hashes[::-1], axis=0, return_index=True)
    order = len(listed) - 1 - first  # of a term that is listed twice, the last
    order = order[weights[order] > 0]
    order = order[np.argsort(keys[order], kind="stable")]
    lengths = found.ends[found.rows[1:] - 1] - found.starts[found.rows[:-1]]
    stems = [re.sub(r"s\b", "", term.casefold()) for _, term, _ in listed]
    _, kinds = np.unique(np.array(stems, str), return_inverse=True)
    columns = (hashes, counts, lengths, weights, numbers, kinds, keys)
    return Terms(categories, *(column[order] for column in columns))


def factors(positive: str, known: Sequence[str] | None = None) -> dict[str, float]:
    """Source -> how many times more often it is seen in the mix; for `mixture.set_weights`.

    Raises:
      ValueError: `positive` is not SOURCE=FACTOR,…; or a source is not among those known.
    """
    found = {}
    for part in sources.split(positive):
        name, _, number = part.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = math.nan
        if not name or not 0 < found[name] < math.inf:
            raise ValueError(
                f"config.safety.positive={positive}: {part!r} should be SOURCE=FACTOR with a factor"
                " above 0, such as 'laws=2'."
            )
        if known is not None and name not in known:
            raise ValueError(
                f"config.safety.positive={positive}: there is no source {name!r}, only"
                f" {', '.join(known)}."
            )
    return found


def _read_list(path: epath.Path) -> list[tuple[str, str, float]]:
    if not path.is_file():
        raise ValueError(f"config.safety.lists: {path} is no file.")
    try:
        lines = path.read_bytes().decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} of it is not UTF-8.") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        category, *fields = (field.strip() for field in line.split("\t"))
        try:
            term, weight = fields[0], float(fields[1]) if len(fields) > 1 else 1.0
        except (IndexError, ValueError):
            weight = math.nan
        if len(fields) > 2 or not category or not 0 <= weight < math.inf:
            raise ValueError(
                f"{path}, line {number}: {line!r:.80} should be CATEGORY<TAB>TERM or"
                " CATEGORY<TAB>TERM<TAB>WEIGHT, with a weight of 0 or more."
            )
        try:
            make_terms([(category, term, weight)])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        found.append((category, term, weight))
    return found


def _pair_keys(hashes: np.ndarray) -> np.ndarray:
    """Of each token and the one after it, in whichever text; of the last, nothing."""
    keys = hashes[:-1] * _PAIR_MULTIPLIER
    keys += hashes[1:]
    return keys


def _same(keys: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (place in keys, place in known), where both are the same; `known` is sorted."""
    bits = max(16, (8 * len(known)).bit_length())
    shift = np.uint64(64 - bits)
    table = np.zeros(1 << bits, bool)
    table[known >> shift] = True
    likely = np.flatnonzero(table[(keys >> shift).view(np.int64)])
    first = np.searchsorted(known, keys[likely], "left")
    count = np.searchsorted(known, keys[likely], "right") - first
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(likely, count), np.repeat(first, count) + number
