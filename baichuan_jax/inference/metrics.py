"""What /metrics tells Prometheus about a server."""

import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baichuan_jax.inference.engine import Engine
from baichuan_jax.inference.worker import Ticket, Update

_PATHS = {
    *("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"),
    *("/tokenize", "/detokenize", "/tokenizer_info"),
}
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, engine: Engine):
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._requests = prometheus_client.Counter(
            "baichuan_jax_requests",
            "HTTP answers by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self._first = prometheus_client.Histogram(
            "baichuan_jax_time_to_first_token_seconds",
            "From the queue to the first token.",
            buckets=_FIRST_TOKEN_S,
            registry=self._registry,
        )
        self._next = prometheus_client.Histogram(
            "baichuan_jax_time_per_output_token_seconds",
            "Between the first and the last tokens of a request, per token.",
            buckets=_NEXT_TOKEN_S,
            registry=self._registry,
        )

    def count(self, path: str, status: int) -> None:
        """Counts an answer; paths that are not the server's count as one."""
        self._requests.labels(path if path in _PATHS else "other", str(status)).inc()

    def observe(self, ticket: Ticket, index: int, update: Update) -> None:
        """Sees an update of a request."""
        now = time.monotonic()
        if update.tokens and index not in ticket.first_at:
            ticket.first_at[index] = now
            self._first.observe(now - ticket.submitted_at)
        else:
            ticket.later_tokens[index] += len(update.tokens)
        if update.finish_reason and (later := ticket.later_tokens[index]):
            self._next.observe((now - ticket.first_at[index]) / later)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        yield GaugeMetricFamily(
            "baichuan_jax_queue_length", "Requests without a slot.", engine.waiting
        )
        yield GaugeMetricFamily("baichuan_jax_active_slots", "Slots in use.", engine.active)
        yield GaugeMetricFamily("baichuan_jax_slots", "Slots in all.", engine.num_slots)
        for name, text in (
            ("prompt_tokens", "Tokens of prompts, cached ones included."),
            ("cached_tokens", "Tokens of prompts that were found in the cache."),
            ("generated_tokens", "Tokens that were generated."),
        ):
            yield CounterMetricFamily(f"baichuan_jax_{name}", text, getattr(engine.stats, name))
