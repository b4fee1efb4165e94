"""Made conversations in Chinese and English, for a first run without any download.

They are about sums, time, shopping, counting, kinship, colours and the like, in many
forms, and every answer is right: a model of a few million parameters can visibly learn
them. A skill returns a question and its answer; a document is a conversation of a few.
"""

import random
from collections.abc import Callable, Iterator

from baichuan_jax.data.document import Document

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_DIGITS = "零一二三四五六七八九"
_PEOPLE = {
    False: ["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Lily", "Tom"],
    True: ["小明", "小红", "小华", "小丽", "小刚", "小芳", "小军", "小梅", "小林", "小雨"],
}
_PLACES = [
    ("kitchen", "厨房"), ("garden", "花园"), ("school", "学校"), ("library", "图书馆"),
    ("park", "公园"), ("market", "市场"), ("station", "车站"), ("office", "办公室"),
]  # fmt: skip
_GOODS = [
    ("apple", "苹果", "个"), ("pencil", "铅笔", "支"), ("book", "书", "本"), ("cup", "杯子", "个"),
    ("egg", "鸡蛋", "个"), ("ticket", "票", "张"), ("orange", "橙子", "个"), ("hat", "帽子", "顶"),
    ("flower", "花", "朵"), ("shirt", "衬衫", "件"), ("chair", "椅子", "把"), ("fish", "鱼", "条"),
]  # fmt: skip
_COLOURS = [
    ("the sky on a clear day", "晴朗的天空", "blue", "蓝色"), ("grass", "草", "green", "绿色"),
    ("snow", "雪", "white", "白色"), ("coal", "煤", "black", "黑色"),
    ("a ripe banana", "熟了的香蕉", "yellow", "黄色"), ("blood", "血", "red", "红色"),
    ("a carrot", "胡萝卜", "orange", "橙色"), ("milk", "牛奶", "white", "白色"),
    ("an elephant", "大象", "grey", "灰色"), ("a tomato", "西红柿", "red", "红色"),
    ("a leaf in summer", "夏天的树叶", "green", "绿色"), ("an aubergine", "茄子", "purple", "紫色"),
    ("a crow", "乌鸦", "black", "黑色"), ("gold", "金子", "golden", "金色"),
    ("chocolate", "巧克力", "brown", "棕色"), ("a lemon", "柠檬", "yellow", "黄色"),
]  # fmt: skip
_OPPOSITES = [
    ("big", "大", "small", "小"), ("hot", "热", "cold", "冷"), ("tall", "高", "short", "矮"),
    ("fast", "快", "slow", "慢"), ("new", "新", "old", "旧"), ("day", "白天", "night", "黑夜"),
    ("long", "长", "short", "短"), ("heavy", "重", "light", "轻"), ("open", "开", "closed", "关"),
    ("early", "早", "late", "晚"), ("happy", "高兴", "sad", "难过"), ("wet", "湿", "dry", "干"),
    ("full", "满", "empty", "空"), ("left", "左", "right", "右"), ("up", "上", "down", "下"),
]  # fmt: skip
_WORDS = [
    ("water", "水"), ("fire", "火"), ("mountain", "山"), ("river", "河"), ("sun", "太阳"),
    ("moon", "月亮"), ("teacher", "老师"), ("student", "学生"), ("friend", "朋友"), ("rain", "雨"),
    ("book", "书"), ("tree", "树"), ("door", "门"), ("bread", "面包"), ("rice", "米饭"),
    ("tea", "茶"), ("horse", "马"), ("dog", "狗"), ("cat", "猫"), ("bird", "鸟"), ("city", "城市"),
    ("train", "火车"), ("music", "音乐"), ("winter", "冬天"), ("summer", "夏天"), ("heart", "心"),
    ("thank you", "谢谢"), ("good morning", "早上好"), ("goodbye", "再见"), ("happy", "高兴"),
]  # fmt: skip
_KIN = [
    ("father's father", "爸爸的爸爸", "grandfather", "爷爷"),
    ("father's mother", "爸爸的妈妈", "grandmother", "奶奶"),
    ("mother's father", "妈妈的爸爸", "grandfather", "外公"),
    ("mother's mother", "妈妈的妈妈", "grandmother", "外婆"),
    ("father's younger brother", "爸爸的弟弟", "uncle", "叔叔"),
    ("father's elder brother", "爸爸的哥哥", "uncle", "伯伯"),
    ("father's sister", "爸爸的姐妹", "aunt", "姑姑"),
    ("mother's brother", "妈妈的兄弟", "uncle", "舅舅"),
    ("mother's sister", "妈妈的姐妹", "aunt", "姨妈"),
    ("brother's son", "哥哥的儿子", "nephew", "侄子"),
    ("brother's daughter", "哥哥的女儿", "niece", "侄女"),
    ("son's son", "儿子的儿子", "grandson", "孙子"),
]
_DAYS = {
    False: ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    True: [f"星期{day}" for day in "一二三四五六日"],
}
_LEGS = [
    ("dog", "只狗", 4), ("chicken", "只鸡", 2), ("spider", "只蜘蛛", 8), ("ant", "只蚂蚁", 6),
    ("horse", "匹马", 4), ("duck", "只鸭子", 2), ("snake", "条蛇", 0), ("cat", "只猫", 4),
    ("bee", "只蜜蜂", 6), ("cow", "头牛", 4), ("pig", "头猪", 4), ("rabbit", "只兔子", 4),
]  # fmt: skip


