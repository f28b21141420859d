"""What vLLM's own metrics say of a span. Pure.

Names as in vLLM 0.32, vllm/v1/metrics/loggers.py. It tells nothing by adapter: all of a server's requests are one
model's.
"""

from __future__ import annotations

from collections.abc import Mapping

from peftopt.watch.promise import Promise
from peftopt.watch.sources.alike import alike
from peftopt.watch.sources.scrape import Growth, Scrape
from peftopt.watch.spans import Engine, Time, Traffic

TIMES: Mapping[Time, str] = {
    "latency": "vllm:e2e_request_latency_seconds",
    "ttft": "vllm:time_to_first_token_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",
}
"""`vllm:inter_token_latency_seconds` counts gaps, not requests: its P95 is another."""

PROMPT_TOKENS, NEW_TOKENS = "vllm:request_prompt_tokens", "vllm:request_generation_tokens"
WORKED, GENERATED = "vllm:request_inference_time_seconds_sum", "vllm:generation_tokens_total"
ENDED, REJECTED = "vllm:request_success_total", "vllm:admission_rejections_total"
RUNNING, WAITING, KV_USAGE = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
HISTOGRAMS = (*TIMES.values(), PROMPT_TOKENS, NEW_TOKENS)

NAMES = (
    *(f"{name}{ending}" for name in HISTOGRAMS for ending in ("_bucket", "_count", "_sum")),
    *(WORKED, GENERATED, ENDED, REJECTED, RUNNING, WAITING, KV_USAGE),
)
"""The samples that are read."""

THEIRS, FAILED = "abort", "error"
"""Reasons to end that are no answer: the client has gone, or the engine has failed."""


def is_there(look: Scrape) -> bool:
    """Whether vLLM's metrics are among them."""
    return RUNNING in look.by_name


def traffic(grown: Growth, before: Scrape, after: Scrape, promise: Promise) -> dict[str, Traffic]:
    """What the users of each served model saw, from vLLM on: the times of those that went away are among them."""
    running = [look.total(RUNNING) for look in (before, after)]
    busy = grown.total(WORKED) / (after.at - before.at)
    models = dict.fromkeys(
        name for metric in (ENDED, REJECTED) for name, n in grown.by(metric, "model_name").items() if n
    )
    return {name: _of_model(grown, name, [*running, busy], promise) for name in models}


def _of_model(grown: Growth, model: str, running: list[float | None], promise: Promise) -> Traffic:
    times = {time: grown.buckets(name, model_name=model) for time, name in TIMES.items()}
    ended = {reason: round(n) for reason, n in grown.by(ENDED, "finished_reason", model_name=model).items()}
    failed = ended.get(FAILED, 0)
    lengths, n = (grown.total(f"{PROMPT_TOKENS}{ending}", model_name=model) for ending in ("_sum", "_count"))
    return Traffic(
        answered=sum(n for reason, n in ended.items() if reason not in (THEIRS, FAILED)),
        times=times,
        alike=alike(times, running, lengths / n if n else None, promise),
        errors={"upstream": failed} if failed else {},
        refused=round(grown.total(REJECTED, model_name=model)),
        prompt_tokens=grown.buckets(PROMPT_TOKENS, model_name=model),
        new_tokens=grown.buckets(NEW_TOKENS, model_name=model),
        tokens=round(grown.total(f"{NEW_TOKENS}_sum", model_name=model)),
        engine_s=grown.total(WORKED, model_name=model),
    )


def engine(look: Scrape) -> Engine:
    """The engine at the end of a span; of several servers the sum of their requests, and the highest share."""
    return Engine(running=look.total(RUNNING), waiting=look.total(WAITING), kv_usage=look.highest(KV_USAGE))
