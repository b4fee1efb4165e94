"""The thread that owns the engine, and how requests from asyncio reach it and come back.

All of the engine happens in one thread: it obeys commands from a queue, steps while there is
work and sleeps while there is none. What a step brought goes to the event loop as immutable
`Update`s, so nobody reads what the engine is writing.
"""

import asyncio
import collections
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from baichuan_jax.inference.engine import Engine
from baichuan_jax.inference.protocol import ApiError
from baichuan_jax.inference.request import Output, Request

_RETRY_AFTER_S = 2  # a slot is free again long before most answers have ended
_JOIN_S = 60  # a step may be compiling


@dataclasses.dataclass(frozen=True)
class Update:
    """What is new of one request since its last update; see `Output` for the fields."""

    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    text: str
    finish_reason: str | None
    cached_tokens: int
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.tokens or self.text or self.prompt_logprobs or self.finish_reason)


class Ticket:
    """Requests that were submitted together: iterate over it for (index, Update) pairs.

    The iteration ends when every request has finished, and raises an `ApiError` when the engine
    or the server ends before them.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = list(requests)
        self.unfinished = set(range(len(self.requests)))  # kept by the event loop
        self.submitted_at = time.monotonic()
        self.first_at: dict[int, float] = {}  # kept by the metrics
        self.later_tokens: collections.Counter[int] = collections.Counter()
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events: asyncio.Queue[tuple[int, Update] | ApiError] = asyncio.Queue()
        self._to_come = len(self.requests)

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> tuple[int, Update]:
        if not self._to_come:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        self._to_come -= event[1].finish_reason is not None
        return event

    def put(self, event: tuple[int, Update] | ApiError) -> None:
        self._events.put_nowait(event)


@dataclasses.dataclass
class _Sent:
    """How much of an output has been passed on. Belongs to the engine's thread."""

    ticket: Ticket
    index: int
    tokens: int = 0
    text: int = 0
    prompt: int = 0


