"""The gateway's Prometheus metrics: seconds and bytes, by adapter, version and arm.

Every limit of the decision is a bound of a bucket, so the share of requests within it is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftopt.gateway.lines import Line

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
OVERHEAD = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
WHICH = ("adapter", "version", "arm")
BY_WORKER = ("peftopt_running", "peftopt_waiting", "peftopt_batch_fill_ratio")
"""Gauges that each worker has of its own, where there are several."""


class Metrics:
    """One registry for each process. `limits_s`: limits of the decision in seconds, each the bound of a bucket."""

    def __init__(self, limits_s: Iterable[float] = ()) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._by_name: dict[str, Counter | Gauge | Histogram] = {}
        self._kept: set[tuple[str, str]] | None = None
        coarse = sorted({*BOUNDS, *limits_s})
        fine = sorted({*FINE, *limits_s})

        def histogram(name: str, help_: str, labels: Iterable[str], bounds: Iterable[float]) -> Histogram:
            made = Histogram(name, help_, list(labels), buckets=tuple(bounds), registry=self.registry)
            self._by_name[name] = made
            return made

        def counter(name: str, help_: str, labels: Iterable[str]) -> Counter:
            made = self._by_name[name] = Counter(name, help_, list(labels), registry=self.registry)
            return made

        def gauge(name: str, help_: str, labels: Iterable[str] = ()) -> Gauge:
            made = self._by_name[name] = Gauge(name, help_, list(labels), registry=self.registry)
            return made

        self.duration = histogram("peftopt_request_duration_seconds", "From arrival to the last byte.", WHICH, coarse)
        self.queue = histogram(
            "peftopt_queue_time_seconds", "Waiting, here and at the engine.", (*WHICH, "where"), coarse
        )
        self.ttft = histogram("peftopt_ttft_seconds", "From arrival to the first token.", WHICH, coarse)
        self.tpot = histogram("peftopt_tpot_seconds", "Mean gap between tokens after the first.", WHICH, fine)
        self.generation = histogram("peftopt_generation_latency_seconds", "What the engine took.", WHICH, coarse)
        self.overhead = histogram(
            "peftopt_gateway_overhead_seconds", "From arrival to sent, less the wait.", (), OVERHEAD
        )
        self.requests = counter("peftopt_requests", "Requests by HTTP status.", (*WHICH, "code"))
        self.tokens = counter("peftopt_tokens", "Tokens of prompts and answers.", (*WHICH, "kind"))
        self.refused = counter("peftopt_refused", "Requests refused, by reason.", ("adapter", "reason"))
        self.cancelled = counter("peftopt_cancelled", "Requests given up, by whom.", ("adapter", "by"))
        self.errors = counter("peftopt_errors", "Requests that failed, by kind.", (*WHICH, "kind"))
        self.log_lost = counter("peftopt_log_lost", "Lines of the log that could not be written.", ())
        self.restarts = counter("peftopt_engine_restarts", "Times that the engine was started again.", ())
        self.worker_restarts = counter("peftopt_worker_restarts", "Times that a worker was started again.", ())
        self.running = gauge("peftopt_running", "Requests at the engine.")
        self.waiting = gauge("peftopt_waiting", "Requests that wait here.")
        self.limit = gauge("peftopt_limit", "Limits in force; 0 is none.", ("what",))
        self.fill = gauge("peftopt_batch_fill_ratio", "Requests at the engine as a share of what may run.")
        self.kv_usage = gauge("peftopt_kv_cache_usage_ratio", "Share of an engine's KV cache in use.", ("engine",))
        of = ("engine", "source")
        self.gpu_allocated = gauge("peftopt_gpu_memory_allocated_bytes", "Memory that an engine's tensors have.", of)
        self.gpu_reserved = gauge("peftopt_gpu_memory_reserved_bytes", "Memory that an engine holds.", of)
        self.gpu_fragmentation = gauge(
            "peftopt_gpu_memory_fragmentation_ratio", "Share of the reserved memory that no tensor has.", of
        )
        self.gpu_utilization = gauge("peftopt_gpu_utilization_ratio", "Share of time that the GPU was busy.", of)
        self.ready = gauge("peftopt_ready", "1 when every adapter has answered as itself.")
        self.adapter_info = gauge(
            "peftopt_adapter_info", "Versions that are loaded.", ("adapter", "version", "state", "rank", "base")
        )
        self.arm_weight = gauge("peftopt_arm_weight", "Share of users that an arm answers.", ("adapter", "arm"))
        self.switch = histogram("peftopt_adapter_switch_seconds", "Loading an adapter.", ("adapter",), coarse)
        self.loading = gauge("peftopt_model_loading_seconds", "Starting the engine.")
        self.shadow = counter(
            "peftopt_shadow_requests",
            "Users' requests that both versions were asked again, and those dropped for want of room.",
            ("adapter", "what"),
        )
        self.canary = counter(
            "peftopt_canary_answers", "Answers that were checked, by verdict.", ("adapter", "version", "verdict")
        )

    def count(self, line: Line) -> None:
        """Count a finished request."""
        which = (line.adapter, line.version, line.arm)
        self.requests.labels(*which, str(line.status)).inc()
        if line.kind == "refused":
            return
        if line.kind:
            self.errors.labels(*which, line.kind).inc()
        self.queue.labels(*which, "gateway").observe(line.queue_gateway_ms / 1e3)
        if line.queue_engine_ms is not None:
            self.queue.labels(*which, "engine").observe(line.queue_engine_ms / 1e3)
        if line.sent is not None:
            self.overhead.observe(max(0.0, line.sent - line.arrived - (line.waited or 0.0)))
        if line.prompt_tokens:
            self.tokens.labels(*which, "prompt").inc(line.prompt_tokens)
        if line.new_tokens:
            self.tokens.labels(*which, "new").inc(line.new_tokens)
        if line.kind:
            return
        self.duration.labels(*which).observe(line.request_duration_ms / 1e3)
        for histogram, value in (
            (self.ttft, line.ttft_ms),
            (self.tpot, line.tpot_ms),
            (self.generation, line.generation_latency_ms),
        ):
            if value is not None:
                histogram.labels(*which).observe(value / 1e3)

    def keep(self, versions: Collection[tuple[str, str]]) -> None:
        """Drop the series of adapters and versions that are not among these (adapter, version): else a gateway whose
        adapters change would have ever more of them. The version "" of a kept adapter stays: requests that no version
        answered."""
        self._kept = {*versions, ("", "")}
        gone: set[tuple[str, str, str]] = set()
        for family in self.registry.collect():
            for sample in family.samples:
                if not self.keeps(sample.labels):
                    gone.add((family.name, sample.labels["adapter"], sample.labels.get("version", "")))
        for name, adapter, version in gone:
            labels = {"adapter": adapter, "version": version} if version else {"adapter": adapter}
            self._by_name[name].remove_by_labels(labels)

    def keeps(self, labels: Mapping[str, str]) -> bool:
        """Whether a series is of a kept adapter and version, or of none."""
        adapter, version = labels.get("adapter", ""), labels.get("version", "")
        if self._kept is None or (adapter, version) in self._kept:
            return True
        return not version and any(adapter == name for name, _ in self._kept)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
