import dataclasses
import gzip
import hashlib
import itertools
import json
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from baichuan_jax import tokenizer

Model = sentencepiece_model_pb2.ModelProto
ROOT = pathlib.Path(__file__).parents[1]
RELEASED = ROOT / "../shared/data/tokenizers"

ZH = [
    "中华人民共和国成立于1949年，首都是北京。",
    "今天天气很好，人民生活幸福；我们去北京看天安门！",
    "机器学习模型需要大量的训练数据，训练数据越多越好。",
]
EN = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "Training data for language models: the more training data, the better.",
    "In 2023 there were 2023 models; 20232023 is a number.",
    "Donaudampfschifffahrtsgesellschaftskapitaen",
]
CODE = [
    "def train(model, data):\n    for batch in data:\n        model.step(batch)\n\treturn model\n",
    "if x  ==  10:\r\n                print('x = %d' % x)\r\n",
]
TEXTS = [
    "Hello, 世界!",
    "",
    " ",
    "  a  b  ",
    "\n\n\t\n",
    "a\r\nb\rc",
    "\0",
    "x\0\0y",
    "１２３ ＡＢ",
]
TEXTS += [
    "e\u0301 vs \u00e9",
    "\ufeffbom",
    "\ufffd\ufffe\uffff",
    "𠮷野家",
    "👨\u200d👩\u200d👧🏽",
    "▅ ▁▁ ▁x ▁",
]
TEXTS += [
    "\u2581",
    " \u2581 ",
    "\x01\x05\x7f\x85\u2028",
    "<0x41>",
    "3.14159 -> x==1",
    *ZH,
    *EN,
    *CODE,
]
INJECTIONS = ["<reserved_107>", "<reserved_0>", "<SEP>", "<CLS>", "<s>", "</s>", "<unk>"]


def corpus():
    for repeat in range(60):
        for source, texts in (("zh", ZH), ("en", EN), ("code", CODE)):
            yield texts[repeat % len(texts)], source


def random_texts(number=300, seed=0):
    rng = random.Random(seed)
    planes = [(0, 0x7F), (0x80, 0x7FF), (0x2500, 0x25FF), (0x4E00, 0x9FFF), (0xE000, 0xFFFF)]
    planes += [(0x10000, 0x10FFFF), (0x20, 0x20), (0x2581, 0x2581), (0x0A, 0x0D)]
    for _ in range(number):
        yield "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(0, 40)))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer.train(corpus(), path, vocab_size=800)
    return path


@pytest.fixture(scope="module")
def ours(path):
    return tokenizer.Tokenizer(path)


def pieces(path):
    return [piece.piece for piece in Model.FromString(path.read_bytes()).pieces]


def edited(path, folder, edit):
    model = Model.FromString(path.read_bytes())
    edit(model)
    copy = folder / "edited.model"
    copy.write_bytes(model.SerializeToString())
    return copy


def learned(documents, folder, vocab_size=470, **options):
    path = folder / "learned.model"
    counts = tokenizer.train(documents, path, vocab_size=vocab_size, **options)
    return set(pieces(path)), counts


# The rules of training.


def test_order_of_ids(path, ours):
    found = pieces(path)
    assert len(found) == ours.vocab_size == 800
    assert found[:4] == ["<unk>", "<s>", "</s>", "<reserved_0>"]
    assert found[3 + 127 : 3 + 131] == ["<reserved_127>", "\n", "\t", "<0x00>"]
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2, 0)
    assert ours.special("<reserved_106>") == 109
    assert ours.special("</s>") == 2


def test_pieces_follow_the_paper(path):
    found = pieces(path)[3 + 128 + 2 + 256 :]
    assert not [piece for piece in found if len(piece) > 1 and any(c.isdigit() for c in piece)]
    assert max(map(len, found)) <= 32
    assert max(map(len, found)) > 16  # the long German word would be learned whole
    assert {"▁▁", "▁▁▁▁"} <= set(found)
    assert any(len(piece) > 1 and piece[0] > "\u4e00" for piece in found)  # Chinese words
    assert not [piece for piece in found if "▁" in piece[1:] and piece.strip("▁")]


