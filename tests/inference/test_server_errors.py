"""What the server refuses: the status, and a message that names what was wrong."""

import dataclasses
import http.client
import json
import socket

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from tests.inference import serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "好"}
LIMIT = 100_000


@pytest.fixture(scope="module")
def model():
    return serving.tiny_model()


@pytest.fixture(scope="module")
def server(model):
    with serving.running(model, max_body_bytes=LIMIT, max_queue=20) as server:
        yield server
        assert serving.ask(server, "GET", "/health")[2]["active"] == 0
        assert server.worker.unfinished == 0
        assert serving.ask(server, "POST", TEXT, {"prompt": "x", "max_tokens": 1})[0] == 200


def refused(server, path, body, status=400, param=None, code=None, method="POST", **headers):
    """Asserts that the answer is an error of OpenAI's shape; returns its message."""
    found, _, answer = serving.ask(server, method, path, body, headers)
    assert isinstance(answer, dict), answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (found, error["param"], error["code"]) == (status, param, code), error
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    assert error["type"] == kinds.get(status, "invalid_request_error")
    assert error["message"] and "Traceback" not in error["message"]
    return error["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "x",}', "not valid JSON"),
        (b'{"prompt": "x"} {}', "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "not valid UTF-8"),
        (b'{"prompt": "\xe4\xb8"}', "not valid UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), "not valid UTF-8"),
        (b"[" * 50_000, "nested too deeply"),
        (b'{"a":' * 10_000, "nested too deeply"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "x", "stop": ["\\udc00"]}', "lone surrogate"),
        (b'{"prompt": "x", "\\udc00": 1}', "lone surrogate"),
        (b"[]", "JSON object"),
        (b'"prompt"', "JSON object"),
        (b"null", "JSON object"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
def test_bodies(server, path, body, says):
    assert says in refused(server, path, body)


TYPE, VALUE, MISSING = "invalid_type", "invalid_value", "missing_required_parameter"
LACKS, UNKNOWN = "unsupported_parameter", "unknown_parameter"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": -0.1}, "temperature", VALUE),
        ({"temperature": 2.1}, "temperature", VALUE),
        ({"temperature": 1e999}, "temperature", VALUE),
        ({"temperature": 10**400}, "temperature", VALUE),
        ({"temperature": "hot"}, "temperature", TYPE),
        ({"temperature": True}, "temperature", TYPE),
        ({"temperature": [1]}, "temperature", TYPE),
        ({"top_p": 0}, "top_p", VALUE),
        ({"top_p": 1.01}, "top_p", VALUE),
        ({"top_k": -1}, "top_k", VALUE),
        ({"top_k": 1.5}, "top_k", TYPE),
        ({"top_k": 10**9}, "top_k", VALUE),
        ({"repetition_penalty": 0}, "repetition_penalty", VALUE),
        ({"repetition_penalty": -1e999}, "repetition_penalty", VALUE),
        ({"presence_penalty": 3}, "presence_penalty", VALUE),
        ({"frequency_penalty": -2.5}, "frequency_penalty", VALUE),
        ({"max_tokens": -1}, "max_tokens", VALUE),
        ({"max_tokens": 1.5}, "max_tokens", TYPE),
        ({"max_tokens": 2**31 + 1}, "max_tokens", VALUE),
        ({"max_tokens": "9"}, "max_tokens", TYPE),
        ({"n": 0}, "n", VALUE),
        ({"n": 9}, "n", VALUE),
        ({"n": 10**30}, "n", VALUE),
        ({"seed": 2**63}, "seed", VALUE),
        ({"seed": 0.5}, "seed", TYPE),
        ({"stop": 5}, "stop", TYPE),
        ({"stop": [""]}, "stop", VALUE),
        ({"stop": ""}, "stop", VALUE),
        ({"stop": ["a", 1]}, "stop", TYPE),
        ({"stop": ["a"] * 17}, "stop", VALUE),
        ({"stop": "a" * 1_001}, "stop", VALUE),
        ({"stream": "yes"}, "stream", TYPE),
        ({"stream": 1}, "stream", TYPE),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"stream": True, "stream_options": 1}, "stream_options", TYPE),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            TYPE,
        ),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", UNKNOWN),
        ({"logit_bias": [1]}, "logit_bias", TYPE),
        ({"logit_bias": {"-1": 1}}, "logit_bias", VALUE),
        ({"logit_bias": {"99999": 1}}, "logit_bias", VALUE),
        ({"logit_bias": {"二": 1}}, "logit_bias", VALUE),
        ({"logit_bias": {"١": 1}}, "logit_bias", VALUE),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", VALUE),
        ({"logit_bias": {"1": "a"}}, "logit_bias.1", TYPE),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", VALUE),
        ({"ignore_eos": 1}, "ignore_eos", TYPE),
        ({"model": 5}, "model", TYPE),
        ({"tools": [{"type": "function"}]}, "tools", LACKS),
        ({"functions": [{}]}, "functions", LACKS),
        ({"response_format": {"type": "json_object"}}, "response_format", LACKS),
        ({"audio": {"voice": "alloy"}}, "audio", LACKS),
        ({"modalities": ["audio"]}, "modalities", LACKS),
        ({"reasoning_effort": "high"}, "reasoning_effort", LACKS),
        ({"best_of": 3}, "best_of", LACKS),
        ({"min_p": 0.1}, "min_p", UNKNOWN),
        ({"promt": "x"}, "promt", UNKNOWN),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_parameters(server, path, fields, param, code):
    asked = {"messages": [USER]} if path == CHAT else {"prompt": "x"}
    body = json.dumps(asked | fields).replace("Infinity", "1e999").encode()
    assert param in refused(server, path, body, param=param, code=code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "messages", MISSING),
        ({"messages": []}, "messages", TYPE),
        ({"messages": "hi"}, "messages", TYPE),
        ({"messages": {"role": "user"}}, "messages", TYPE),
        ({"messages": ["hi"]}, "messages[0]", TYPE),
        ({"messages": [{"role": "user"}]}, "messages[0].content", MISSING),
        ({"messages": [{"content": "x"}]}, "messages[0].role", VALUE),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", VALUE),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", TYPE),
        ({"messages": [{**USER, "x": 5}]}, "messages[0].x", UNKNOWN),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls", LACKS),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            VALUE,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            MISSING,
        ),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "messages", VALUE),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens", VALUE),
        ({"messages": [USER], "max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", None),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs", None),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs", VALUE),
        ({"messages": [USER], "logprobs": 3}, "logprobs", TYPE),
        ({"messages": [USER], "echo": True}, "echo", UNKNOWN),
        ({"messages": [USER], "max_tokens": 300}, "messages", "context_length_exceeded"),
        (
            {"messages": [{"role": "user", "content": "好" * 300}]},
            "messages",
            "context_length_exceeded",
        ),
    ],
)
def test_chats(server, fields, param, code):
    refused(server, CHAT, fields, param=param, code=code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "prompt", MISSING),
        ({"prompt": ""}, "prompt", VALUE),
        ({"prompt": []}, "prompt", TYPE),
        ({"prompt": 5}, "prompt", TYPE),
        ({"prompt": ["a", ""]}, "prompt[1]", VALUE),
        ({"prompt": ["a", 5]}, "prompt[1]", TYPE),
        ({"prompt": [[]]}, "prompt[0]", VALUE),
        ({"prompt": [-1]}, "prompt", VALUE),
        ({"prompt": [10**30]}, "prompt", VALUE),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]", TYPE),
        ({"prompt": [[True]]}, "prompt[0][0]", TYPE),
        ({"prompt": ["a"] * 129}, "prompt", VALUE),
        ({"prompt": ["a"] * 25}, None, VALUE),  # 4 slots and a queue of 20
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", VALUE),
        ({"prompt": "a", "logprobs": 21}, "logprobs", VALUE),
        ({"prompt": "a", "logprobs": True}, "logprobs", TYPE),
        ({"prompt": "a", "suffix": "b"}, "suffix", LACKS),
        ({"prompt": "a", "messages": [USER]}, "messages", UNKNOWN),
        ({"prompt": "a", "max_tokens": 256}, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 256}, "prompt", "context_length_exceeded"),
    ],
)
def test_completions(server, fields, param, code):
    refused(server, TEXT, fields, param=param, code=code)


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        ("/tokenize", {}, "prompt", None),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt", None),
        ("/tokenize", {"prompt": 5}, "prompt", TYPE),
        ("/tokenize", {"prompt": "a", "x": 1}, "x", UNKNOWN),
        ("/detokenize", {}, "tokens", MISSING),
        ("/detokenize", {"tokens": "a"}, "tokens", TYPE),
        ("/detokenize", {"tokens": [1, None]}, "tokens[1]", MISSING),
        ("/detokenize", {"tokens": [560]}, "tokens", VALUE),
    ],
)
def test_tokenizing(server, path, fields, param, code):
    refused(server, path, fields, param=param, code=code)


