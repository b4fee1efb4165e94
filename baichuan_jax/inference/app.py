"""The ASGI application of the server: paths, keys, bodies and streams.

Every error is an answer in OpenAI's shape.
"""

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import importlib.resources
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import prometheus_client
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baichuan_jax.inference.calls import Call, chat_call, completion_call, ids_text, text_ids
from baichuan_jax.inference.load import LanguageModel
from baichuan_jax.inference.metrics import Metrics
from baichuan_jax.inference.protocol import ApiError, parse, unknown_model
from baichuan_jax.inference.replies import Reply
from baichuan_jax.inference.worker import Ticket, Worker

_PUBLIC = ("/", "/health")  # need no key
_CLOSE = {"Connection": "close"}  # where a body may be left that is not read
_BODY_TIMEOUT_S = 60
_HEARTBEAT_S = 15  # proxies close streams that are silent for long


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """How to serve.

    Attributes:
      host: 127.0.0.1 is reached from this machine only; 0.0.0.0 from everywhere.
      port: 0 takes a free one.
      api_key: what clients must send as a bearer token; '': nothing.
      max_queue: requests that may wait for a slot; more get status 429.
      max_body_bytes: of a request; more gets status 413.
      grace_s: for running requests, when the server is told to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    max_queue: int = 128
    max_body_bytes: int = 4 * 2**20
    grace_s: float = 10.0


def create_app(
    model: LanguageModel, worker: Worker, metrics: Metrics, options: ServerOptions
) -> Starlette:
    """The ASGI application, without the threads and sockets."""
    handlers = _Handlers(model, worker, metrics, options)
    application = Starlette(
        routes=[
            Route("/", handlers.page),
            Route("/health", handlers.health),
            Route("/metrics", handlers.metrics),
            Route("/v1/models", handlers.models),
            Route("/v1/models/{name:path}", handlers.model),
            Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
            Route("/v1/completions", handlers.completions, methods=["POST"]),
            Route("/tokenize", handlers.tokenize, methods=["POST"]),
            Route("/detokenize", handlers.detokenize, methods=["POST"]),
            Route("/tokenizer_info", handlers.tokenizer_info),
        ],
        middleware=[Middleware(_Gate, api_key=options.api_key, metrics=metrics)],
        exception_handlers={
            ApiError: _on_api_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
        },
    )
    application.router.redirect_slashes = False
    return application


class _Handlers:
    """What the paths do."""

    def __init__(self, model, worker, metrics, options):
        self._model: LanguageModel = model
        self._worker: Worker = worker
        self._metrics: Metrics = metrics
        self._options: ServerOptions = options
        self._page, self._page_policy = _page()
        self._created = int(time.time())

    async def page(self, request: Request) -> Response:
        return HTMLResponse(
            self._page,
            headers={
                "Content-Security-Policy": self._page_policy,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
            },
        )

    async def health(self, request: Request) -> Response:
        self._worker.check()
        engine = self._model.engine
        load = {"active": engine.active, "waiting": engine.waiting}
        return JSONResponse({"status": "ok", "model": self._model.name} | load)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self._model.name:
            raise unknown_model(name, self._model.name)
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, chat_call)

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, completion_call)

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        ids = await run_in_threadpool(lambda: text_ids(parse(body), self._model))
        size = {"count": len(ids), "max_model_len": self._model.max_length}
        return JSONResponse(size | {"tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        text = await run_in_threadpool(lambda: ids_text(parse(body), self._model))
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = self._model.tokenizer
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "unk_token_id": tokenizer.unk_id,
        }
        return JSONResponse({"tokenizer_class": type(tokenizer).__name__} | names | ids)

    async def _complete(self, request: Request, read: Callable[..., Call]) -> Response:
        self._worker.check()
        body = await self._body(request)
        # Long prompts take their time, which the other streams shall not wait for.
        call = await run_in_threadpool(lambda: read(parse(body), self._model))
        reply = Reply(call, self._model.tokenizer)
        ticket = await self._worker.submit(call.requests)
        if call.stream:
            return _EventStream(ticket, reply, self._worker)
        try:
            answer = await _unless_disconnected(_collect(ticket, reply), request.receive)
        finally:
            self._worker.cancel(ticket)
        return JSONResponse(answer)

    async def _body(self, request: Request) -> bytes:
        limit = self._options.max_body_bytes
        message = f"The body is larger than {limit} bytes."
        error = ApiError(413, message, code="body_too_large", headers=_CLOSE)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise error
        data = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > limit:
                        raise error
        except TimeoutError:
            message = f"The body did not arrive within {_BODY_TIMEOUT_S} seconds."
            raise ApiError(408, message, headers=_CLOSE) from None
        return bytes(data)

    def _card(self) -> dict[str, Any]:
        model = self._model
        defaults = model.chat_defaults if model.format else model.defaults
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "baichuan_jax",
            "max_model_len": model.max_length,
            "chat": model.format is not None,
            "system_prompt": model.format is not None and model.format.version != 1,
            "defaults": {
                "temperature": defaults.sampling.temperature,
                "top_k": defaults.sampling.top_k,
                "top_p": defaults.sampling.top_p,
                "repetition_penalty": defaults.sampling.repetition_penalty,
                "max_tokens": model.limit(0, defaults.max_new_tokens),
            },
        }


class _EventStream(StreamingResponse):
    """Server-sent events; frees the engine's slots however it ends."""

    def __init__(self, ticket: Ticket, reply: Reply, worker: Worker):
        self._ticket, self._worker = ticket, worker
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(ticket, reply), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._ticket)


