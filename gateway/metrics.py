"""Metrics in Prometheus' format, under the names that dashboards and routers of the field read."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.mixes import SEVERAL

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from gateway.placement import Fleet

_LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_ANSWER_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_MAX_SHOWN_ADAPTERS = 256  # in one label, and with series of their own
_OTHER, _BASE = "(other)", "(base)"  # no adapter can be called so


class Metrics:
    """The gateway's own counters and histograms, and the workers' numbers as they were last heard."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # twice the series, and nobody asks when a counter was made
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        first = histogram("vllm:time_to_first_token_seconds", "From the request to its first token.", _LATENCY_S)
        between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", _LATENCY_S)
        self._observe_first: Callable[[float], None] = first.observe
        self._observe_between: Callable[[float], None] = between.observe
        self._answer = histogram("vllm:e2e_request_latency_seconds", "From the request to its end.", _ANSWER_S)
        self._prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generated = histogram("vllm:request_generation_tokens", "Answer tokens of a request.", _TOKENS)
        self._http: dict[tuple[str, int], Counter] = {}  # found faster here than by labels
        self._success = counter("vllm:request_success", "Sequences that ended of themselves.", "finished_reason")
        self._errors = counter("polylora_stream_errors", "Sequences that failed, by the worker's code.", "code")
        self._sequences = counter("polylora_adapter_sequences", "Sequences answered under an adapter.", "adapter")
        self._tokens = counter("polylora_adapter_tokens", "Tokens of those, prompts and answers.", "adapter", "kind")
        self._wait = Summary(
            "polylora_adapter_wait_seconds",
            "From a request to its first token; (base) is the base model.",
            ("adapter",),
            registry=self.registry,
        )
        self._shown: set[str] = set()  # adapters with series of their own; the others share one
        self._requests = counter("polylora_http_requests", "Answered HTTP requests.", "route", "code")
        self.disconnects = counter("polylora_client_disconnects", "Clients that went before their answer was complete.")
        self.inflight = Gauge("polylora_inflight", "HTTP requests being answered.", registry=self.registry)

    def watch(self, fleet: "Fleet") -> None:
        """Shows the workers' numbers too."""
        self.registry.register(_WorkerCollector(fleet))

    def on_token(self, seconds: float, *, first: bool) -> None:
        """A token came, so long after the one before it or, the first, after the request."""
        (self._observe_first if first else self._observe_between)(seconds)

    def on_finish(self, reason: str) -> None:
        """A sequence ended of itself."""
        self._success.labels(reason).inc()

    def on_error(self, code: str) -> None:
        """A sequence failed."""
        self._errors.labels(code).inc()

    def on_answer(self, seconds: float, num_prompt: int, num_generated: int) -> None:
        """A request was answered in full."""
        self._answer.observe(seconds)
        self._prompt.observe(num_prompt)
        self._generated.observe(num_generated)

    def on_adapter(self, name: str, num_prompt: int, num_generated: int) -> None:
        """A sequence under an adapter was answered in full."""
        name = self._label(name)
        self._sequences.labels(name).inc()
        self._tokens.labels(name, "prompt").inc(num_prompt)
        self._tokens.labels(name, "generated").inc(num_generated)

    def on_wait(self, adapter: str | None, seconds: float) -> None:
        """A sequence's first token came, so long after its request."""
        self._wait.labels(_BASE if adapter is None else self._label(adapter)).observe(seconds)

    def _label(self, adapter: str) -> str:
        """An adapter's name, or what stands for all that came after so many."""
        if len(self._shown) < _MAX_SHOWN_ADAPTERS:
            self._shown.add(adapter)
        return adapter if adapter in self._shown or adapter == SEVERAL else _OTHER

    def on_http(self, route: str, status: int) -> None:
        """An HTTP request ended."""
        if (found := self._http.get((route, status))) is None:
            found = self._http[route, status] = self._requests.labels(route, str(status))
        found.inc()

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)


class _WorkerCollector(Collector):
    """Reads the fleet at each scrape."""

    def __init__(self, fleet: "Fleet") -> None:
        self._fleet = fleet

    def describe(self) -> "list[Metric]":
        return []  # nothing is known before the first worker answers

    def collect(self) -> "Iterator[Metric]":
        up = GaugeMetricFamily("polylora_worker_up", "1 if the worker may be given work.", labels=["worker"])
        resets = CounterMetricFamily("polylora_sessions", "Sessions opened with the worker.", labels=["worker"])
        free = GaugeMetricFamily("polylora_credits", "Sequences that may still be started.", labels=["worker"])
        for i, worker in enumerate(self._fleet.workers):
            up.add_metric([str(i)], float(worker.ready))
            resets.add_metric([str(i)], worker.num_sessions)
            session = worker.session
            free.add_metric([str(i)], session.max_streams - session.num_reserved if session else 0)
        yield from (up, resets, free)
        yield from self._engine()

    def _engine(self) -> "Iterator[Metric]":
        model = self._fleet.model
        found = [worker.status for worker in self._fleet.ready() if worker.status is not None]
        if model is None or not found:
            return
        name = model.names[0]

        def family(
            kind: type[GaugeMetricFamily] | type[CounterMetricFamily], metric: str, text: str, value: float
        ) -> "Metric":
            result = kind(metric, text, labels=["model_name"])
            result.add_metric([name], value)
            return result

        def total(field: str) -> int:
            return sum(getattr(status, field) for status in found)

        blocks = total("kv_blocks_total")
        used = (blocks - total("kv_blocks_free")) / blocks if blocks else 0.0
        yield family(GaugeMetricFamily, "vllm:num_requests_running", "Sequences running.", total("num_running"))
        yield family(GaugeMetricFamily, "vllm:num_requests_waiting", "Sequences waiting.", total("num_waiting"))
        yield family(
            GaugeMetricFamily,
            "vllm:kv_cache_usage_perc",
            "Share of KV's memory used by sequences and their adapters.",
            used,
        )
        for metric, field, text in [
            ("vllm:prompt_tokens", "prompt_tokens_total", "Prompt tokens computed."),
            ("vllm:generation_tokens", "generation_tokens_total", "Tokens generated."),
            ("vllm:num_preemptions", "preemptions_total", "Sequences taken off for want of blocks."),
            ("vllm:prefix_cache_queries", "prefix_cache_queries_total", "Prompt tokens looked up."),
            ("vllm:prefix_cache_hits", "prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
            ("polylora_adapter_loads", "adapter_loads_total", "Adapters loaded."),
            ("polylora_adapter_uploads", "adapter_uploads_total", "Adapters copied to the device."),
        ]:
            yield family(CounterMetricFamily, metric, text, total(field))
        age = max(status.step_age_ms for status in found) / 1000
        yield family(GaugeMetricFamily, "polylora_step_age_seconds", "Age of the oldest running step.", age)
        cache = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache's shape.", labels=["block_size", "num_gpu_blocks"]
        )
        cache.add_metric([str(found[0].block_size), str(blocks)], 1)
        yield cache
        yield self._adapters()

    def _adapters(self) -> "Metric":
        """Exactly one series: a router takes the newest by value, and each set of labels would stay as a series."""
        found = [worker.status for worker in self._fleet.ready() if worker.status is not None]
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use; the value is the time.", labels=labels)
        running = sorted({name for status in found for name in status.running_adapters})[:_MAX_SHOWN_ADAPTERS]
        waiting = sorted({name for status in found for name in status.waiting_adapters})[:_MAX_SHOWN_ADAPTERS]
        most = max(status.max_loras_per_batch for status in found)
        info.add_metric([str(most), ",".join(running), ",".join(waiting)], time.time())
        return info
