"""What Prometheus reads of a server; names are those of vLLM's metrics behind `grok1_`."""

import collections
import time
from collections.abc import Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from grok1.server.core import Server
from grok1.server.handle import Handle
from grok1.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Answers(Collector):
    """Counts the answers of HTTP by path and status, those that the server refused included."""

    def __init__(self, paths: Iterable[str]):
        """Takes the paths that there are, in Starlette's spelling; others are one together."""
        self._paths = {path: path.partition("{")[0] for path in paths}
        self._counts: collections.Counter[tuple[str, int]] = collections.Counter()

    def count(self, path: str, status: int) -> None:
        """Counts an answer to a request for a path."""
        known = path if path in self._paths else "other"
        for pattern, begin in self._paths.items():
            if pattern != begin and path.startswith(begin):
                known = pattern
        self._counts[known, status] += 1

    def collect(self) -> Iterator[Metric]:
        """Yields what was counted."""
        answers = CounterMetricFamily(
            "grok1_http_requests", "Requests answered", labels=["handler", "status"]
        )
        for (path, status), count in list(self._counts.items()):
            answers.add_metric([path, str(status)], count)
        yield answers


class Metrics:
    """Counts what a server does, from when it is made."""

    def __init__(self, server: Server, name: str, answers: Answers):
        """Counts from now on.

        Args:
          server: What does it.
          name: The model's in the protocol.
          answers: Counts what HTTP answers.
        """
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"grok1_{name}", words, buckets=buckets, registry=registry)

        self._prompt = Counter(
            "grok1_prompt_tokens", "Tokens of prompts that were run or found", registry=registry
        )
        self._new = Counter(
            "grok1_generation_tokens", "Tokens that were generated", registry=registry
        )
        self._ended = Counter(
            "grok1_request_success",
            "Requests that are over",
            ["finished_reason"],
            registry=registry,
        )
        self._first = histogram(
            "time_to_first_token_seconds", "From submission to the first token", _LONG
        )
        self._between = histogram(
            "inter_token_latency_seconds", "Mean time between a request's tokens", _SHORT
        )
        self._whole = histogram("e2e_request_latency_seconds", "From submission to the end", _LONG)
        self._queue = histogram("request_queue_time_seconds", "Until there was a slot", _LONG)
        self._prefill = histogram("request_prefill_time_seconds", "From slot to prompt", _LONG)
        self._decode = histogram("request_decode_time_seconds", "From first to last token", _LONG)
        self._turn_tokens = histogram(
            "iteration_tokens_total",
            "Tokens of a turn, drawn and of prompts",
            (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
        )
        self._turn = Histogram(
            "grok1_step_seconds",
            "Time of a turn, by whether it ran a part of a prompt",
            ["kind"],
            buckets=_SHORT,
            registry=registry,
        )
        self._last = Gauge(
            "grok1_last_step_timestamp_seconds", "When the last turn ended", registry=registry
        )
        registry.register(_Load(server, name))
        registry.register(answers)
        ProcessCollector(registry=registry)
        server.on_finish.append(self._finished)
        server.on_turn.append(self._turned)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _finished(self, handle: Handle) -> None:
        times, request = handle.times, handle.request
        reason = handle.builder.stop_reason or "length"
        if handle.error is not None:
            reason = {"CancelledError": "abort", "SlowReaderError": "abort"}.get(
                type(handle.error).__name__, "error"
            )
        self._ended.labels(reason).inc()
        self._whole.observe(times.last - times.submitted)
        if times.admitted:
            self._queue.observe(max(0.0, times.admitted - times.submitted))
        if times.admitted and times.prefilled:
            self._prompt.inc(len(request.tokens))
            self._prefill.observe(times.prefilled - times.admitted)
        if times.first:
            count = handle.builder.num_tokens
            self._first.observe(times.first - times.submitted)
            self._decode.observe(times.last - times.first)
            if count > 1:
                self._between.observe((times.last - times.first) / (count - 1))

    def _turned(self, seconds: float, num_drawn: int, num_of_prompts: int) -> None:
        if not num_drawn and not num_of_prompts:
            return
        self._new.inc(num_drawn)
        self._turn.labels("prefill" if num_of_prompts else "decode").observe(seconds)
        self._turn_tokens.observe(num_drawn + num_of_prompts)
        self._last.set(time.time())


class _Load(Collector):
    """What a server has to do when it is asked."""

    def __init__(self, server: Server, name: str):
        self._server, self._name = server, name

    def collect(self) -> Iterator[Metric]:
        load = self._server.load()
        info = GaugeMetricFamily("grok1_info", "What answers", labels=["version", "model_name"])
        info.add_metric([__version__, self._name], 1)
        yield info
        is_ready = load.state == "ready" and not self._server.is_stuck
        yield GaugeMetricFamily("grok1_ready", "Whether /health says 200: 1 or 0", int(is_ready))
        for name, words, value in (
            ("num_requests_running", "Requests that have a slot", load.num_running),
            ("num_requests_waiting", "Requests that wait for a slot", load.num_waiting),
            ("num_slots", "Slots", load.num_slots),
            ("kv_cache_usage_perc", "Share of positions that are spoken for, 0 to 1", load.filled),
        ):
            yield GaugeMetricFamily(f"grok1_{name}", words, value)
        for name, words, value in (
            ("prefix_cache_queries", "Tokens of prompts looked up", load.prefix_asked),
            ("prefix_cache_hits", "Tokens of prompts found", load.prefix_found),
        ):
            yield CounterMetricFamily(f"grok1_{name}", words, value)
        found = CounterMetricFamily(
            "grok1_prefix_cache_tier_hits", "Tokens of prompts found, by where", labels=["tier"]
        )
        blocks = GaugeMetricFamily(
            "grok1_prefix_cache_blocks", "Blocks of prompts that are kept", labels=["tier"]
        )
        tokens = GaugeMetricFamily(
            "grok1_prefix_cache_tokens", "Tokens of prompts that are kept", labels=["tier"]
        )
        room = GaugeMetricFamily(
            "grok1_prefix_cache_max_tokens", "Tokens that can be kept at most", labels=["tier"]
        )
        for name, tier in load.prefix_tiers.items():
            found.add_metric([name], tier.num_found)
            blocks.add_metric([name], tier.num_kept)
            tokens.add_metric([name], tier.num_kept * load.prefix_block)
            room.add_metric([name], tier.num_blocks * load.prefix_block)
        yield from (found, blocks, tokens, room)