def test_no_dummy_prefix_and_single_newlines(ours):
    assert ours.encode(" the")[0] != ours.encode("the")[0]
    assert ours.decode(ours.encode("the")[:1])[0] == "t"
    assert len(ours.encode("\n\n\t")) == 3
    assert len(ours.encode("2023")) == 4
    assert len(ours.encode("        ")) == 1


def test_unseen_characters_become_bytes(path, ours):
    first_byte = pieces(path).index("<0x00>")
    assert ours.encode("𠮷") == [first_byte + byte for byte in "𠮷".encode()]


def test_rare_characters_are_not_pieces(tmp_path):
    found, _ = learned([("common words " * 5_000 + "龘", "a")], tmp_path, vocab_size=400)
    assert "龘" not in found
    found, _ = learned([("common words " * 5_000 + "龘" * 50, "a")], tmp_path, vocab_size=400)
    assert "龘" in found


# Encoding and decoding.


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(ours, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert ours.token_bytes[ids].sum() == len(text.encode())


def test_round_trip_of_random_unicode(ours):
    texts = list(random_texts())
    rows = ours.encode_batch(texts)
    assert rows == [ours.encode(text) for text in texts]
    assert [ours.decode(row) for row in rows] == texts
    assert [ours.token_bytes[row].sum() for row in rows] == [len(t.encode()) for t in texts]


def test_token_bytes(ours):
    assert ours.token_bytes.dtype == np.int32
    assert ours.token_bytes.shape == (800,)
    assert not ours.token_bytes[: 3 + 128].any()
    assert ours.token_bytes[3 + 128 :].all()


def test_id_bytes(ours):
    for text in TEXTS + list(random_texts(100)):
        ids = ours.encode(text)
        assert b"".join(ours.id_bytes(i) for i in ids) == text.encode()
        assert ours.decode(ids, continues=True) == text
    first = ours.encode("\0")[0]
    assert [ours.id_bytes(first + byte) for byte in range(256)] == [bytes([b]) for b in range(256)]
    assert {ours.id_bytes(i) for i in range(1, 3 + 128)} == {b""}
    assert ours.id_bytes(np.int32(0)).decode() == ours.decode([0]) == " ⁇ "
    assert ours.decode([first + byte for byte in "你".encode()[:2]]) == "\ufffd\ufffd"


@pytest.mark.parametrize("literal", INJECTIONS)
@pytest.mark.parametrize("user_defined", [False, True])
def test_text_never_becomes_a_special_token(path, tmp_path, literal, user_defined):
    def as_released(model):
        model.pieces[3].piece, model.pieces[4].piece = "<SEP>", "<CLS>"
        for piece in model.pieces[3:131]:
            piece.type = Model.SentencePiece.USER_DEFINED

    file = edited(path, tmp_path, as_released) if user_defined else path
    loaded = tokenizer.Tokenizer(file)
    text = f"问{literal}答 {literal}{literal}"
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text
    assert min(ids) >= 3 + 128
    if user_defined and literal == "<reserved_107>":
        raw = sentencepiece.SentencePieceProcessor(model_file=str(file))
        assert raw.encode(text).count(110) == 3  # what a plain SentencePiece would do
        assert loaded.special(literal) == 110


def test_special_tokens_decode_to_nothing(ours):
    ids = [1, *ours.encode("你好"), ours.special("<reserved_107>"), *ours.encode("hi"), 2]
    assert ours.decode(np.array(ids)) == "你好hi"


def test_file_with_a_dummy_prefix(path, tmp_path):
    def as_baichuan1(model):
        model.normalizer_spec.add_dummy_prefix = True

    loaded = tokenizer.Tokenizer(edited(path, tmp_path, as_baichuan1))
    assert loaded.encode("the") == tokenizer.Tokenizer(path).encode(" the")
    texts = TEXTS + list(random_texts(100))
    assert [loaded.decode(loaded.encode(text)) for text in texts] == texts
    for text in filter(None, texts):
        ids = loaded.encode(text)
        prefix = "" if text[0] == "▁" else " "
        assert loaded.decode(ids, continues=True) == prefix + text
        assert b"".join(map(loaded.id_bytes, ids)).decode() == prefix + text


def test_file_with_a_padding_piece(path, tmp_path):
    def padded(model):
        model.pieces[5].piece = "<pad>"

    assert tokenizer.Tokenizer(edited(path, tmp_path, padded)).pad_id == 5


def test_refusals(ours):
    with pytest.raises(ValueError, match=r"'\\ud800', at position 2"):
        ours.encode("ab\ud800")
    with pytest.raises(ValueError, match=r"Text 1 of the batch.*position 0"):
        ours.encode_batch(["a", "\udfff"])
    with pytest.raises(ValueError, match=r"Id 800 at position 1 .* 0 to 799"):
        ours.decode([5, 800])
    with pytest.raises(ValueError, match="Id -1 at position 0"):
        ours.decode([-1])
    for wrong in (-1, 800):
        with pytest.raises(ValueError, match=f"Id {wrong} is not in the vocabulary: ids are 0 to"):
            ours.id_bytes(wrong)
    with pytest.raises(ValueError, match=r"no special token '<reserved_128>'"):
        ours.special("<reserved_128>")


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.model"):
        tokenizer.Tokenizer(tmp_path / "nowhere.model")
    pointer = tmp_path / "pointer.model"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"pointer\.model \(43 bytes\) is not a SentencePiece"):
        tokenizer.Tokenizer(pointer)
    pointer.write_bytes(b"")
    with pytest.raises(ValueError, match="no pieces"):
        tokenizer.Tokenizer(pointer)