class Worker:
    """Runs an engine for an asyncio server.

    Attributes:
      failure: why the engine has ended; None while it has not.
      closing: no request is taken any more.
      unfinished: requests that are queued or running.
    """

    def __init__(
        self,
        engine: Engine,
        max_queue: int,
        on_update: Callable[[Ticket, int, Update], None] = lambda ticket, index, update: None,
    ):
        """Starts nothing yet.

        Args:
          max_queue: requests that may wait for a slot.
          on_update: sees all updates, in the event loop.
        """
        self.failure: str | None = None
        self.closing = False
        self.unfinished = 0
        self.capacity = engine.num_slots + max_queue
        self._engine = engine
        self._on_update = on_update
        self._commands: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._sent: dict[Output, _Sent] = {}
        self._tickets: set[Ticket] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; call it in the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """Queues requests; `cancel` the ticket when nobody waits for it any more.

        Raises:
          ApiError: 400, the engine refuses a request or there are more than it can ever queue;
            429, the queue is full; 503, the engine has failed or the server shuts down.
        """
        self.check()
        if len(requests) > self.capacity:
            message = f"{len(requests)} completions were asked; there may be {self.capacity}."
            raise ApiError(400, message, code="invalid_value")
        if self.unfinished + len(requests) > self.capacity:
            message = f"The queue is full: {self.unfinished} requests are waiting or running."
            headers = {"Retry-After": str(_RETRY_AFTER_S)}
            raise ApiError(429, message, code="queue_full", headers=headers)
        ticket = Ticket(requests)
        self._tickets.add(ticket)
        self.unfinished += len(requests)
        self._commands.put(("submit", ticket))
        try:
            await ticket.accepted
        except BaseException:  # a cancelled task, too, takes its requests along
            self.cancel(ticket)
            raise
        return ticket

    def check(self) -> None:
        """Raises an `ApiError` of status 503 if no request can be served."""
        if self.failure is not None:
            message = f"The engine has failed: {self.failure}"
            raise ApiError(503, message, code="engine_failed")
        if self.closing:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")

    def cancel(self, ticket: Ticket) -> None:
        """Frees what the ticket still holds; does nothing for one that has finished."""
        if ticket.unfinished:
            self._commands.put(("cancel", ticket))

    def begin_shutdown(self, grace: float) -> None:
        """Refuses new requests, and ends after `grace` seconds those that still run."""
        self.closing = True
        self._loop.call_later(grace, self._end_all)

    def close(self) -> None:
        """Ends the thread."""
        self.closing = True
        self._commands.put(("stop", None))
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _end_all(self) -> None:
        for ticket in list(self._tickets):
            ticket.put(ApiError(503, "The server is shutting down.", code="shutting_down"))
            self.cancel(ticket)

    # In the engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.busy:
                    self._tell(self._engine.step())
        except Exception as error:
            logging.exception("The engine has failed.")
            self.failure = f"{type(error).__name__}: {error}"
            self._call(self._fail)

    def _obey(self) -> bool:
        """Carries out the commands that came, or waits for one; whether to go on."""
        wait = not self._engine.busy
        while True:
            try:
                name, ticket = self._commands.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if name == "stop":
                return False
            if name == "submit":
                self._submit(ticket)
            else:
                self._cancel(ticket)

    def _submit(self, ticket: Ticket) -> None:
        try:
            for index, request in enumerate(ticket.requests):
                self._sent[self._engine.submit(request)] = _Sent(ticket, index)
        except ValueError as error:
            self._cancel(ticket)
            self._call(self._refuse, ticket, ApiError(400, str(error), code="invalid_value"))
        except Exception:
            logging.exception("The engine could not take a request.")
            self._cancel(ticket)
            message = "The server could not take the request; its log says why."
            self._call(self._refuse, ticket, ApiError(500, message, code="internal_error"))
        else:
            self._call(self._accept, ticket)

    def _cancel(self, ticket: Ticket) -> None:
        outputs = [output for output, sent in self._sent.items() if sent.ticket is ticket]
        for output in outputs:
            self._engine.cancel(output)
        self._tell(outputs)

    def _tell(self, outputs: Sequence[Output]) -> None:
        news = [self._news(output) for output in outputs if output in self._sent]
        if news := [item for item in news if not item[-1].is_empty]:
            self._call(self._deliver, news)

    def _news(self, output: Output) -> tuple[Ticket, int, Update]:
        sent = self._sent[output]
        update = Update(
            tokens=output.tokens[sent.tokens :],
            logprobs=output.logprobs[sent.tokens :],
            top=output.top[sent.tokens :],
            text=output.text[sent.text :],
            finish_reason=output.finish_reason,
            cached_tokens=output.cached_tokens,
            prompt_logprobs=output.prompt_logprobs[sent.prompt :],
            prompt_top=output.prompt_top[sent.prompt :],
        )
        sent.tokens += len(update.tokens)
        sent.text += len(update.text)
        sent.prompt += len(update.prompt_logprobs)
        if output.finish_reason is not None:
            del self._sent[output]
        return sent.ticket, sent.index, update

    def _call(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logging.debug("An update came after the server's end.")

    # In the event loop.

    def _deliver(self, news: list[tuple[Ticket, int, Update]]) -> None:
        for ticket, index, update in news:
            if index not in ticket.unfinished:
                continue
            ticket.put((index, update))
            self._on_update(ticket, index, update)
            if update.finish_reason is not None:
                ticket.unfinished.discard(index)
                self.unfinished -= 1
                if not ticket.unfinished:
                    self._tickets.discard(ticket)

    def _accept(self, ticket: Ticket) -> None:
        if not ticket.accepted.done():
            ticket.accepted.set_result(None)

    def _refuse(self, ticket: Ticket, error: ApiError) -> None:
        self.unfinished -= len(ticket.unfinished)
        ticket.unfinished.clear()
        self._tickets.discard(ticket)
        if not ticket.accepted.done():
            ticket.accepted.set_exception(error)

    def _fail(self) -> None:
        for ticket in list(self._tickets):
            error = ApiError(503, f"The engine has failed: {self.failure}", code="engine_failed")
            ticket.put(error)
            self._refuse(ticket, error)
