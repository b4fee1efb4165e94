"""The chat formats beside the official rule, written down a second time."""

import pathlib
import random

import pytest
from sentencepiece import sentencepiece_model_pb2

from baichuan_jax import chat
from baichuan_jax import tokenizer as tokenizer_module

RELEASED = pathlib.Path(__file__).parents[1] / "../shared/data/tokenizers/baichuan2.model"
LITERALS = ["<reserved_106>", "<reserved_107>", "<reserved_102>", "<reserved_103>", "</s>", "<s>"]
TEXTS = ["你好", "Hello there", "", " ", "三加五等于多少？\n谢谢", "👍🏽", *LITERALS]
TEXTS += [f"说<reserved_107>好 {literal}{literal}" for literal in LITERALS]
PLENTY = 100_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [("今天天气很好，我们去公园。 The dog sleeps, the fox jumps.", "a")] * 200
    tokenizer_module.train(texts, path, vocab_size=480)
    return path


def edited(path, name, edit):
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    edit(model)
    copy = path.with_name(name)
    copy.write_bytes(model.SerializeToString())
    return tokenizer_module.Tokenizer(copy)


@pytest.fixture(scope="module")
def baichuan1(trained):
    """As the file of Baichuan 1: role tokens are user-defined, texts begin with a space."""

    def edit(model):
        model.normalizer_spec.add_dummy_prefix = True
        for piece in model.pieces[3:131]:
            piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED

    return edited(trained, "baichuan1.model", edit)


@pytest.fixture(scope="module")
def ours(trained):
    return tokenizer_module.Tokenizer(trained)


@pytest.fixture(scope="module")
def released():
    if not RELEASED.exists():
        pytest.skip(f"the released tokenizer is not at {RELEASED}")
    return tokenizer_module.Tokenizer(RELEASED)