def in_words(number: int, chinese: bool) -> str:
    """0 to 9,999 in words: 一百零五, one hundred and five."""
    if chinese:
        words, gap = "", False
        for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
            digit = number // unit % 10
            if digit:
                words += "零" * gap + _DIGITS[digit] + name
            gap = bool(words) and not digit
        words = words or "零"
        return words[1:] if words.startswith("一十") else words
    if number >= 1000:
        head, rest = f"{_ONES[number // 1000]} thousand", number % 1000
        joint = " and " if rest < 100 else " "
    elif number >= 100:
        head, rest, joint = f"{_ONES[number // 100]} hundred", number % 100, " and "
    elif number >= 20:
        head, rest, joint = _TENS[number // 10], number % 10, "-"
    else:
        return _ONES[number]
    return head + (joint + in_words(rest, chinese) if rest else "")


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 or noun == "fish" else f"{number} {noun}s"


def _arithmetic(pick: random.Random, chinese: bool) -> tuple[str, str]:
    sign = pick.choice("+-×÷")
    a, b = pick.randint(1, 99), pick.randint(1, 99)
    if sign in "×÷":
        a, b = pick.randint(2, 12), pick.randint(2, 12)
    a, b = {"+": (a, b), "-": (max(a, b), min(a, b)), "×": (a, b), "÷": (a * b, b)}[sign]
    result = {"+": a + b, "-": a - b, "×": a * b, "÷": a // b}[sign]
    if pick.random() < 0.5:
        sum_ = f"{a} {sign} {b}"
        question = f"{sum_} 等于多少？" if chinese else f"What is {sum_}?"
        return question, f"{sum_} = {result}" + ("。" if chinese else ".")
    numbers = [in_words(n, chinese) for n in (a, b, result)]
    if chinese:
        verb = {"+": "加", "-": "减", "×": "乘以", "÷": "除以"}[sign]
        question, is_ = f"{numbers[0]}{verb}{numbers[1]}", "等于"
        return f"{question}{is_}多少？", f"{question}{is_}{numbers[2]}。"
    verb = {"+": "plus", "-": "minus", "×": "times", "÷": "divided by"}[sign]
    question = f"{numbers[0]} {verb} {numbers[1]}"
    return f"What is {question}?", f"{question} is {numbers[2]}.".capitalize()


def _shopping(pick: random.Random, chinese: bool) -> tuple[str, str]:
    noun, name, measure = pick.choice(_GOODS)
    price, number = pick.randint(2, 9), pick.randint(2, 9)
    total = price * number
    paid = (total // 10 + 1) * 10
    who = pick.choice(_PEOPLE[chinese])
    if chinese:
        question = f"一{measure}{name}{price}元，{who}买了{number}{measure}，一共要付多少钱？"
        answer = f"{price} × {number} = {total}，一共要付{total}元。"
        if pick.random() < 0.5:
            question += f"付{paid}元，找回多少？"
            answer += f"{paid} - {total} = {paid - total}，找回{paid - total}元。"
        return question, answer
    each = f"One {noun} costs {price} yuan. {who} buys {_plural(number, noun)}."
    answer = f"{price} × {number} = {total}, so {who} pays {total} yuan."
    if pick.random() < 0.5:
        answer += f" The change is {paid} - {total} = {paid - total} yuan."
        return f"{each} How much change is there from {paid} yuan?", answer
    return f"{each} How much is that?", answer


def _time(pick: random.Random, chinese: bool) -> tuple[str, str]:
    hour, minute, later = pick.randint(1, 11), 5 * pick.randint(0, 11), 5 * pick.randint(1, 20)
    end = hour * 60 + minute + later
    start, end = f"{hour}:{minute:02d}", f"{(end // 60 - 1) % 12 + 1}:{end % 60:02d}"
    if chinese:
        return f"现在是{start}，过{later}分钟是几点？", f"过{later}分钟是{end}。"
    return f"It is {start} now. What time is it in {later} minutes?", f"It will be {end}."


def _week(pick: random.Random, chinese: bool) -> tuple[str, str]:
    days, today, later = _DAYS[chinese], pick.randint(0, 6), pick.randint(1, 6)
    now, then = days[today], days[(today + later) % 7]
    if chinese:
        return f"今天是{now}，{later}天后是星期几？", f"{later}天后是{then}。"
    phrase = _plural(later, "day")
    return f"Today is {now}. What day is it in {phrase}?", f"In {phrase} it is {then}."


def _compare(pick: random.Random, chinese: bool) -> tuple[str, str]:
    (a, b), (x, y) = pick.sample(_PEOPLE[chinese], 2), pick.sample(range(5, 90), 2)
    older, gap = (a if x > y else b), abs(x - y)
    if chinese:
        return (
            f"{a}今年{x}岁，{b}今年{y}岁，谁的年龄大？大几岁？",
            f"{older}的年龄大，大{gap}岁。",
        )
    question = f"{a} is {x} years old and {b} is {y}. Who is older, and by how much?"
    return question, f"{older} is older, by {_plural(gap, 'year')}."


def _count(pick: random.Random, chinese: bool) -> tuple[str, str]:
    start, number = pick.randint(1, 60), pick.randint(4, 9)
    step = pick.choice([1, 1, 2, 3, 5, 10])
    values = [str(start + step * i) for i in range(number)]
    if chinese:
        question = f"从{values[0]}开始，每次加{step}，数{number}个数。"
        return question, "、".join(values) + "。"
    question = f"Count {number} numbers from {values[0]} in steps of {step}."
    return question, ", ".join(values) + "."


def _inventory(pick: random.Random, chinese: bool) -> tuple[str, str]:
    (noun, name, measure), (a, b) = pick.choice(_GOODS), pick.sample(_PEOPLE[chinese], 2)
    had = pick.randint(4, 30)
    gave, got = pick.randint(1, had - 1), pick.randint(1, 20)
    left = had - gave
    if chinese:
        return (
            f"{a}有{had}{measure}{name}，给了{b}{gave}{measure}，又买了{got}{measure}，"
            f"现在有几{measure}？",
            f"{had} - {gave} = {left}，{left} + {got} = {left + got}，"
            f"现在有{left + got}{measure}。",
        )
    return (
        f"{a} has {_plural(had, noun)}, gives {gave} to {b} and then buys {got} more."
        f" How many does {a} have now?",
        f"{had} - {gave} = {left} and {left} + {got} = {left + got},"
        f" so {a} has {_plural(left + got, noun)}.",
    )


def _where(pick: random.Random, chinese: bool) -> tuple[str, str]:
    (a, b), places = pick.sample(_PEOPLE[chinese], 2), pick.sample(_PLACES, 3)
    first, second, third = (place[chinese] for place in places)
    who, where = pick.choice([(a, third), (b, second)])
    if chinese:
        return (
            f"{a}去了{first}，{b}去了{second}，然后{a}去了{third}。{who}在哪里？",
            f"{who}在{where}。",
        )
    story = f"{a} went to the {first}. {b} went to the {second}. Then {a} went to the {third}."
    return f"{story} Where is {who}?", f"{who} is in the {where}."


def _fact(pick: random.Random, chinese: bool) -> tuple[str, str]:
    kind = pick.randint(0, 4)
    if kind == 0:
        thing, name, colour, hue = pick.choice(_COLOURS)
        if chinese:
            return f"{name}是什么颜色的？", f"{name}是{hue}的。"
        return f"What colour is {thing}?", f"{thing[0].upper()}{thing[1:]} is {colour}."
    if kind == 1:
        word, name, other, opposite = pick.choice(_OPPOSITES)
        if chinese:
            return f"“{name}”的反义词是什么？", f"“{name}”的反义词是“{opposite}”。"
        return f"What is the opposite of {word}?", f"The opposite of {word} is {other}."
    if kind == 2:
        word, name = pick.choice(_WORDS)
        if chinese:
            return f"“{name}”用英语怎么说？", f"“{name}”用英语说是“{word}”。"
        return f'How do you say "{word}" in Chinese?', f'"{word}" is “{name}” in Chinese.'
    if kind == 3:
        relation, name, kin, title = pick.choice(_KIN)
        if chinese:
            return f"{name}叫什么？", f"{name}叫{title}。"
        return f"Who is my {relation}?", f"My {relation} is my {kin}."
    animal, name, legs = pick.choice(_LEGS)
    number = pick.randint(1, 9)
    if chinese:
        return (
            f"{number}{name}有几条腿？",
            f"{number} × {legs} = {number * legs}，有{number * legs}条腿。",
        )
    question = f"How many legs {'does' if number == 1 else 'do'} {_plural(number, animal)} have?"
    return question, f"{number} × {legs} = {number * legs}, so {_plural(number * legs, 'leg')}."


_SKILLS: list[Callable[[random.Random, bool], tuple[str, str]]] = [
    _arithmetic, _arithmetic, _shopping, _time, _week, _compare, _count, _inventory, _where,
    _fact, _fact, _fact,
]  # fmt: skip


def dialogue(num_documents: int | None, seed: int) -> Iterator[Document]:
    """Made conversations, half of them Chinese, half English; every answer is right.

    Document i depends on `seed` and i alone. None means without end.
    """
    number = 0
    while num_documents is None or number < num_documents:
        pick = random.Random(f"{seed}/{number}")
        number += 1
        chinese = pick.random() < 0.5
        asker, answerer = pick.sample(_PEOPLE[chinese], 2)
        colon = "：" if chinese else ": "
        frame = pick.randint(0, 2)
        if frame == 0:
            asker, answerer = ("问", "答") if chinese else ("Question", "Answer")
        lines = []
        for _ in range(pick.randint(1, 6)):
            question, answer = pick.choice(_SKILLS)(pick, chinese)
            lines += [f"{asker}{colon}{question}", f"{answerer}{colon}{answer}"]
        if frame == 1:
            hello, bye = ("你好", "再见") if chinese else ("Hello", "Goodbye")
            end, comma = ("！", "，") if chinese else ("!", ", ")
            lines.insert(0, f"{asker}{colon}{hello}{comma}{answerer}{end}")
            lines.append(f"{asker}{colon}{'谢谢，' if chinese else 'Thank you. '}{bye}{end}")
        yield Document("\n".join(lines), "dialogue", "zh" if chinese else "en")