# The corpus of training.


def test_same_documents_give_the_same_file(path, ours, tmp_path):
    tokenizer.train(corpus(), tmp_path / "deep/other name.model", vocab_size=800)
    data = (tmp_path / "deep/other name.model").read_bytes()
    assert data == path.read_bytes()
    assert ours.fingerprint == hashlib.sha256(data).hexdigest()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["other name.model"]


def two_sources(repeats=100):
    return [(f"{word} " * 3, source) for word, source in [("abc", "a"), ("xyz", "x")] * repeats]


def test_weights_change_the_merges(tmp_path):
    room_for_two = 3 + 128 + 2 + 256 + len("▁abcxyz") + 2
    found, _ = learned(two_sources(), tmp_path, room_for_two, weights={"x": 3})
    assert "xyz" in found and "ab" not in found
    found, _ = learned(two_sources(), tmp_path, room_for_two, weights={"a": 3})
    assert "abc" in found and "xy" not in found
    found, counts = learned(two_sources(), tmp_path, room_for_two - 3, weights={"x": 0})
    assert "abc" in found and "x" not in found
    assert dataclasses.astuple(counts["x"]) == (100, 1200, 0, 0)


def test_weight_two_is_every_document_twice(tmp_path):
    doubled = [d for d in two_sources() for _ in range(1 + (d[1] == "x"))]
    learned(doubled, tmp_path, 398)
    expected = (tmp_path / "learned.model").read_bytes()
    _, counts = learned(two_sources(), tmp_path, 398, weights={"x": 2})
    assert (tmp_path / "learned.model").read_bytes() == expected
    assert (counts["x"].bytes, counts["x"].used_bytes) == (1200, 2400)


def test_fractional_weight_takes_its_part(tmp_path):
    _, counts = learned(two_sources(2_000), tmp_path, 398, weights={"x": 0.5, "a": 1.25})
    assert counts["x"].used_bytes == pytest.approx(0.5 * counts["x"].bytes, rel=0.05)
    assert counts["a"].used_bytes == pytest.approx(1.25 * counts["a"].bytes, rel=0.05)


def test_large_corpus_is_sampled_evenly(tmp_path):
    documents = two_sources(2_000)  # the sources alternate: a fixed stride would lose one
    documents[2_000:] = [(text.upper(), source) for text, source in documents[2_000:]]
    found, counts = learned(documents, tmp_path, 404, weights={"a": 3}, max_bytes=10_000)
    used = counts["a"].used_bytes, counts["x"].used_bytes
    assert 9_900 < sum(used) <= 10_000
    assert used[0] / used[1] == pytest.approx(3, rel=0.2)
    assert set("abcxyzABCXYZ") <= found
    first = (tmp_path / "learned.model").read_bytes()
    assert learned(documents, tmp_path, 404, weights={"a": 3}, max_bytes=10_000)[1] == counts
    assert (tmp_path / "learned.model").read_bytes() == first


