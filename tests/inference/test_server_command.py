"""`python -m experiments.serve` on a released checkpoint, from its first line to SIGTERM."""

import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import types

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from baichuan_jax.inference.app import ServerOptions
from baichuan_jax.inference.server import serve
from tests.convert import releases
from tests.inference import serving

ROOT = pathlib.Path(__file__).parents[2]


def test_the_command(tmp_path):
    tokenizer = serving.make_tokenizer(tmp_path / "tokenizer.model")
    sizes = releases.tiny_model(vocab_size=560)
    folder = tmp_path / "Tiny-Chat"
    releases.make_release(folder, chat=True, model=sizes, tokenizer=tokenizer)
    environment = os.environ | {"BAICHUAN_JAX_API_KEY": "k3y", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "experiments.serve", f"--checkpoint={folder}", "--port=0"]
    command += ["--slots=2", "--max_length=512", "--quantize=int8", "--cache_dtype=int8"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = process.stdout.readline()
            found = re.search(r"Tiny-Chat is served at http://127\.0\.0\.1:(\d+)", said)
            assert found, said + process.stderr.read()
            assert "curl" in process.stdout.readline()
            server = types.SimpleNamespace(port=int(found[1]))
            assert serving.ask(server, "GET", "/v1/models")[0] == 401
            key = {"Authorization": "Bearer k3y"}
            card = serving.ask(server, "GET", "/v1/models", headers=key)[2]["data"][0]
            assert (card["id"], card["max_model_len"]) == ("Tiny-Chat", 512)
            assert card["defaults"]["repetition_penalty"] == 1.05
            asked = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 400}
            asked |= {"ignore_eos": True, "stream": True}
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("POST", "/v1/chat/completions", json.dumps(asked), key)
            answer = connection.getresponse()
            process.send_signal(signal.SIGTERM)
            *events, last, rest = answer.read().decode().split("\n\n")
            assert (last, rest) == ("data: [DONE]", "")
            assert json.loads(events[-1][6:])["choices"][0]["finish_reason"] == "length"
            assert process.wait(60) == 0, process.stderr.read()
        finally:
            process.kill()


def test_an_address_in_use():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = ServerOptions(port=listener.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            serve(None, options)
