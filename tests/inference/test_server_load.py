"""Many clients, clients that hang up, a full queue, a failing engine, the server's end."""

import asyncio
import contextlib
import gc
import http.client
import json
import os
import pathlib
import socket
import threading
import time

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from baichuan_jax.inference.request import Request
from tests.inference import serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": "今天天气", "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    model = serving.tiny_model()
    model.engine.generate([Request([5, 6, 7], max_new_tokens=200, ignore_eos=True)])  # compiles
    return model


@pytest.fixture
def server(model):
    with serving.running(model) as server:
        yield server
        assert serving.eventually(lambda: is_idle(server, model))


def is_idle(server, model):
    """Whether nothing is left of any request."""
    engine, worker = model.engine, server.worker
    return (
        not (engine.busy or engine.active or engine.waiting)
        and not (worker.unfinished or worker._tickets or worker._sent)
        and not server.server_state.tasks
    )


@pytest.fixture
def slowly(model, monkeypatch):
    """Makes each visit take so long that 200 tokens take seconds; counts cancelled requests."""
    step, cancel, cancelled = model.engine.step, model.engine.cancel, []

    def slow_step():
        time.sleep(0.1)
        return step()

    def counted_cancel(output):
        cancelled.append(output)
        cancel(output)

    monkeypatch.setattr(model.engine, "step", slow_step)
    monkeypatch.setattr(model.engine, "cancel", counted_cancel)
    return cancelled


