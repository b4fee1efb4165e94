"""A tiny random chat model behind a real server on a free port of 127.0.0.1."""

import contextlib
import http.client
import json
import pathlib
import socket
import tempfile
import threading
import time

import jax
import jax.numpy as jnp

from baichuan_jax import chat, tokenizer
from baichuan_jax.config import Config, ModelConfig
from baichuan_jax.inference import weights
from baichuan_jax.inference.app import ServerOptions
from baichuan_jax.inference.engine import Engine
from baichuan_jax.inference.load import Defaults, LanguageModel
from baichuan_jax.inference.server import Server
from baichuan_jax.model.transformer import Transformer

LINES = [
    "中华人民共和国成立于1949年，首都是北京。",
    "今天天气很好，人民生活幸福；我们去北京看天安门！",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "Training data for language models: the more training data, the better.",
]


def make_tokenizer(path: pathlib.Path) -> pathlib.Path:
    """A SentencePiece file of 560 tokens, the role tokens of a chat among them."""
    tokenizer.train(((line, "a") for line in LINES * 20), path, vocab_size=560)
    return path


def tiny_model(*, slots=4, max_length=256) -> LanguageModel:
    """Hidden 64, 2 layers, and a tokenizer of a few lines; its greedy text is arbitrary."""
    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer.Tokenizer(make_tokenizer(pathlib.Path(folder) / "tokenizer.model"))
    config = Config()
    config.model = ModelConfig(
        vocab_size=words.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        initializer_range=0.3,
    )
    trained = Transformer(jax.random.key(0), config.model)
    engine = Engine(
        weights.of_model(trained, config.model, jnp.float32),
        config.model,
        eos_id=words.eos_id,
        tokenizer=words,
        slots=slots,
        max_length=max_length,
    )
    return LanguageModel(
        name="tiny",
        config=config,
        engine=engine,
        tokenizer=words,
        format=chat.chat_format(words, 2),
        defaults=Defaults(max_new_tokens=64),
        chat_defaults=Defaults(max_new_tokens=64),
    )


@contextlib.contextmanager
def running(model, **options):
    """A server in a thread; gives it with its `port` and `loop`, and ends it."""
    started = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = {"grace_s": 5.0, **options}
        server = Server(model, ServerOptions(**options), on_ready=started.set)
        server.port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert started.wait(20)
            yield server
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def ask(server, method, path, body=None, headers=None):
    """Status, headers and JSON (or text) of one request; `body` is JSON or bytes."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    if answer.headers.get_content_type() == "application/json":
        data = json.loads(data)
    return answer.status, answer.headers, data


def eventually(condition, seconds=20.0):
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
