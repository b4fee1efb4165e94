"""The chat page in a real browser."""

import dataclasses
import json
import os
import pathlib
import time

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from baichuan_jax.inference.engine import Stats
from tests.inference import browser, scripted, serving

pytestmark = pytest.mark.skipif(not browser.find(), reason="needs Chromium")

INJECTION = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
REPLY = (
    "你好！今天北京天气很好。\n\n```python\nfor day in week:\n    print(day)\n```\nUse `print` "
    f"for it.\n{INJECTION}"
)
# For those who want to look at it: a folder for screenshots.
SCREENSHOTS = os.environ.get("BAICHUAN_JAX_SCREENSHOTS")


class Engine(scripted.Engine):
    """Says what a test has put into `replies`, which no random model can."""

    num_slots, waiting = 4, 0

    def __init__(self, tokenizer, max_length):
        super().__init__(tokenizer, max_length, [], on_step=lambda _: time.sleep(0.01))
        self.replies, self.stats = self._replies, Stats()

    def step(self):
        changed = super().step()
        for output in changed:
            output.top += [[]] * (len(output.tokens) - len(output.top))
        return changed

    @property
    def active(self):
        return len(self._running)


@pytest.fixture(scope="module")
def model():
    model = serving.tiny_model(max_length=400)
    defaults = dataclasses.replace(model.defaults, max_new_tokens=200)
    engine = Engine(model.tokenizer, model.max_length)
    return dataclasses.replace(model, engine=engine, defaults=defaults, chat_defaults=defaults)


@pytest.fixture(scope="module")
def server(model):
    with serving.running(model) as server:
        yield server


@pytest.fixture(scope="module")
def new_page():
    with browser.chromium() as new_page:
        yield new_page


@pytest.fixture
def page(new_page, server, model):
    page = new_page()
    page.open(f"http://127.0.0.1:{server.port}/")
    page.js("localStorage.clear()")
    page.open(f"http://127.0.0.1:{server.port}/")
    page.wait("model !== null")
    yield page
    assert page.errors == []
    assert serving.eventually(lambda: not model.engine.busy)
    model.engine.replies.clear()


def say(page, model, text, reply):
    model.engine.replies.append(reply)
    page.type(text)
    page.press("Enter")


def done(page):
    page.wait("running === null && !document.querySelector('.waiting')")


def last(page):
    return page.js("[...document.querySelectorAll('.assistant .body')].at(-1).innerText")


def asked(model):
    """The prompt of the last request, as text."""
    return model.tokenizer.decode(model.engine.requests[-1].prompt)


def test_a_chat(page, model):
    assert "How can I help?" in page.text()
    say(page, model, "今天天气很好吗？", REPLY)
    page.wait("document.querySelector('.assistant .body')?.innerText.includes('你好')")
    assert page.js("document.querySelector('.waiting') !== null")  # it streams
    assert not page.js("document.getElementById('stop').hidden")
    done(page)
    assert "今天天气很好吗？" in page.js("document.querySelector('.user').innerText")
    assert "你好！今天北京天气很好。" in last(page)
    assert page.js("document.querySelector('.assistant pre code').textContent") == (
        "for day in week:\n    print(day)"
    )
    assert page.js("document.querySelector('.assistant p code').textContent") == "print"
    assert not page.js("document.getElementById('send').hidden")
    assert "How can I help?" not in page.text()

    say(page, model, "再说一次", "好的。")
    done(page)
    assert asked(model) == f"今天天气很好吗？{REPLY}再说一次"  # the whole chat is sent
    assert page.js("document.querySelectorAll('.regenerate').length") == 1


def test_what_is_written_stays_text(page, model):
    say(page, model, INJECTION, REPLY)
    done(page)
    assert INJECTION in page.js("document.querySelector('.user').innerText")
    assert INJECTION in last(page)
    time.sleep(0.2)
    assert page.js("document.title") == "tiny"
    assert page.js("document.querySelectorAll('#messages img, #messages script').length") == 0


def test_nothing_else_may_run_on_the_page(page):
    """Should the page ever make HTML of a text, the policy stops what it holds."""
    page.js(f"document.getElementById('messages').innerHTML = {json.dumps(INJECTION)}")
    time.sleep(0.3)
    assert page.js("document.title") == "tiny"
    page.call("Runtime.evaluate", expression="0")
    assert any("Content Security Policy" in str(error) for error in page.errors)
    page.errors.clear()


def test_stop_and_regenerate(page, model):
    say(page, model, "写一首诗", "春眠不觉晓，处处闻啼鸟。" * 6)
    page.wait("document.querySelector('.assistant .body')?.innerText.length > 5")
    page.click("#stop")
    done(page)
    assert len(last(page)) < 60 and "Stopped." in page.text()
    assert serving.eventually(lambda: len(model.engine.cancelled) == 1)
    model.engine.replies.append("白日依山尽。")
    page.click(".regenerate")
    done(page)
    assert last(page) == "白日依山尽。" and "Stopped." not in page.text()
    assert asked(model) == "写一首诗"
    assert page.js("messages.length") == 2
    page.click("#clear")
    assert page.js("messages.length") == 0 and "How can I help?" in page.text()


def test_clearing_ends_a_reply(page, model):
    before = len(model.engine.cancelled)
    say(page, model, "长", "春眠不觉晓，处处闻啼鸟。" * 6)
    page.wait("document.querySelector('.assistant .body')?.innerText.length > 5")
    page.click("#clear")
    assert serving.eventually(lambda: len(model.engine.cancelled) == before + 1)
    assert page.js("document.querySelectorAll('.message').length") == 0
    say(page, model, "短", "好")
    done(page)
    assert last(page) == "好"


