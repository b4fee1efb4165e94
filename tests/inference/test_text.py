"""Streamed text beside the decoding of all tokens at once."""

import pathlib
import random

import pytest
from sentencepiece import sentencepiece_model_pb2

from baichuan_jax import tokenizer as tokenizer_module
from baichuan_jax.inference.text import TextStream

RELEASED = pathlib.Path(__file__).parents[2] / "../shared/data/tokenizers/baichuan2.model"
KINDS = ["ours", "dummy_prefix", "released"]
SENTENCES = ["今天天气很好，我们去公园。", "The dog sleeps, the fox jumps.", "数字 12345\n\t  结束"]
MIXED = "好的👍🏽！𠮷野家 <reserved_106> the 中文\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [(SENTENCES[i % len(SENTENCES)], "a") for i in range(300)]
    tokenizer_module.train(texts, path, vocab_size=490)
    return path


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, path):
    if request.param == "released":
        if not RELEASED.exists():
            pytest.skip(f"the released tokenizer is not at {RELEASED}")
        return tokenizer_module.Tokenizer(RELEASED)
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = request.param == "dummy_prefix"
    copy = path.with_name(f"{request.param}.model")
    copy.write_bytes(model.SerializeToString())
    return tokenizer_module.Tokenizer(copy)


def streamed(tokenizer, ids, stop=(), continues=True):
    """The pieces, whether it stopped, and the tokens that were taken."""
    stream, pieces = TextStream(tokenizer, stop, continues), []
    for count, token in enumerate(ids, start=1):
        pieces.append(stream.add(token))
        assert stream.text == "".join(pieces)
        if stream.stopped:
            assert stream.finish() == "" and stream.add(ids[0]) == ""
            return pieces, True, count
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return pieces, stream.stopped, len(ids)