def test_long_lines_are_cut_and_counted(tmp_path):
    spaced, dense = "longword " * 2_000, "北京天安门" * 2_000
    found, counts = learned([(spaced + "\n" + dense, "a"), ("short", "b")], tmp_path, 420)
    assert {"▁longword", "北京天安门"} <= found
    assert counts["a"].cut_lines == 2
    assert counts["b"].cut_lines == 0
    assert counts["a"].used_bytes == len(spaced) + len(dense.encode())


def test_characters_the_trainer_reserves_do_not_hide_their_line(tmp_path):
    found, _ = learned([("alpha▅beta▁gamma\0delta " * 100, "a")], tmp_path, 416)
    assert {"alpha", "beta", "gamma", "delta"} <= found
    assert not {"▅", "\0"} & found


@pytest.mark.parametrize(
    "documents, options, message",
    [
        ([], {}, "no text to train on"),
        ([("", "a"), ("\n\n", "a")], {}, r"no text to train on in sources \['a'\]"),
        ([("abc", "a")], {"max_bytes": 2}, "max_bytes=2"),
        ([("abc", "a")], {"weights": {"a": 0}}, r"weights \{'a': 0\}"),
        ([("abc", "a")], {}, r"vocab_size=470 is too large .* which has merges for 395"),
        ([("abc", "a")], {"vocab_size": 300}, "vocab_size=300 is too small: .* are 392"),
        ([("abc", "a")], {"weights": {"b": 2}}, r"unknown sources \['b'\]; the corpus has \['a'\]"),
        ([("abc", "a")], {"weights": {"a": -1}}, "Weight a=-1 must be 0 or more"),
        ([("abc", "a")], {"weights": {"a": float("nan")}}, "Weight a=nan"),
        ([("x", "a"), ("b\udc80", "a")], {}, r"Document 1 of source 'a' .* position 1"),
    ],
)
def test_training_refuses(tmp_path, documents, options, message):
    (tmp_path / "learned.model").write_text("the last good one")
    with pytest.raises(ValueError, match=message):
        learned(documents, tmp_path, **options)
    assert (tmp_path / "learned.model").read_text() == "the last good one"
    assert len(list(tmp_path.iterdir())) == 1


def test_unwritable_path_is_known_before_reading(tmp_path):
    def never():
        raise AssertionError("a document was read")
        yield

    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file/tokenizer.model"):
        with pytest.raises(OSError):
            tokenizer.train(never(), path, vocab_size=400)


# Table 2.


def test_compression_rate(ours):
    rates = tokenizer.compression_rate(ours, [("中华人民", "zh"), ("𠮷", "zh"), ("the 10", "en")])
    assert list(rates) == ["zh", "en", "all"]
    zh = rates["zh"]
    assert (zh.documents, zh.characters, zh.bytes) == (2, 5, 16)
    assert zh.tokens == len(ours.encode("中华人民")) + 4
    assert zh.tokens_per_character == zh.tokens / 5
    assert zh.tokens_per_byte == zh.tokens / 16
    total = [a + b for a, b in zip(*map(dataclasses.astuple, (zh, rates["en"])), strict=True)]
    assert list(dataclasses.astuple(rates["all"])) == total
    with pytest.raises(ValueError, match="no document"):
        tokenizer.compression_rate(ours, [])


