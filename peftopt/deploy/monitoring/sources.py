"""What the gateway's metrics and vLLM's own are called, and which bounds their buckets have. Pure."""

from __future__ import annotations

import bisect
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from peftopt.watch.promise import Bound
from peftopt.watch.sources import gateway, vllm
from peftopt.watch.spans import Time

Metrics = Literal["gateway", "vllm"]

WORDS: Mapping[Time, str] = {
    "latency": "from arrival to the last byte",
    "ttft": "from arrival to the first token",
    "tpot": "between tokens, on average of a request",
}

REQUEST_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TIME_TO_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
INTER_TOKEN_LATENCY = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
"""Bounds of vLLM's buckets in seconds, where nothing else is configured. Source: vLLM 0.32.0, v1/metrics/buckets.py."""


@dataclass(frozen=True)
class Source:
    """Where metrics come from. `by`: the label that tells whom users asked; `times`: a histogram each, in seconds;
    `bounds`: of their buckets, where not every limit is one. `requests`: a counter of all, `errors`: a counter with the
    label `kind` that says why; `kinds`: those that are errors, with the shares allowed where a run tells none."""

    name: Metrics
    by: str
    times: Mapping[Time, str]
    requests: str
    errors: str
    kind: str
    kinds: Mapping[str, float]
    bounds: Mapping[Time, tuple[float, ...]] = field(default_factory=dict)

    def end(self, bound: Bound) -> float | None:
        """The bucket's bound that a limit is counted at, in seconds: the limit itself or the next above it, so that
        fewer misses are counted and never more; None above all bounds."""
        ends = self.bounds.get(bound.time)
        if ends is None:
            return bound.bound_s
        at = bisect.bisect_left(ends, bound.bound_s)
        return ends[at] if at < len(ends) else None

    def over(self, bound: Bound, window: str, chosen: str = "", by: str = "") -> str:
        """PromQL: the share of requests that took longer than a limit, of those with the labels `chosen`."""
        name, end = self.times[bound.time], self.end(bound)
        assert end is not None
        within = f"{name}_bucket{{{joined(chosen, f'le={quoted(le(end))}')}}}"
        every = f"{name}_count{{{chosen}}}" if chosen else f"{name}_count"
        group = f"sum by ({by or self.by}) " if by != "none" else "sum "
        return f"1 - {group}(rate({within}[{window}]))\n  / {group}(rate({every}[{window}]))"


DEFAULT_SHARE = 0.01
"""Of the requests that may fail in one way, where the run says nothing about it."""
KINDS = ("oom", "timeout_connect", "timeout_first", "timeout_gap", "timeout", "engine_dead", "upstream", "gateway")

GATEWAY = Source(
    name="gateway",
    by="adapter",
    times=gateway.TIMES,
    requests="peftopt_requests_total",
    errors="peftopt_errors_total",
    kind="kind",
    kinds={kind: DEFAULT_SHARE for kind in KINDS},
)
VLLM = Source(
    name="vllm",
    by="model_name",
    times=vllm.TIMES,
    requests="vllm:request_success_total",
    errors="vllm:request_success_total",
    kind="finished_reason",
    kinds={"error": DEFAULT_SHARE},
    bounds={"latency": REQUEST_LATENCY, "ttft": TIME_TO_FIRST_TOKEN, "tpot": INTER_TOKEN_LATENCY},
)
SOURCES: Mapping[Metrics, Source] = {"gateway": GATEWAY, "vllm": VLLM}


def le(end: float) -> str:
    """The label of a bucket, as prometheus_client writes it and as Prometheus 3 does: 1 is "1.0". A test compares it
    with prometheus_client's own. For bounds below a million seconds."""
    return repr(float(end))


def quoted(text: str) -> str:
    """A string of PromQL."""
    return json.dumps(text, ensure_ascii=False)


def one_of(values: Collection[str]) -> str:
    """A regular expression of PromQL (RE2) that is one of the values, quoted."""
    return quoted("|".join("".join(c if c.isalnum() or c == "_" else f"\\{c}" for c in value) for value in values))


def joined(*matchers: str) -> str:
    """Those matchers of labels that are not empty."""
    return ",".join(matcher for matcher in matchers if matcher)


def percent(share: float) -> str:
    """A share for a person: "7.5 %"."""
    return f"{100 * share:.3g} %"