def test_paths_methods_and_models(server):
    assert "/v2/x" in refused(server, "/v2/x", None, 404, method="GET")
    refused(server, "/v1/completions/", {}, 404)
    assert "DELETE" in refused(server, TEXT, None, 405, method="DELETE")
    refused(server, CHAT, None, 405, method="GET")
    refused(server, "/health", {}, 405)
    asked = {"prompt": "x", "model": "gpt-5"}
    assert "'tiny'" in refused(server, TEXT, asked, 404, "model", "model_not_found")
    refused(server, "/v1/models/gpt-5", None, 404, "model", "model_not_found", method="GET")
    refused(server, "/tokenize", asked, 404, "model", "model_not_found")


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_large_bodies(server, path):
    body = json.dumps({"prompt": "x" * 2 * LIMIT}).encode()
    assert str(LIMIT) in refused(server, path, body, 413, code="body_too_large")
    fits = json.dumps({"prompt": "x"}).ljust(LIMIT).encode()
    assert serving.ask(server, "POST", "/tokenize", fits)[0] == 200


def test_endless_bodies_are_not_read(server):
    """In chunks, without a length: the answer comes, and the connection ends."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", CHAT)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sent, chunk = 0, b"%x\r\n%b\r\n" % (50_000, b"x" * 50_000)
    try:
        while sent < 50_000_000:
            connection.send(chunk)
            sent += len(chunk)
    except OSError:  # the server has hung up
        pass
    assert sent < 20_000_000  # what fits into buffers on the way
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.load(answer)["error"]["code"] == "body_too_large"
    connection.close()


def test_a_body_that_never_comes_is_not_waited_for(server):
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    assert serving.eventually(lambda: not server.server_state.tasks)


def test_a_body_that_is_too_slow(server, monkeypatch):
    from baichuan_jax.inference import app

    monkeypatch.setattr(app, "_BODY_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 408
        assert "did not arrive" in json.load(answer)["error"]["message"]


def test_models_that_cannot_chat(model):
    from baichuan_jax import chat
    from baichuan_jax.inference import calls
    from baichuan_jax.inference.protocol import ApiError

    without = dataclasses.replace(model, format=None)
    with pytest.raises(ApiError, match="use /v1/completions"):
        calls.chat_call({"messages": [USER]}, without)
    first = dataclasses.replace(model, format=chat.chat_format(model.tokenizer, 1))
    calls.chat_call({"messages": [USER]}, first)
    with pytest.raises(ApiError, match="Baichuan 1 has no system message"):
        calls.chat_call({"messages": [{"role": "system", "content": "x"}, USER]}, first)


def test_what_is_not_http(server):
    for junk in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a" * 100_000):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            client.sendall(junk)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65_536):
                pass
    assert serving.eventually(lambda: not server.server_state.connections)


def test_the_key(model):
    asked = {"prompt": "x", "max_tokens": 1}
    with serving.running(model, api_key="s3cret-钥") as server:
        for header in ("", "s3cret-钥", "Bearer", "Bearer s3cret", "Bearer s3cret-钥x", "Basic x"):
            header = header.encode() or b"Bearer "
            message = refused(
                server, TEXT, asked, 401, code="invalid_api_key", Authorization=header
            )
            assert "s3cret" not in message
        refused(server, TEXT, asked, 401, code="invalid_api_key")
        for path in ("/v1/models", "/metrics", "/nowhere"):
            refused(server, path, None, 401, code="invalid_api_key", method="GET")
        for path in ("/", "/health"):
            assert serving.ask(server, "GET", path)[0] == 200
        for scheme in ("Bearer", "bearer"):
            headers = {"Authorization": f"{scheme} s3cret-钥".encode()}
            assert serving.ask(server, "POST", TEXT, asked, headers)[0] == 200


def test_a_bug_is_told_without_its_traceback(server, monkeypatch, caplog):
    from baichuan_jax.inference import app

    def broken(body, model):
        raise KeyError("secret place")

    monkeypatch.setattr(app, "text_ids", broken)
    status, _, answer = serving.ask(server, "POST", "/tokenize", {"prompt": "x"})
    assert status == 500 and answer["error"]["type"] == "server_error"
    assert "secret place" not in answer["error"]["message"]
    assert "secret place" in caplog.text
    assert serving.ask(server, "GET", "/health")[0] == 200