def test_commands(tmp_path):
    for source, texts in (("zh", ZH), ("en", EN)):
        rows = [json.dumps({"text": text, "lang": source}) for text in texts * 20]
        (tmp_path / f"{source}.jsonl").write_text("\n".join(rows))
    names = f"--sources=zh={tmp_path}/zh.jsonl,en={tmp_path}/en.jsonl"

    def run(module, *flags):
        command = [sys.executable, "-m", f"experiments.{module}", names, *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    trained = run(
        "train_tokenizer", "--weights=en=2", "--vocab_size=600", f"--out={tmp_path}/t.model"
    )
    assert trained.returncode == 0, trained.stderr
    en = next(line.split() for line in trained.stdout.splitlines() if line.startswith("en "))
    size = 20 * sum(len(text) for text in EN)
    assert en == ["en", "80", f"{size:,}", "2", f"{2 * size:,}"]

    (tmp_path / "same.model").write_bytes((tmp_path / "t.model").read_bytes())
    compared = run("compression_rate", f"--tokenizers={tmp_path}/t.model,{tmp_path}/same.model")
    assert compared.returncode == 0, compared.stderr
    header, *lines, unit = compared.stdout.splitlines()
    assert "tokens/char" in header
    assert "Unicode code point" in unit
    assert [line.split()[2] for line in lines] == ["zh", "en", "all"] * 2
    assert all(line.endswith("1.000") for line in lines)


# The released file: `python -m pytest -m oracle`.


@pytest.fixture(scope="module")
def released():
    if not (RELEASED / "baichuan2.model").exists():
        pytest.skip(f"the released tokenizer is not in {RELEASED}")
    return tokenizer.Tokenizer(RELEASED / "baichuan2.model")


GOLDEN = {
    "你好吗": [16829, 93122],
    "Hello world": [23160, 2063],
    "What is your name?": [3167, 1414, 1597, 2896, 74],
    "12345 6789": [92336, 92338, 92354, 92369, 92358, 92311, 92373, 92383, 92370, 92362],
    "3.14159": [92354, 72, 92336, 92369, 92336, 92358, 92362],
    "登鹳雀楼->王之涣\n": [93198, 97845, 95008, 93084, 63, 92574, 92876, 92479, 97097, 5],
    "夜雨寄北->": [93199, 93142, 94115, 92683, 63, 92574],
    "  hello": [1373, 46955],
    "a\r\nb": [92314, 1102, 5, 92332],
    "１２３": [53, 54, 55],
    "𠮷": [1329, 1249, 1263, 1272],
    "解释一下“温故而知新”": [5987, 2908, 92360, 92880, 93009, 26058, 92422, 92361],
    "中华人民共和国": [6156],
}


@pytest.mark.oracle
def test_released_ids(released):
    assert released.vocab_size == 125_696
    assert (released.unk_id, released.bos_id, released.eos_id, released.pad_id) == (0, 1, 2, 0)
    assert released.fingerprint.startswith("79452955be6b419a")
    assert released.special("<reserved_106>") == 195
    assert [released.special(f"<reserved_{n}>") for n in range(12, 1000)] == list(range(101, 1089))
    assert {text: released.encode(text) for text in GOLDEN} == GOLDEN


@pytest.mark.oracle
def test_released_round_trips(released):
    texts = [*TEXTS, *INJECTIONS, *random_texts(1_000, seed=1)]
    rows = released.encode_batch(texts)
    assert [released.decode(row) for row in rows] == texts
    assert [released.token_bytes[row].sum() for row in rows] == [len(t.encode()) for t in texts]
    special = {0, 1, 2, 3, 4, *range(101, 1089)}
    assert not special & set(itertools.chain.from_iterable(rows))


@pytest.mark.oracle
def test_ratios_of_table_2_on_chinese_prose(released):
    # Table 2: LLaMA 2 1.037, ChatGLM 2 0.527, Baichuan 2 0.498, whatever the text was.
    corpus_file = ROOT / "../shared/data/corpus/zh.jsonl.gz"
    if not corpus_file.exists():
        pytest.skip(f"no Chinese text at {corpus_file}")
    with gzip.open(corpus_file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 0, None, 10)]
    texts = [t for t in texts if sum("\u4e00" <= c <= "\u9fff" for c in t) > 0.85 * len(t)]
    files = [tokenizer.Tokenizer(RELEASED / f"{n}.model") for n in ("llama2", "chatglm2")]
    llama2, chatglm2, baichuan2 = (
        tokenizer.compression_rate(file, [(text, "zh") for text in texts])["zh"]
        for file in (*files, released)
    )
    assert llama2.tokens_per_character > 1 > llama2.tokens_per_byte
    assert baichuan2.tokens / llama2.tokens == pytest.approx(0.498 / 1.037, rel=0.05)
    assert chatglm2.tokens / llama2.tokens == pytest.approx(0.527 / 1.037, rel=0.05)
