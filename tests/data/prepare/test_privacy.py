import time

import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import privacy
from baichuan_jax.data.prepare.privacy import PrivacyConfig


def table(texts, language="zh"):
    languages = [language] * len(texts)
    return pa.table(
        {"text": pa.array(texts, pa.string()), "language": pa.array(languages, pa.string())}
    )


def mask(text, language="zh", **options):
    found = privacy.mask(table([text], language), PrivacyConfig(**options))["text"][0].as_py()
    return text if found is None else found


def identity(seventeen):
    """A resident's number with its check digit, by the standard's own formula."""
    total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(seventeen))
    return seventeen + "10X98765432"[total % 11]


def card(digits):
    """A card's number with its check digit."""
    for last in "0123456789":
        doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits + last))]
        if sum(d - 9 * (d > 9) for d in doubled) % 10 == 0:
            return digits + last


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("联系li.lei@163.com或", "联系<EMAIL>或"),
        ("邮箱:Wang_2+x@mail.tsinghua.edu.cn。", "邮箱:<EMAIL>。"),
        ("Mail bob@site.co.uk.", "Mail <EMAIL>."),
        ("<a href='mailto:a-b@c-d.org'>", "<a href='mailto:<EMAIL>'>"),
        ("一二三＠qq.com", "一二三＠qq.com"),  # no user before it
        ("abc＠qq.com", "<EMAIL>"),
        ("JOE@SITE.COM", "<EMAIL>"),
    ],
)
def test_email(text, expected):
    assert mask(text) == expected
    assert mask(text, "code") == expected


@pytest.mark.parametrize(
    "text",
    [
        "you@example.com and me@mail.example.org",
        "git@github.com:org/repo.git, git@host.com",
        "ssh user@host",
        "scp file root@10.0.0.1:/tmp; scp x me@host.com:/srv",
        "npm i left-pad@1.3.0 @babel/core@7.2.1",
        "icon@2x.png and icon@2x.json",
        "y = q@k.transpose(0, 1); y = a@b.mT",
        "getty@tty1.service",
        "https://host/user@name.com/page",
        "@someone.com hello",
    ],
)
def test_no_email(text):
    assert mask(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("电话13812345678，", "电话<PHONE>，"),
        ("手机：138-1234-5678 转", "手机：<PHONE> 转"),
        ("138 1234 5678", "<PHONE>"),
        ("+86 13912345678", "<PHONE>"),
        ("+86-199-1234-5678", "<PHONE>"),
        ("8613912345678。", "<PHONE>。"),
        ("总机010-62345678", "总机<PHONE>"),
        ("(0755) 8234567", "<PHONE>"),
        ("（021）62345678", "<PHONE>"),
        ("Call (415) 555-2671 now", "Call <PHONE> now"),
        ("415-555-2671", "<PHONE>"),
        ("1.415.555.2671", "<PHONE>"),
        ("+44 20 7946 0958", "<PHONE>"),
        ("+4915112345678", "<PHONE>"),
    ],
)
def test_phone(text, expected):
    assert mask(text) == expected
    assert mask(text, "code") == text


@pytest.mark.parametrize(
    "text",
    [
        "17179869184 bytes, 13800000000 rows",  # 16 GiB; a round number
        "12812345678",  # no mobile prefix
        "id 4138123456789, 138123456789",
        "发布于2023-01-02 10:20:30，版本 1.10.20",
        "ISBN 978-7-111-54742-6, ISBN 0-306-40615-2",
        "arXiv:2309.10305, doi:10.1000/182",
        "commit 13812345678abc, /item/13812345678.html",
        "$13812345678",
        "pi = 3.13812345678",
        "3f2504e0-4f89-11d3-9a0c-13812345678f",
        "1 + 2 +100 and x+13 14",
        "range 2000-2010, 100-200-3000",
        "5%-10%, 13812345678%",
    ],
)
def test_no_phone(text):
    assert mask(text) == text


def test_identity_numbers():
    good = identity("11010519491231002")
    assert good == "11010519491231002X"  # the example of GB 11643
    assert mask(f"身份证{good}号") == "身份证<ID>号"
    assert mask(f"id: {good.lower()}", "code") == "id: <ID>"
    bad = [
        "110105194912310021",  # check digit
        identity("11010519490231002"),  # 31 February
        identity("99010519491231002"),  # no such province
        identity("11010517491231002"),  # born in 1749
        f"{good}7",
        f"x{good}",
    ]
    assert [mask(text) for text in bad] == bad