def cut(text, stop):
    """What comes before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        found = [len(string) for string in stop if text[:end].endswith(string)]
        if found:
            return text[: end - max(found)], True
    return text, False


def random_ids(tokenizer, rng):
    """Words, bytes at random (cut characters), whole emoji, special and unknown tokens."""
    byte = tokenizer.encode("\x01")[-1] - 1
    space = tokenizer.encode("a  b")
    ids = []
    for _ in range(rng.randint(1, 25)):
        kind = rng.randrange(6)
        if kind == 0:
            ids += tokenizer.encode(rng.choice(["👍", "𠮷", "🏽", "好", "\u2581"]))
        elif kind == 1:
            ids += [byte + rng.randrange(256) for _ in range(rng.randint(1, 5))]
        elif kind == 2:
            character = rng.choice(["🚀", "é", "龘", "ﷺ"]).encode()
            ids += [byte + value for value in character[: rng.randint(1, 4)]]
        elif kind == 3:
            ids.append(rng.choice([0, 1, 2, *space]))
        else:
            ids.append(rng.randrange(tokenizer.vocab_size))
    return ids


def test_pieces_are_the_decoded_text(tokenizer):
    rng = random.Random(0)
    replaced = 0
    for _ in range(400):
        ids = random_ids(tokenizer, rng)
        continues = rng.random() < 0.5
        whole = tokenizer.decode(ids, continues)
        assert "".join(streamed(tokenizer, ids, (), continues)[0]) == whole, ids
        replaced += "\ufffd" in whole
        if whole:
            # Taken from the text, so that many occur, most across tokens; and near misses.
            stop = []
            for _ in range(rng.randint(1, 3)):
                start = rng.randrange(len(whole))
                string = whole[start : start + rng.randint(1, 8)]
                stop.append(string if rng.random() < 0.6 else string + rng.choice("x好 "))
            pieces, stopped, taken = streamed(tokenizer, ids, stop, continues)
            assert ("".join(pieces), stopped) == cut(whole, stop), (ids, stop)
            before = tokenizer.decode(ids[: taken - 1], continues)
            assert not stopped or not cut(before.rstrip("\ufffd"), stop)[1]  # at once, not later
    assert replaced > 100


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = tokenizer.encode("a\U0001fae8") + tokenizer.encode("龘好")  # one after the other
    pieces = streamed(tokenizer, ids)[0]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(ids, continues=True)
    rare = tokenizer.encode("a\U00020bb7")[-4:]
    assert [len(tokenizer.id_bytes(i)) for i in rare] == [1] * 4
    assert streamed(tokenizer, rare)[0] == ["", "", "", "\U00020bb7", ""]
    assert streamed(tokenizer, rare[:3])[0] == ["", "", "", "\ufffd" * 3]  # at the end of text


def test_bytes_that_cannot_become_a_character_come_at_once(tokenizer):
    first, second = tokenizer.encode("a\U00020bb7")[-4:-2]
    word = tokenizer.encode("\nx")[-1]
    assert streamed(tokenizer, [first, second, word, second])[0] == [
        *("", "", "\ufffd\ufffdx", "\ufffd", ""),
    ]
    special = tokenizer.special("</s>")
    assert streamed(tokenizer, [first, special, second])[0] == ["", "\ufffd", "\ufffd", ""]


def test_dummy_prefix(tokenizer, request):
    ids = tokenizer.encode(" the")
    own = "".join(streamed(tokenizer, [1, *ids], continues=False)[0])
    assert own == " the"
    with_prefix = "dummy_prefix" in request.node.callspec.id
    assert "".join(streamed(tokenizer, ids)[0]) == (" " if with_prefix else "") + own


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("Human: hi", ["Human:"], ""),
        ("ok\nHuman: hi", ["\nHuman:", "Human:"], "ok"),
        ("一二三四", ["四", "二三"], "一"),  # the earliest, not the first of the list
        ("abcde", ["abcdef", "cd"], "ab"),  # the longer one never comes
        ("abcde", ["abcd", "bcd", "d"], ""),  # complete with the same character: the longest
        ("ababac", ["abac"], "ab"),  # a near miss holds the beginning of the hit
        ("aaab", ["aab"], "a"),
        ("好👍👍🏽", ["👍🏽"], "好👍"),
        ("a\ufffdb", ["\ufffd"], "a"),
    ],
)
def test_stop_strings(tokenizer, text, stop, expected):
    ids = tokenizer.encode(text)
    pieces, stopped, _ = streamed(tokenizer, ids, stop, continues=False)
    assert stopped and "".join(pieces) == expected


def test_the_tokens_after_a_stop_string_are_not_needed(tokenizer):
    ids = [tokenizer.encode(f"\n{letter}")[-1] for letter in "abcda"]
    assert streamed(tokenizer, ids, ["bc"]) == (["a", "", ""], True, 3)


def test_what_may_become_a_stop_string_is_held_and_released(tokenizer):
    ids = [tokenizer.encode(f"\n{letter}")[-1] for letter in "aabx"]
    assert streamed(tokenizer, ids, ["aabc"])[0] == ["", "", "", "aabx", ""]
    assert streamed(tokenizer, ids[:3], ["aabc", "ba"])[0] == ["", "", "", "aab"]
    assert streamed(tokenizer, ids[1:], ["aabc", "bx!"])[0] == ["", "a", "", "bx"]


def test_a_cut_character_at_the_end_may_complete_a_stop_string(tokenizer):
    first = tokenizer.encode("a\U00020bb7")[-4]
    pieces, stopped, _ = streamed(tokenizer, [*tokenizer.encode("\nx")[-1:], first], ["x\ufffd"])
    assert stopped and "".join(pieces) == ""


def test_a_token_costs_the_same_however_long_the_text_is(tokenizer, monkeypatch):
    decoded = 0
    decode = tokenizer.decode

    def counting(ids, continues=False):
        nonlocal decoded
        decoded += len(ids)
        return decode(ids, continues)

    monkeypatch.setattr(tokenizer, "decode", counting)
    ids = tokenizer.encode(MIXED * 500)
    stream = TextStream(tokenizer, ["好的👍🏽？", "<reserved_106> the 文"], continues=False)
    said = arrived = 0
    for token in ids:
        said += len(stream.add(token))
        arrived += len(tokenizer.id_bytes(token).decode(errors="ignore"))
        assert arrived - said <= len("<reserved_106> the ") + 1  # nothing piles up
    assert decoded <= 1
    assert stream.text + stream.finish() == MIXED * 500


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match=r"stop\[1\]='' must be a string that is not empty"):
        TextStream(tokenizer, ["a", ""])
    with pytest.raises(ValueError, match=r"stop\[0\]=5 must"):
        TextStream(tokenizer, [5])
    with pytest.raises(ValueError, match="must be a sequence of strings"):
        TextStream(tokenizer, "abc")
    with pytest.raises(ValueError, match=f"Id {tokenizer.vocab_size} is not"):
        TextStream(tokenizer).add(tokenizer.vocab_size)
