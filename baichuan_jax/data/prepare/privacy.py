"""Masks personal data (§2.1): e-mail, identity, card and telephone numbers, machines' addresses.

    write to li.lei@163.com or 138-1234-5678   →   write to <EMAIL> or <PHONE>

Most digits in manuals and code are no personal data. So each kind is checked by all that it has
to fulfil (checksums, dates, ranges in use), and what is part of a longer number, a version, a
hash, a path or an identifier is left alone. Documents of code are searched for e-mail, identity
and card numbers only.
"""

import abc
import dataclasses
import datetime
import ipaddress
import itertools
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from baichuan_jax.data import sources
from baichuan_jax.data.prepare import language


@dataclasses.dataclass
class PrivacyConfig:
    """What is masked, and by what."""

    kinds: str = "email,id,card,phone,ip"  # some of these
    placeholder: str = "<{}>"  # {} becomes EMAIL, ID, CARD, PHONE or IP

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong."""
        if unknown := set(sources.split(self.kinds)) - set(_KINDS):
            raise ValueError(
                f"config.privacy.kinds={self.kinds} has {', '.join(sorted(unknown))}: should be"
                f" some of {', '.join(_KINDS)}."
            )
        if "{}" not in self.placeholder:
            raise ValueError(
                f"config.privacy.placeholder={self.placeholder} should have a {{}} for the kind."
            )


def mask(documents: pa.Table, config: PrivacyConfig) -> pa.Table:
    """Masks personal data; a local stage.

    Args:
      documents: with `text` and `language`.

    Returns:
      One row a document: `reason` (null: none is dropped), `text` (null: unchanged), and how
      many of each kind were masked: `masked_email` and so on, uint32.

    Raises:
      ValueError: a field of the config is wrong.
    """
    config.check()
    kinds = sources.split(config.kinds)
    texts = pc.fill_null(documents["text"], "").combine_chunks()
    prose = np.not_equal(documents["language"].to_numpy(), language.CODE)
    numbers = _matches(texts, _NUMBERS)
    edited: dict[int, str] = {}
    masked = {}
    for name, kind in _KINDS.items():
        counts = np.zeros(len(texts), np.uint32)
        if name in kinds:
            likely = np.flatnonzero((prose | kind.in_code) & (numbers | (name == "email")))
            likely = likely[_matches(texts.take(likely), kind.pattern)].tolist()
            before = [edited[n] if n in edited else texts[n].as_py() for n in likely]
            after, counts[likely] = kind.mask(
                before, config.placeholder.replace("{}", name.upper())
            )
            edited |= {n: text for n, text in zip(likely, after, strict=True) if counts[n]}
        masked[f"masked_{name}"] = pa.array(counts)
    return pa.table(
        {
            "reason": pa.nulls(len(texts), pa.string()),
            "text": pa.array([edited.get(n) for n in range(len(texts))], pa.string()),
            **masked,
        }
    )


# Some part of every identity, card and telephone number, and of every address of a machine.
_NUMBERS = r"\d{7}|\d{4}[ -]\d{4}|\d{3}[-.]\d{4}|\+\d|\d\.\d{1,3}\.\d{1,3}\.\d|[23][0-9A-Fa-f]{3}:"


def _matches(texts: pa.StringArray, pattern: str) -> np.ndarray:
    return pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)


class _Kind(abc.ABC):
    """A kind of personal data: a pattern, for RE2 and Python both, and what is to hold besides."""

    pattern: str
    before = r"(?<![\w./+#$%-])"  # no part of a number, a name, a path or an amount of money
    after = r"(?![\w%]|[.-]\w)"
    in_code = False

    def __init__(self):
        # ASCII: a Chinese character is no part of a number beside it.
        self._expression = re.compile(f"{self.before}(?:{self.pattern}){self.after}", re.ASCII)

    @abc.abstractmethod
    def valid(self, match: re.Match) -> bool:
        """Whether a match of the pattern is such data."""

    def mask(self, texts: list[str], placeholder: str) -> tuple[list[str], list[int]]:
        """The texts, masked, and how often each of them was."""
        lines = [text.split("\n") for text in texts]
        counts = [0] * len(texts)
        row = np.repeat(np.arange(len(texts)), [len(of_text) for of_text in lines])
        first = np.searchsorted(row, np.arange(len(texts)))
        # Arrow finds the few lines that may have one, fast; Python then decides.
        every = pa.array(itertools.chain.from_iterable(lines), pa.string())
        for place in np.flatnonzero(_matches(every, self.pattern)):
            of_text, line = int(row[place]), int(place - first[row[place]])
            found = filter(self.valid, self._expression.finditer(lines[of_text][line]))
            for match in reversed(list(found)):
                before, after = match.string[: match.start()], lines[of_text][line][match.end() :]
                lines[of_text][line] = f"{before}{placeholder}{after}"
                counts[of_text] += 1
        return ["\n".join(of_text) for of_text in lines], counts


# Beside those of countries.
_TOP_DOMAINS = (
    "com net org edu gov mil int info biz name pro mobi asia tel jobs coop aero museum dev app"
    " xyz top vip site online club shop tech store cloud wang ltd group email work live fun ink"
    " link ren icu art blog news media studio design company center wiki"
)


class _Email(_Kind):
    pattern = r"[A-Za-z0-9][A-Za-z0-9._%+-]*[@＠](?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}"
    before = r"(?<![\w.%+/-])"
    after = r"(?![\w(-]|\.\w|:[\w/~])"  # a call; more of the name; a path on a host
    in_code = True
    _TOP = frozenset(_TOP_DOMAINS.split())
    _RESERVED = re.compile(r"(?:^|\.)example\.(?:com|net|org)$|^(?:\d{1,2}\.)+")

    def valid(self, match: re.Match) -> bool:
        user, domain = re.split("[@＠]", match[0].lower())
        top = domain.rsplit(".", 1)[1]
        known = top in self._TOP or (len(top) == 2 and match[0][-2:] in (top, top.upper()))
        return known and user != "git" and not self._RESERVED.search(domain)


class _Identity(_Kind):
    """Numbers of Chinese residents: place, date of birth, serial number, check digit."""

    pattern = r"[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx]"
    in_code = True
    _PROVINCE = re.compile("1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3]")
    _WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)

    def valid(self, match: re.Match) -> bool:
        number = match[0].upper()
        total = sum(
            weight * int(digit) for weight, digit in zip(self._WEIGHTS, number[:17], strict=True)
        )
        if not self._PROVINCE.match(number) or "10X98765432"[total % 11] != number[17]:
            return False
        try:
            datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
        except ValueError:
            return False
        return True


class _Card(_Kind):
    """Numbers of bank cards, in one piece or in groups, with their check digit."""

    pattern = (
        r"[2-6]\d{3}(?:[ -]?\d{4}){3}(?:[ -]?\d{1,3})?"
        r"|3[47]\d\d[ -]?\d{6}[ -]?\d{5}|3[068]\d\d[ -]?\d{6}[ -]?\d{4}"
    )
    before = r"(?<![\w.,/+#$%-])(?<!\d )(?<![\dA-F]{4} )"  # no part of a table of numbers
    after = r"(?![\w%]|[.,-]\w|\s\d)"
    in_code = True
    # First digits and lengths in use. Longer numbers that begin with 4 are identifiers.
    _ISSUED = re.compile(
        r"4\d{15}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|62\d{14,17}"
        r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    )

    def valid(self, match: re.Match) -> bool:
        digits = re.sub("[ -]", "", match[0])
        if len(set(re.sub(r"\d", "", match[0]))) > 1 or not self._ISSUED.fullmatch(digits):
            return False
        total = 0
        for place, digit in enumerate(reversed(digits)):
            doubled = int(digit) * (1 + place % 2)
            total += doubled - 9 * (doubled > 9)
        return total % 10 == 0 and len(set(digits)) > 2


class _Phone(_Kind):
    """Chinese mobile and fixed lines, North American numbers, others with a country's code."""

    pattern = (
        r"(?:(?:\+|00)?86[- ]?)?1(?:3\d|4[014-9]|5[0-35-9]|6[2567]|7[0-8]|8\d|9\d)(?:[- ]?\d{4}){2}"
        r"|(?:(?:\+|00)?86[- ]?)?(?:\(0\d{2,3}\) ?|（0\d{2,3}）|0(?:10|2\d|[3-9]\d\d)[- ])"
        r"[2-9]\d{6,7}"
        r"|(?:\+?1[-. ]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4}"
        r"|\+[1-9]\d{0,2}[- ]?(?:\(\d{1,4}\)[- ]?)?\d{2,4}(?:[- ]?\d{2,4}){1,4}"
    )

    def valid(self, match: re.Match) -> bool:
        digits = re.sub(r"\D", "", match[0])
        if match[0][0] == "+":
            return 9 <= len(digits) <= 15
        # Whole numbers of kilobytes, and round numbers, are amounts.
        amount = match[0] == digits and (int(digits) % 1_024 == 0 or int(digits) % 100_000 == 0)
        return not amount


