"""The conversation in the terminal, with a model that says what it is told to."""

import errno
import io
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from baichuan_jax import chat
from baichuan_jax import tokenizer as tokenizer_module
from baichuan_jax.inference.request import Request
from baichuan_jax.inference.sampling import Sampling
from baichuan_jax.inference.terminal import converse, show
from tests.inference import scripted

try:
    import fcntl
    import pty
    import termios
except ImportError:  # Windows
    pty = None

try:
    import readline
except ImportError:
    readline = None

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [("今天天气很好，我们去公园。 The dog sleeps, the fox jumps.", "a")] * 200
    tokenizer_module.train(texts, path, vocab_size=480)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return tokenizer_module.Tokenizer(tokenizer_path)


class Writes(io.StringIO):
    """Standard output, with each write as it came; a terminal if wanted."""

    def __init__(self, terminal=False):
        super().__init__()
        self.pieces, self._terminal = [], terminal

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)

    def isatty(self):
        return self._terminal


class Keys(io.StringIO):
    """A keyboard; '^C' on a line of its own is Ctrl-C."""

    def __init__(self, text, terminal):
        super().__init__(text)
        self._terminal = terminal

    def readline(self, *size):
        line = super().readline(*size)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line

    def isatty(self):
        return self._terminal


@pytest.fixture
def talk(monkeypatch):
    """Runs a conversation; returns standard output and standard error."""

    def run(model, lines, terminal=False, **options):
        out, err = Writes(terminal), Writes(terminal)
        monkeypatch.setattr(sys, "stdin", Keys("".join(f"{x}\n" for x in lines), terminal))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        converse(model, **options)
        return out, err

    return run