async def _events(ticket: Ticket, reply: Reply) -> AsyncIterator[str]:
    for chunk in reply.opening():
        yield _event(chunk)
    try:
        while True:
            try:
                async with asyncio.timeout(_HEARTBEAT_S):
                    index, update = await anext(ticket)
            except StopAsyncIteration:
                break
            except TimeoutError:
                yield ": still working\n\n"
                continue
            reply.feed(index, update)
            for chunk in reply.chunks(index):
                yield _event(chunk)
        for chunk in reply.closing():
            yield _event(chunk)
    except ApiError as error:  # the status has been sent, so it comes as an event
        yield _event(error.body())
    yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _collect(ticket: Ticket, reply: Reply) -> dict[str, Any]:
    async for index, update in ticket:
        reply.feed(index, update)
    return reply.whole()


async def _unless_disconnected(work: Awaitable[Any], receive: Receive) -> Any:
    """The result of `work`, which ends with ClientDisconnect when the client hangs up."""

    async def watch():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(watch())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Gate:
    """Asks for the key, counts the answers, and keeps what breaks inside to the log."""

    def __init__(self, application: ASGIApp, api_key: str, metrics: Metrics):
        self._application, self._key, self._metrics = application, api_key.encode(), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.count(scope["path"], message["status"])
            await send(message)

        if scope["path"] not in _PUBLIC and not self._may(scope):
            message = "Wrong or missing API key: send it as 'Authorization: Bearer KEY'."
            headers = {"WWW-Authenticate": "Bearer"} | _CLOSE
            error = ApiError(401, message, code="invalid_api_key", headers=headers)
            return await _answer(error)(scope, receive, counted)
        try:
            await self._application(scope, receive, counted)
        except Exception:
            logging.exception("%s %r failed.", scope["method"], scope["path"])
            if started:
                raise  # uvicorn hangs up, so that no one takes the answer for whole
            error = ApiError(500, "The server made an error; its log says which.")
            await _answer(error)(scope, receive, counted)

    def _may(self, scope: Scope) -> bool:
        sent = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = sent.partition(b" ")
        right = hmac.compare_digest(key.strip(), self._key)
        return not self._key or (scheme.lower() == b"bearer" and right)


def _answer(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return _answer(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    messages = {
        404: f"There is no {request.url.path}.",
        405: f"{request.method} is not allowed for {request.url.path}.",
    }
    message = messages.get(error.status_code, error.detail)
    headers = dict(error.headers or {}) | _CLOSE
    return _answer(ApiError(error.status_code, message, headers=headers))


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


def _page() -> tuple[str, str]:
    """The page, and a policy that lets nothing run but what is written in it."""
    page = importlib.resources.files("baichuan_jax.inference") / "page" / "index.html"
    html = page.read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    policy = [
        "default-src 'none'",
        f"script-src {hashes('script')}",
        f"style-src {hashes('style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return html, "; ".join(policy)