def test_languages(page, model, server):
    assert page.js("document.documentElement.lang") == "en"
    say(page, model, "hi", "你好" * 300)  # longer than the model's default
    done(page)
    assert "Cut off" in page.text()
    page.click("#language")
    text = page.text()
    assert page.js("document.documentElement.lang") == "zh-CN"
    assert "新对话" in text and "重新生成" in text and "被截断" in text and "Cut off" not in text
    assert page.js("document.getElementById('input').placeholder") == "输入消息"
    address = f"http://127.0.0.1:{server.port}/"
    page.open(address)  # the choice is kept
    assert "有什么可以帮您" in page.text()
    page.js("localStorage.clear()")
    page.open(address, language="zh-CN")
    assert "有什么可以帮您" in page.text()
    page.open(address, language="de-DE")
    assert "How can I help?" in page.text()


def test_keys(page, model):
    before = len(model.engine.requests)
    page.type("one")
    page.press("Enter", modifiers=8)  # Shift
    page.type("two")
    assert page.js("document.getElementById('input').value") == "one\ntwo"
    composing = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, cancelable: true})"
    assert page.js(f"document.getElementById('input').dispatchEvent({composing})")
    assert len(model.engine.requests) == before and page.js("messages.length") == 0
    model.engine.replies.append("three")
    page.press("Enter")
    done(page)
    assert asked(model) == "one\ntwo"
    assert page.js("document.getElementById('input').value") == ""
    page.press("Enter")  # nothing to send
    page.type("  ")
    page.press("Enter")
    assert page.js("messages.length") == 2


def test_settings(page, model, server):
    page.click("#settings")
    assert page.js("document.getElementById('temperature').placeholder") == "0"
    for name, value in (("system", "说中文"), ("temperature", "0.5"), ("max_tokens", "7")):
        page.js(f"document.getElementById('{name}').value = '{value}'")
    page.js("document.getElementById('seed').value = '3'")
    page.press("Escape")
    page.wait("!document.getElementById('panel').open")
    page.open(f"http://127.0.0.1:{server.port}/")  # they are kept
    say(page, model, "你好", "你好")
    done(page)
    request = model.engine.requests[-1]
    assert asked(model) == "说中文你好"
    assert (request.sampling.temperature, request.sampling.seed) == (0.5, 3)
    assert request.max_new_tokens == 7
    page.js("document.getElementById('temperature').value = '99'")
    page.type("你好")
    page.press("Enter")
    page.wait("document.querySelector('.note.bad')")
    assert "temperature must be from 0 to 2, not 99." in page.text()
    assert "400" in page.errors.pop()["text"]


def test_truncation_is_told(page, model):
    for i in range(5):
        say(page, model, f"第{i}个问题：" + "天气" * 20, "很好" * 10)
        done(page)
    assert page.js("document.querySelectorAll('.note').length") > 0
    dropped = page.js("messages.at(-1).notes[0].rounds")
    assert dropped > 0
    assert f"it did not read the oldest {dropped} round" in page.text()
    page.click("#language")
    assert f"模型没有读到最早的 {dropped} 轮" in page.text()
    assert "第0个问题" not in asked(model) and "第4个问题" in asked(model)


def test_errors_and_the_key(new_page, model):
    with serving.running(model, api_key="k3y") as server:
        page = new_page()
        page.open(f"http://127.0.0.1:{server.port}/")
        page.js("localStorage.clear()")
        page.type("你好")
        page.press("Enter")
        page.wait("document.getElementById('panel').open")
        assert "asks for an API key" in page.text()
        page.js("document.getElementById('key').value = 'k3y'")
        page.click("#panel .main")
        page.wait("model !== null")
        model.engine.replies.append("好")
        page.click(".regenerate")
        done(page)
        assert last(page) == "好" and page.js("document.querySelector('.note.bad')") is None
    page.type("再见")
    page.press("Enter")
    page.wait("document.querySelector('.note.bad')")
    assert "cannot be reached" in page.text()


def test_a_model_without_chats(new_page, model):
    with serving.running(dataclasses.replace(model, format=None)) as server:
        page = new_page()
        page.open(f"http://127.0.0.1:{server.port}/")
        page.js("localStorage.clear()")
        page.wait("model !== null")
        assert "it continues your text" in page.text()
        say(page, model, "登鹳雀楼->", "王之涣")
        done(page)
        assert last(page) == "王之涣" and asked(model) == "登鹳雀楼->"


@pytest.mark.skipif(not SCREENSHOTS, reason="BAICHUAN_JAX_SCREENSHOTS names no folder")
def test_screenshots(new_page, server, model):
    address = f"http://127.0.0.1:{server.port}/"
    forms = {
        "desktop_light_zh": {"language": "zh-CN"},
        "desktop_dark_en": {"dark": True},
        "mobile_light_en": {"width": 390, "height": 780, "mobile": True},
        "mobile_dark_zh": {
            "width": 390,
            "height": 780,
            "mobile": True,
            "dark": True,
            "language": "zh-CN",
        },
    }
    folder = pathlib.Path(SCREENSHOTS)
    for name, form in forms.items():
        page = new_page()
        page.open(address)
        page.js("localStorage.clear()")
        page.open(address, **form)
        page.wait("model !== null")
        page.screenshot(folder / f"page_{name}_empty.png")
        say(page, model, "今天天气好吗？请写一段程序。", REPLY)
        done(page)
        for i in range(2):
            say(page, model, f"第{i}个问题：" + "天气" * 30, "很好。" * 10)
            done(page)
        page.screenshot(folder / f"page_{name}_end.png")
        page.js("document.getElementById('scroll').scrollTop = 0")
        time.sleep(0.2)
        page.screenshot(folder / f"page_{name}_chat.png")
        page.click("#settings")
        page.screenshot(folder / f"page_{name}_settings.png")