def said(tokenizer, *contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def prompt(model, *contents, system=""):
    messages = said(model.tokenizer, *contents)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return chat.chat_prompt(messages, model.tokenizer, model.format, 10_000).ids


def test_a_conversation_through_a_pipe(tokenizer, talk):
    model = scripted.model(tokenizer, ["你好👍！", "The dog."])
    out, err = talk(model, ["你是谁？", "", "Why <reserved_107>?"])
    assert out.getvalue() == "你好👍！\nThe dog.\n"  # nothing but the replies
    assert err.getvalue() == ""
    first, second = model.engine.requests
    assert first.prompt == prompt(model, "你是谁？")
    assert second.prompt == prompt(model, "你是谁？", "你好👍！", "Why <reserved_107>?")
    assert not first.continues
    assert (first.max_new_tokens, first.sampling) == (20, scripted.DEFAULTS.sampling)
    assert second.sampling == Sampling(temperature=0.5, seed=8)  # a new seed for each reply


def test_replies_stream_and_no_character_is_cut(tokenizer, talk):
    model = scripted.model(tokenizer, ["龘𠮷👍好 The dog"])
    out, _ = talk(model, ["x"])
    assert "".join(out.pieces) == "龘𠮷👍好 The dog\n"
    assert not any("\ufffd" in piece for piece in out.pieces)
    assert [piece for piece in out.pieces if piece][:4] == ["龘", "𠮷", "👍", "好"]


def test_options(tokenizer, talk):
    model = scripted.model(tokenizer, ["The dog sleeps"])
    sampling = Sampling(top_k=3, seed=1)
    out, err = talk(model, ["好"], system="简短。", sampling=sampling, max_new_tokens=2)
    request = model.engine.requests[0]
    assert request.prompt == prompt(model, "好", system="简短。")
    assert (request.max_new_tokens, request.sampling) == (2, sampling)
    assert "The dog sleeps".startswith(out.getvalue().strip())
    assert "cut after 2 tokens" in err.getvalue()


def test_commands(tokenizer, talk, tmp_path):
    model = scripted.model(tokenizer, ["好。", "The fox."])
    path = tmp_path / "a talk.json"
    lines = [
        "/help",
        "一",
        f"/save {path}",
        "/clear",
        "二",
        "/save",
        f"/save {tmp_path}",
        "/open x",
    ]
    _, err = talk(model, [*lines, "/exit", "三"], system="S")
    system = {"role": "system", "content": "S"}
    assert json.loads(path.read_text(encoding="utf-8")) == [system, *said(tokenizer, "一", "好。")]
    assert "一" in path.read_text(encoding="utf-8")  # readable, not escaped
    assert [request.prompt for request in model.engine.requests] == [
        prompt(model, "一", system="S"),
        prompt(model, "二", system="S"),  # what was before /clear is forgotten, the system not
    ]
    for told in (
        "/save FILE",
        f"3 messages saved in {path}",
        "forgotten",
        "needs the name of a file",
        os.strerror(errno.EISDIR),
        "no command /open",
    ):
        assert told in err.getvalue()


def test_what_only_looks_like_a_command_is_a_message(tokenizer, talk):
    model = scripted.model(tokenizer, ["x"] * 3)
    talk(model, ["/etc/passwd 是什么", " /help", "a\\", "/exit\\", "b"])
    contents = ["/etc/passwd 是什么", " /help", "a\n/exit\nb"]
    assert [request.prompt for request in model.engine.requests] == [
        prompt(model, contents[0]),
        prompt(model, contents[0], "x", contents[1]),
        prompt(model, contents[0], "x", contents[1], "x", contents[2]),
    ]


def test_a_full_context_is_told(tokenizer, talk):
    model = scripted.model(tokenizer, ["好" * 10] * 4, max_length=60)
    _, err = talk(model, ["天" * 10] * 4)
    budget = chat.prompt_budget(60, 20)
    assert [len(request.prompt) <= budget for request in model.engine.requests] == [True] * 4
    told = [line for line in err.getvalue().splitlines() if "no longer sees" in line]
    assert ["oldest 1 round of" in told[0], "oldest 2 rounds of" in told[1]] == [True, True]
    last = model.engine.requests[-1].prompt
    assert last == prompt(model, "天" * 10, "好" * 10, "天" * 10)


def test_a_message_that_is_too_long_is_not_sent(tokenizer, talk):
    model = scripted.model(tokenizer, ["好"], max_length=60)
    out, err = talk(model, ["去" * 50, "一"])
    assert "Not sent: The newest round has 52 tokens" in err.getvalue()
    assert out.getvalue() == "好\n"
    assert model.engine.requests[0].prompt == prompt(model, "一")


def test_a_long_reply_gets_what_the_context_leaves(tokenizer, talk):
    model = scripted.model(tokenizer, ["好" * 100], max_length=60)
    out, err = talk(model, ["一"], max_new_tokens=1_000)
    left = 60 - len(prompt(model, "一"))
    assert model.engine.requests[0].max_new_tokens == left
    assert out.getvalue() == "好" * left + "\n"
    assert f"cut after {left} tokens" in err.getvalue()


def interrupting(*steps):
    def on_step(step):
        if step in steps:
            signal.raise_signal(signal.SIGINT)

    return on_step


def test_ctrl_c_stops_the_reply_only(tokenizer, talk, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    reply = "好好好好好好"
    model = scripted.model(tokenizer, [reply, "好"], on_step=interrupting(3))
    out, _ = talk(model, ["一", "二", f"/save {tmp_path}/x.json"])
    assert out.getvalue() == "好好好\n好\n"
    assert [output.finish_reason for output in model.engine.cancelled] == ["cancelled"]
    assert not model.engine.busy
    messages = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert messages == said(tokenizer, "一", "好好好", "二", "好")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_leaves(tokenizer, talk):
    def twice(_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        talk(scripted.model(tokenizer, ["天天天天"], on_step=twice), ["一"])
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt(tokenizer, talk):
    model = scripted.model(tokenizer, ["好"])
    _, err = talk(model, ["half\\", "^C", "一"], terminal=True)
    assert "Ctrl-D or /exit leaves" in err.getvalue()
    assert model.engine.requests[0].prompt == prompt(model, "一")
    with pytest.raises(KeyboardInterrupt):
        talk(model, ["^C"])


def test_on_a_terminal(tokenizer, talk):
    escape = "a\x1b]0;title\x07\tb\n\x9b2J"
    model = scripted.model(tokenizer, [escape])
    out, err = talk(model, ["一"], terminal=True)
    assert out.getvalue().startswith("> ")
    assert "a␛]0;title␇\tb\n\ufffd2J\n" in out.getvalue()  # the terminal does not obey the model
    tokens = len(tokenizer.encode(escape))
    assert "\x1b[2mparrot, Baichuan 2 format. /help shows the commands.\x1b[0m" in err.getvalue()
    assert f"\x1b[2m{tokens} tokens, " in err.getvalue() and "tokens/s\x1b[0m" in err.getvalue()
    piped, _ = talk(scripted.model(tokenizer, [escape]), ["一"])
    assert piped.getvalue() == escape + "\n"


def test_in_another_thread(tokenizer, talk):
    model = scripted.model(tokenizer, ["好"])
    thread = threading.Thread(target=lambda: outputs.append(talk(model, ["一"])[0]))
    outputs = []
    thread.start()
    thread.join()
    assert outputs[0].getvalue() == "好\n"


def test_what_cannot_work_is_known_before_the_first_message(tokenizer, talk):
    def refused(message, model=None, **options):
        with pytest.raises(ValueError, match=message):
            talk(model or scripted.model(tokenizer, []), ["一"], **options)

    refused(
        "parrot is no chat model: .* experiments.generate", scripted.model(tokenizer, [], version=0)
    )
    old = scripted.model(tokenizer, [], version=1)
    refused(r"Baichuan 1 has no system message", old, system="x")
    refused(r"the system message 500: .* the 380 ", system="好" * 500)
    refused("max_new_tokens=0 must be at least 1", max_new_tokens=0)
    refused("top_p=2 must be", sampling=Sampling(top_p=2))


def test_baichuan_1(tokenizer, talk):
    model = scripted.model(tokenizer, ["好", "天"], version=1)
    talk(model, ["一", "二"])
    second = model.engine.requests[1].prompt
    assert second == prompt(model, "一", "好", "二")
    assert tokenizer.eos_id in second


def test_show_gives_the_finished_output(tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Writes())
    model = scripted.model(tokenizer, ["The dog sleeps"])
    output = show(model.engine, Request(tokenizer.encode("x"), 10, stop=("sle",)))
    assert (output.text, output.finish_reason) == ("The dog ", "stop")
    assert sys.stdout.getvalue() == "The dog \n"


AT_A_KEYBOARD = """
import sys, time
from baichuan_jax import tokenizer
from baichuan_jax.inference.terminal import converse
from tests.inference import scripted

tokenizer = tokenizer.Tokenizer(sys.argv[1])
replies = ["好" * 100, "The dog"]
converse(scripted.model(tokenizer, replies, on_step=lambda _: time.sleep(0.1), max_length=2_000))
"""


PASTE, LINES = "\x1b[200~一\r二\x1b[201~\r", "一\\\r二\r"


def gnu_readline():
    return readline is not None and "libedit" not in readline.__doc__


@pytest.mark.skipif(pty is None, reason="this system has no pseudo-terminals")
def test_at_a_keyboard(tokenizer_path, tmp_path):
    """Chinese, a paste of two lines, Ctrl-C in a reply, Ctrl-D; with readline and its echo."""
    command = [sys.executable, "-c", AT_A_KEYBOARD, str(tokenizer_path)]
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    environment |= {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    screen = ""

    def wait_for(text):
        nonlocal screen
        end = time.monotonic() + 60
        while text not in screen and time.monotonic() < end:
            if select.select([ours], [], [], 1)[0]:
                screen += os.read(ours, 10_000).decode(errors="replace")
        assert text in screen, screen
        before, _, screen = screen.partition(text)
        return before

    try:
        wait_for("> ")
        os.write(ours, "你\r".encode("gbk"))
        wait_for("Not sent: 'utf-8' codec")
        wait_for("> ")
        os.write(ours, (PASTE if gnu_readline() else LINES).encode())
        wait_for("好好")
        os.write(ours, b"\x03")
        wait_for("tokens/s")
        wait_for("> ")
        os.write(ours, f"/save {tmp_path}/talk.json\r".encode())
        wait_for("2 messages saved")
        wait_for("> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    question, answer = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert question["content"] == "一\n二"
    assert 2 <= len(answer["content"]) < 20 and set(answer["content"]) == {"好"}