# That everybody uses.
_NAME_SERVERS = (
    "8.8.8.8 8.8.4.4 1.1.1.1 1.0.0.1 9.9.9.9 208.67.222.222 114.114.114.114 223.5.5.5 223.6.6.6"
    " 119.29.29.29 180.76.76.76 2001:4860:4860::8888 2606:4700:4700::1111"
)


class _Address(_Kind):
    """Public IPv4 and IPv6 addresses of machines; not those of networks, and no versions."""

    pattern = r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}|[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}"
    # No part of a longer address, of a requirement (x==1.2.3.4), or a network (1.2.3.4/24).
    before = r"(?<![\w.-])(?<![0-9A-Fa-f]:)(?<![=<>~!]=)(?<!== )"
    after = r"(?!\w|[.-]\w|/\d|:[0-9A-Fa-f]*:)"
    _VERSION = re.compile(
        r"(?:(?<![a-z])(?:version|ver|release|build|v)|版本)\W{0,4}$", re.IGNORECASE
    )
    _SERVERS = frozenset(_NAME_SERVERS.split())

    def valid(self, match: re.Match) -> bool:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            return False
        if not address.is_global or address.is_multicast or match[0] in self._SERVERS:
            return False
        if address.version == 6:
            return len([group for group in match[0].split(":") if group]) >= 3
        before = match.string[max(0, match.start() - 16) : match.start()]
        few_digits = len(match[0]) < 7 + 3  # as versions have
        return not (few_digits or match[0].endswith(".0") or self._VERSION.search(before))


_KINDS = {
    "email": _Email(), "id": _Identity(), "card": _Card(), "phone": _Phone(), "ip": _Address(),
}  # fmt: skip
