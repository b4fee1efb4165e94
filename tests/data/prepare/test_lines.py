import numpy as np
import pytest

from baichuan_jax.data.prepare import lines, text


def cut(texts, *gone):
    """The texts without the sentences that hold any of these."""
    joined = text.join(texts)
    found, whole = lines.lines(joined), "".join(texts)
    spans = zip(found.sentences.starts, found.sentences.ends, strict=True)
    drop = np.array([any(part in whole[a:b] for part in gone) for a, b in spans], bool)
    left = lines.cut(joined, found, drop)
    return [
        after or (before if after is None else "")
        for before, after in zip(texts, left, strict=True)
    ]


def of_lines(texts, function):
    """Of which lines, by their text, a function of (joined, lines) says yes."""
    joined = text.join(texts)
    found, whole = lines.lines(joined), "".join(texts)
    bounds = np.append(found.sentences.starts, len(whole))[found.firsts]
    chosen = np.flatnonzero(function(joined, found))
    return [whole[bounds[n] : bounds[n + 1]].strip() for n in chosen]


def of_heads(function):
    return lambda joined, found: function(lines.heads(joined, found))


def test_lines():
    joined = text.join(["", "One. Two.\r\n\nThree. ", "\n", "Four", ""])
    found = lines.lines(joined)
    assert found.opens.tolist() == [True, False, True, True, True]
    assert found.row.tolist() == [1, 1, 1, 2, 3]
    assert found.line.tolist() == [0, 0, 1, 2, 3]
    assert found.firsts.tolist() == [0, 2, 3, 4, 5]
    nothing = lines.lines(text.join([]))
    assert nothing.firsts.tolist() == [0] and lines.cut(text.join([]), nothing, nothing.opens) == []


@pytest.mark.parametrize("end", [*text.NEWLINES, "\r\n", "\n\n\n", ""])
def test_a_line_of_which_something_is_left_keeps_its_newline(end):
    texts = [f"One. Two. {end}", f"Three. Four.{end}One. Two. Four. {end}Five", "Two."]
    assert cut(texts, "Two") == [
        f"One. {end}",
        f"Three. Four.{end}One. Four. {end}Five",
        "",
    ]
    assert (
        cut(texts, "Four")
        == [
            texts[0],
            f"Three. {end}One. Two. {end}Five",
            "Two.",
        ]
        or not end
    )
    # All of a line goes with its newline.
    if end:
        assert cut(texts, "One", "Two") == ["", f"Three. Four.{end}Four. {end}Five", ""]
    assert cut(texts, "Six") == texts


def test_a_cut_of_many_newlines_takes_no_longer():
    texts = ["One. Two." + "\n" * 3_000_000 + "Three."]
    assert cut(texts, "Two") == [texts[0].replace("Two.", "")]


def test_fences_and_tables():
    texts = [
        "a\n  ```python\nb\n```\nc\n| d |\n+---+\n+ e\n`f`\n",
        "g\n\t~~~\nh",
        "i\n" + " " * 17 + "```\nj",
    ]
    assert of_lines(texts, of_heads(lines.fences)) == ["```python", "```", "~~~"]
    assert of_lines(texts, of_heads(lines.tables)) == ["| d |", "+---+"]
    # A fence that stays open ends with its text.
    fences = of_heads(lines.fences)
    inside = of_lines(texts, lambda joined, found: lines.inside(fences(joined, found), found))
    assert inside == ["```python", "b", "~~~", "h"]