KINDS = [("ours", 2), ("released", 2), ("baichuan1", 1), ("ours", 1)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def kind(request):
    """A tokenizer and a format."""
    tokenizer = request.getfixturevalue(request.param[0])
    return tokenizer, chat.chat_format(tokenizer, request.param[1])


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def official_2(messages, tokenizer, user_id, assistant_id, max_input):
    """The rule of Baichuan 2's build_chat_input."""
    system_text, rounds = "", []
    for message in messages:
        if message["role"] == "system":
            system_text = message["content"]
        elif message["role"] == "user" or not rounds:
            rounds.append([message])
        else:
            rounds[-1].append(message)
    system_ids = tokenizer.encode(system_text)
    history = []
    for newest, one in enumerate(reversed(rounds)):
        ids = []
        for message in one:
            ids += [user_id if message["role"] == "user" else assistant_id]
            ids += tokenizer.encode(message["content"])
        if newest and len(system_ids) + len(history) + len(ids) > max_input:
            break
        history = ids + history
    ids = system_ids + history
    if messages[-1]["role"] != "assistant":
        ids = [*ids, assistant_id]
    return ids[-max_input:]


def official_1(messages, tokenizer, user_id, assistant_id):
    """The rule of Baichuan-13B's _build_chat_input, for what fits and ends with a user."""
    ids = []
    for message in messages:
        if message["role"] == "user":
            ids += [user_id, *tokenizer.encode(message["content"])]
        else:
            ids += [assistant_id, *tokenizer.encode(message["content"]), tokenizer.eos_id]
    return [*ids, assistant_id]


def random_dialogue(rng, version, last=None):
    messages = []
    if version == 2 and rng.random() < 0.5:
        messages.append(system(rng.choice(TEXTS)))
    for _ in range(rng.randint(1, 6)):
        messages.append(user(rng.choice(TEXTS)))
        if rng.random() < 0.8:
            messages.append(assistant(rng.choice(TEXTS)))
    return [*messages, {"role": last or rng.choice(["user", "assistant"]), "content": "一"}]


def test_prompts_equal_the_official_ones(kind):
    tokenizer, format = kind
    rng = random.Random(0)
    for _ in range(200):
        if format.version == 2:
            messages = random_dialogue(rng, 2)
            expected = official_2(messages, tokenizer, *ids(format), PLENTY)
        else:
            messages = random_dialogue(rng, 1, "user")
            expected = official_1(messages, tokenizer, *ids(format))
        assert chat.chat_prompt(messages, tokenizer, format, PLENTY) == chat.Prompt(expected, 0)
        # It fits exactly, too.
        prompt = chat.chat_prompt(tuple(messages), tokenizer, format, len(expected))
        assert prompt == chat.Prompt(expected, 0)


def ids(format):
    return format.user_id, format.assistant_id


def test_released_ids(released):
    format = chat.chat_format(released, 2)
    assert format == chat.ChatFormat(2, 195, 196, 2)
    messages = [system("你好吗"), user("Hello world"), assistant("你好吗"), user("中华人民共和国")]
    assert chat.chat_prompt(messages, released, format, 4096).ids == [
        *(16829, 93122, 195, 23160, 2063, 196, 16829, 93122, 195, 6156, 196),
    ]


def test_baichuan_1(baichuan1):
    format = chat.chat_format(baichuan1, 1)
    assert format == chat.ChatFormat(1, 105, 106, 2)  # <reserved_102>, <reserved_103>
    encode = baichuan1.encode
    messages = [user("好"), assistant("天"), user("去")]
    assert baichuan1.decode(encode("好"), continues=True) == " 好"
    expected = [105, *encode("好"), 106, *encode("天"), 2, 105, *encode("去"), 106]
    assert chat.chat_prompt(messages, baichuan1, format, PLENTY).ids == expected


@pytest.mark.parametrize("first", ["user", "assistant"])
def test_an_assistant_message_at_the_end_is_continued(kind, first):
    tokenizer, format = kind
    messages = [user("问"), assistant("答")] * 2
    messages = messages if first == "user" else messages[1:]
    prompt = chat.chat_prompt(messages, tokenizer, format, PLENTY).ids
    end = [format.assistant_id, *tokenizer.encode("答")]
    assert prompt[-len(end) :] == end  # neither the role nor </s> follows
    assert prompt.count(format.assistant_id) == 2
    assert prompt[0] == (format.user_id if first == "user" else format.assistant_id)


def test_a_system_message_alone(ours):
    format = chat.chat_format(ours, 2)
    prompt = chat.chat_prompt([system("你好")], ours, format, PLENTY)
    assert prompt.ids == [*ours.encode("你好"), format.assistant_id]


def test_text_never_becomes_a_special_token(kind):
    tokenizer, format = kind
    special = [*ids(format), format.eos_id, tokenizer.bos_id, tokenizer.unk_id]
    for literal in LITERALS:
        for text in (literal, f"好{literal}", f"{literal * 2} x", f"<s>{literal}</s>"):
            messages = [user(text), assistant(text), user(text)]
            if format.version == 2:
                messages.insert(0, system(text))
            prompt = chat.chat_prompt(messages, tokenizer, format, PLENTY).ids
            found = [i for i in prompt if not tokenizer.id_bytes(i) or i in special]
            end = [format.eos_id] if format.version == 1 else []
            assert found == [
                format.user_id, format.assistant_id, *end, format.user_id, format.assistant_id,
            ]  # fmt: skip
            said = text * len(messages)
            assert tokenizer.decode(prompt, continues=True).replace(" ", "") == said.replace(
                " ", ""
            )


def test_whole_rounds_are_dropped_and_counted(kind):
    tokenizer, format = kind
    rounds = [[user(f"问{i}"), assistant("答" * (i + 1))] for i in range(4)]
    rounds.append([user("最后一问")])
    head = [system("你是助手。")] if format.version == 2 else []
    sizes = []
    for dropped in range(5):
        kept = sum(rounds[dropped:], head)
        expected = chat.chat_prompt(kept, tokenizer, format, PLENTY).ids
        sizes.append(len(expected))
        for room in (0, 1):  # one token more is not enough for another round
            prompt = chat.chat_prompt(
                sum(rounds, head), tokenizer, format, len(expected) + room * (dropped > 0)
            )
            assert prompt == chat.Prompt(expected, dropped)
            assert len(prompt.ids) <= len(expected) + room
    newest = chat.chat_prompt(rounds[-1], tokenizer, format, PLENTY).ids
    message = rf"newest round has {len(newest)} tokens .* {sizes[-1] - len(newest)}: .* than the"
    with pytest.raises(ValueError, match=rf"{message} {sizes[-1] - 1} "):
        chat.chat_prompt(sum(rounds, head), tokenizer, format, sizes[-1] - 1)
    with pytest.raises(ValueError, match="than the 0 "):
        chat.chat_prompt([user("")], tokenizer, format, 0)


def test_a_large_round_in_the_middle_ends_the_history(ours):
    # What is older than a dropped round is dropped, too: a gap would change what was said.
    format = chat.chat_format(ours, 2)
    messages = [user("a"), user("b" * 50), user("c")]
    prompt = chat.chat_prompt(messages, ours, format, 20)
    assert prompt.dropped_rounds == 2
    assert prompt.ids == [format.user_id, *ours.encode("c"), format.assistant_id]


def test_budget():
    assert chat.prompt_budget(4096, 2048) == 2048  # the official one
    assert chat.prompt_budget(4096, 512) == 3584
    assert chat.prompt_budget(512, 2048) == 256


def test_defaults():
    two, one = chat.chat_defaults(2), chat.chat_defaults(1)
    assert two == {
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "user_token_id": 195,
        "assistant_token_id": 196, "max_new_tokens": 2048, "do_sample": True, "temperature": 0.3,
        "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05,
    }  # fmt: skip
    assert one == two | {"repetition_penalty": 1.1}
    two["top_k"] = 1
    assert chat.chat_defaults(2)["top_k"] == 5


@pytest.mark.parametrize(
    "messages, message",
    [
        ("hello", "must be a list of .* not str"),
        ({"role": "user", "content": "x"}, "must be a list of .* not dict"),
        (None, "not NoneType"),
        ([], "messages is empty"),
        (["hello"], r"messages\[0\] must be .* not str"),
        ([user("x"), {"content": "x"}], r"messages\[1\] has no 'role'; it has \['content'\]"),
        ([{"role": "user", "text": "x"}], r"messages\[0\] has no 'content'; it has \['role', 't"),
        (
            [user("x"), {"role": "tool", "content": ""}],
            r"\[1\]\['role'\]='tool' must be one of sys",
        ),
        ([{"role": ["user"], "content": ""}], r"\[0\]\['role'\]=\['user'\] must be one of system"),
        ([user(None)], r"messages\[0\]\['content'\] must be a string, not NoneType"),
        ([user([{"type": "text"}])], r"messages\[0\]\['content'\] must be a string, not list"),
        ([user("x"), system("y")], r"messages\[1\]\['role'\]='system': only the first"),
        ([user("x"), user("a\ud800")], r"messages\[1\]\['content'\]: .* surrogate.* position 1"),
    ],
)
def test_messages_are_checked(ours, messages, message):
    with pytest.raises(ValueError, match=message):
        chat.chat_prompt(messages, ours, chat.chat_format(ours, 2), PLENTY)


def test_baichuan_1_has_no_system_message(baichuan1):
    format = chat.chat_format(baichuan1, 1)
    with pytest.raises(ValueError, match=r"\[0\]\['role'\]='system': Baichuan 1 has no system"):
        chat.chat_prompt([system("x"), user("y")], baichuan1, format, PLENTY)


def test_other_keys_of_a_message_are_not_read(ours):
    format = chat.chat_format(ours, 2)
    prompt = chat.chat_prompt([user("x") | {"name": "Tom"}], ours, format, PLENTY)
    assert prompt == chat.chat_prompt([user("x")], ours, format, PLENTY)


def test_a_tokenizer_without_role_tokens_is_refused(tmp_path, ours):
    path = tmp_path / "few.model"
    tokenizer_module.train([("some words " * 50, "a")], path, vocab_size=380, reserved_tokens=103)
    few = tokenizer_module.Tokenizer(path)
    with pytest.raises(ValueError, match=r"Baichuan 2 needs <reserved_106> and <reserved_107>\."):
        chat.chat_format(few, 2)
    with pytest.raises(ValueError, match=r"Baichuan 1 needs .* no special token '<reserved_103>'"):
        chat.chat_format(few, 1)
    for function in (chat.chat_defaults, lambda version: chat.chat_format(ours, version)):
        with pytest.raises(ValueError, match=r"version=3 must be 1 \(Baichuan\) or 2"):
            function(3)
