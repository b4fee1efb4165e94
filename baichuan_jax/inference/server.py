"""An OpenAI-compatible HTTP server around one model, and a chat page at /.

  POST /v1/chat/completions, /v1/completions    with "stream": true as server-sent events
  GET  /v1/models, /v1/models/NAME
  POST /tokenize, /detokenize; GET /tokenizer_info    as vLLM's and lm-eval's clients expect
  GET  /health, /metrics    (Prometheus), /    (the page)

`protocol` and `calls` read requests, the thread of `worker` runs them, `replies` answers, and
`app` does what HTTP asks for; here are the socket, the start and the end.
"""

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from baichuan_jax.inference.app import ServerOptions, create_app
from baichuan_jax.inference.load import LanguageModel
from baichuan_jax.inference.metrics import Metrics
from baichuan_jax.inference.worker import Worker


def listen(options: ServerOptions) -> socket.socket:
    """The socket of `options.host` and `options.port`; its queue is open, nobody answers yet.

    Raises:
      OSError: the address cannot be listened on; says which flags.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        raise OSError(
            f"--host={options.host} --port={options.port} cannot be listened on"
            f" ({error.strerror}): choose another, or --port=0 for any free one."
        ) from error


def serve(
    model: LanguageModel,
    options: ServerOptions,
    on_ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests end and returns.

    Args:
      on_ready: called with the server's address when it listens.

    Raises:
      OSError: the address cannot be listened on.
    """
    with listen(options) as listener:
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        Server(model, options, on_ready=lambda: on_ready(address)).run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn with a model behind it. `run(sockets)` blocks; `should_exit` ends it."""

    def __init__(
        self,
        model: LanguageModel,
        options: ServerOptions,
        on_ready: Callable[[], None] = lambda: None,
    ):
        self.metrics = Metrics(model.engine)
        self.worker = Worker(model.engine, options.max_queue, self.metrics.observe)
        self._options, self._on_ready = options, on_ready
        super().__init__(
            uvicorn.Config(
                create_app(model, self.worker, self.metrics, options),
                http="h11",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(options.grace_s) + 5,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        finally:
            self.worker.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.start()
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.begin_shutdown(self._options.grace_s)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        # uvicorn would raise the signal again after a clean end. A second one does not wait.
        self.force_exit = self.should_exit
        self.should_exit = True