def start(server, path, fields):
    """Sends a request; returns the socket without waiting for an answer."""
    body = json.dumps(fields).encode()
    client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def events(data):
    """The JSON of a finished stream."""
    *found, last, rest = data.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def resident_bytes():
    gc.collect()
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_64_streams_at_a_time(server, model):
    """Each gets what it would get alone, and nothing is left behind."""
    openai = pytest.importorskip("openai", reason="needs the `openai` client")
    prompts = [f"{i} The quick brown fox 今天 {'天气' * (i % 7)}" for i in range(64)]
    alone = model.engine.generate(
        [
            Request(model.tokenizer.encode(prompt), max_new_tokens=10 + i % 30)
            for i, prompt in enumerate(prompts)
        ]
    )

    async def one(client, i):
        stream = await client.completions.create(
            model="tiny", prompt=prompts[i], max_tokens=10 + i % 30, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        return "".join(chunk.choices[0].text for chunk in chunks)

    async def everyone():
        url = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    assert asyncio.run(everyone()) == [output.text for output in alone]
    assert serving.eventually(lambda: is_idle(server, model))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_clients_that_hang_up_free_their_slots(server, model, slowly, path, stream):
    fields = LONG | {"stream": stream, "n": 2}
    if path == CHAT:
        fields["messages"] = [{"role": "user", "content": fields.pop("prompt")}]
    clients = [start(server, path, fields) for _ in range(6)]  # 4 slots: some are queued
    assert serving.eventually(lambda: server.worker.unfinished == 12)
    assert serving.eventually(lambda: model.engine.active == 4)
    for client in clients:
        if stream:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        client.close()
    before = model.engine.stats.generated_tokens
    assert serving.eventually(lambda: is_idle(server, model), 5)
    assert len(slowly) == 12
    assert {output.finish_reason for output in slowly} == {"cancelled"}
    assert model.engine.stats.generated_tokens - before < 400  # of 2,400


def test_the_openai_client_can_cancel(server, model, slowly):
    openai = pytest.importorskip("openai", reason="needs the `openai` client")

    async def cancel():
        url = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as client:
            create = client.completions.create
            extra = {"extra_body": {"ignore_eos": True}}
            whole = asyncio.ensure_future(create(model="tiny", prompt="x", max_tokens=200, **extra))
            stream = await create(model="tiny", prompt="x", max_tokens=200, stream=True, **extra)
            async for _ in stream:
                break
            whole.cancel()
            await stream.close()
            with contextlib.suppress(asyncio.CancelledError):
                await whole

    asyncio.run(cancel())
    assert serving.eventually(lambda: is_idle(server, model), 5)
    assert len(slowly) == 2


def test_silent_streams_show_life(server, slowly, monkeypatch):
    from baichuan_jax.inference import app

    monkeypatch.setattr(app, "_HEARTBEAT_S", 0.02)
    fields = LONG | {"max_tokens": 20, "stream": True}
    data = serving.ask(server, "POST", TEXT, fields)[2].decode()
    assert data.count(": still working\n\n") > 2
    chunks = events(data.replace(": still working\n\n", "").encode())
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_full_queue(model, slowly):
    with serving.running(model, max_queue=2) as server:
        clients = [start(server, TEXT, LONG | {"stream": True}) for _ in range(6)]
        assert serving.eventually(lambda: server.worker.unfinished == 6)
        status, headers, answer = serving.ask(server, "POST", TEXT, {"prompt": "x"})
        assert status == 429 and int(headers["Retry-After"]) > 0
        assert answer["error"]["type"] == "rate_limit_error"
        assert answer["error"]["code"] == "queue_full"
        engine = model.engine
        assert serving.eventually(lambda: (engine.active, engine.waiting) == (4, 2))
        health = serving.ask(server, "GET", "/health")[2]
        assert (health["active"], health["waiting"]) == (4, 2)
        assert b"baichuan_jax_queue_length 2.0" in serving.ask(server, "GET", "/metrics")[2]
        clients.pop().close()  # one place in the queue is free again
        assert serving.eventually(lambda: server.worker.unfinished == 5)
        clients.append(start(server, TEXT, LONG | {"stream": True}))
        assert clients[-1].recv(100).startswith(b"HTTP/1.1 200")
        for client in clients:
            client.close()
        assert serving.eventually(lambda: is_idle(server, model), 5)


def test_nothing_leaks(server, model):
    """Mixed good, bad and broken requests leave no task, connection, thread or memory."""
    asked = LONG | {"max_tokens": 40, "logprobs": 5, "echo": True}

    def wave():
        for stream in (False, True):
            status, _, _ = serving.ask(server, "POST", TEXT, asked | {"stream": stream})
            assert status == 200
        start(server, TEXT, LONG | {"stream": True}).close()
        start(server, TEXT, LONG).close()
        assert serving.ask(server, "POST", TEXT, b"{" * 50_000)[0] == 400
        assert serving.ask(server, "POST", TEXT, {"prompt": "x" * 100_000})[0] == 400
        assert serving.ask(server, "GET", "/")[0] == 200

    def many(count):
        threads = [
            threading.Thread(target=lambda: [wave() for _ in range(count)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert serving.eventually(lambda: is_idle(server, model))
        assert serving.eventually(lambda: not server.server_state.connections)

    many(10)
    before, tasks, threads = resident_bytes(), tasks_of(server), threading.active_count()
    many(30)
    assert tasks_of(server) <= tasks
    assert threading.active_count() <= threads + 40  # anyio keeps its pool
    assert resident_bytes() - before < 20 * 2**20, (before, resident_bytes())


def tasks_of(server):
    """asyncio tasks of the server's loop."""
    found = threading.Event()
    counts = []

    def count():
        counts.append(len(asyncio.all_tasks()))
        found.set()

    server.worker._loop.call_soon_threadsafe(count)
    assert found.wait(10)
    return counts[0]


def test_an_idle_server_sleeps(server):
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25


def test_a_failing_engine_is_told_to_everyone(model, slowly, monkeypatch):
    with serving.running(model) as server:
        streamed = start(server, TEXT, LONG | {"stream": True})
        plain = start(server, TEXT, LONG)
        assert streamed.recv(100).startswith(b"HTTP/1.1 200")
        assert serving.eventually(lambda: server.worker.unfinished == 2)

        def fail():
            raise RuntimeError("out of memory")

        monkeypatch.setattr(model.engine, "step", fail)
        answer = http.client.HTTPResponse(plain)
        answer.begin()
        assert answer.status == 503
        assert json.load(answer)["error"]["code"] == "engine_failed"
        data = b""
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data += streamed.recv(65_536)
        assert b'"code":"engine_failed"' in data and b"data: [DONE]" in data
        for method, path, fields in (("GET", "/health", None), ("POST", TEXT, {"prompt": "x"})):
            status, _, answer = serving.ask(server, method, path, fields)
            assert status == 503 and answer["error"]["type"] == "server_error"
            assert "RuntimeError: out of memory" in answer["error"]["message"]
        assert serving.ask(server, "GET", "/")[0] == 200
        assert server.worker.unfinished == 0
    for output in list(server.worker._sent):  # the next tests find the engine as it was
        model.engine.cancel(output)


def test_the_end_waits_for_running_requests(model, slowly):
    with serving.running(model, grace_s=30) as server:
        client = start(server, TEXT, LONG | {"max_tokens": 40, "stream": True})
        answer = http.client.HTTPResponse(client)
        answer.begin()
        server.should_exit = True
        found = events(answer.read())
        assert found[-1]["choices"][0]["finish_reason"] == "length"
    with pytest.raises(ConnectionRefusedError):
        start(server, TEXT, LONG)


def test_the_end_does_not_wait_for_ever(model, slowly):
    with serving.running(model, grace_s=0.2) as server:
        stream = http.client.HTTPResponse(start(server, TEXT, LONG | {"stream": True}))
        stream.begin()
        plain = http.client.HTTPResponse(start(server, TEXT, LONG))
        assert serving.eventually(lambda: server.worker.unfinished == 2)
        began = time.monotonic()
        server.should_exit = True
        assert events(stream.read())[-1]["error"]["code"] == "shutting_down"
        plain.begin()
        assert plain.status == 503
        assert json.load(plain)["error"]["code"] == "shutting_down"
    assert time.monotonic() - began < 5
    assert len(slowly) == 2 and not model.engine.busy