def test_cards():
    visa, union = card("453201511283036"), card("621700001000000000"[:18])
    assert mask(f"卡号{visa}。") == "卡号<CARD>。"
    assert mask(f"卡号{union}", "code") == "卡号<CARD>"
    amex = card("37828224631000")
    for text in (
        "4532 0151 1283 0366",
        "4532-0151-1283-0366",
        f"{amex[:4]} {amex[4:10]} {amex[10:]}",
    ):
        assert mask(text) == "<CARD>"
    other = str((int(visa[-1]) + 1) % 10)
    for text in (
        visa[:-1] + other,  # check digit
        "9" + visa,  # inside a longer number
        f"0.{visa}",
        f"x{visa}",
        card("978711154742"),  # an ISBN's digits
        "4611686018427387904",  # 2^62
        "433338421321818112",  # a time stamp of TiDB
        "4444444444444448",
        "4532 0151-1283 0366",
        "542F 5430 5431 5432 5433",  # a table of code points
        "1700000000000",
    ):
        assert mask(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("从47.95.123.45登录", "从<IP>登录"),
        ("http://47.95.123.45:8080/x", "http://<IP>:8080/x"),
        ("ip=47.95.123.45, IP:47.95.123.46", "ip=<IP>, IP:<IP>"),
        ("来自2408:8207:1850:2a60::4c2。", "来自<IP>。"),
        ("The server 47.95.123.45 is up; dev 47.95.123.46", "The server <IP> is up; dev <IP>"),
    ],
)
def test_addresses(text, expected):
    assert mask(text) == expected
    assert mask(text, "code") == text


@pytest.mark.parametrize(
    "text",
    [
        "192.168.1.100 10.20.30.40 172.16.254.1 127.0.0.1",
        "192.0.2.100 198.51.100.23 203.0.113.99 224.0.0.251 255.255.255.255",
        "2001:db8::1 fe80::1 ::1",
        "version 47.95.123.45, v47.95.123.45, 版本：47.95.123.45",
        "1.2.3.4 and 2.10.0.1",
        "pip install x==47.95.123.45 y>=47.95.123.45 z == 47.95.123.45",
        "47.95.123.0/24, 47.95.123.45/32 and 47.95.0.0",
        "1.3.6.1.4.1.311",
        "8.8.8.8 和 114.114.114.114",
        "999.95.123.45",
        "12:30:45 and 2024:01:02:03, x[2001::5], std::abc::def, 1:2408:8207:1850:2a60::4c2",
        "2a:3b:4c:5d:6e:7f",
    ],
)
def test_no_address(text):
    assert mask(text) == text


def test_counts_and_columns():
    texts = ["a@b.com, c@d.org, 13812345678", "nothing", None, ""]
    found = privacy.mask(table(texts), PrivacyConfig())
    assert found["text"].to_pylist() == ["<EMAIL>, <EMAIL>, <PHONE>", None, None, None]
    assert found["reason"].null_count == 4
    assert found["masked_email"].to_pylist() == [2, 0, 0, 0]
    assert found["masked_phone"].to_pylist() == [1, 0, 0, 0]
    assert found.schema.field("masked_ip").type == pa.uint32()
    assert privacy.mask(table([]), PrivacyConfig()).schema == found.schema


def test_config():
    text = "a@b.com 13812345678"
    assert mask(text, kinds="phone", placeholder="[{}]") == "a@b.com [PHONE]"
    assert mask(text, kinds="") == text
    with pytest.raises(ValueError, match=r"config\.privacy\.kinds=email,name has name: should be"):
        PrivacyConfig(kinds="email,name").check()
    with pytest.raises(ValueError, match=r"config\.privacy\.placeholder=X should have a \{\}"):
        mask(text, placeholder="X")  # where it is used, too
    assert mask(text, kinds="phone", placeholder="{{}{x}") == "a@b.com {PHONE{x}"


def test_a_long_text_takes_no_long_time():
    # Each is what a pattern almost matches, over and over.
    text = (
        "a." * 50_000 + "@ " + "1234-" * 20_000 + "+1 " * 30_000 + "2001:" * 20_000 + "1." * 50_000
    )
    start = time.process_time()
    assert mask(f"{text} 13812345678 x@y.com") == f"{text} <PHONE> <EMAIL>"
    assert time.process_time() - start < 5
