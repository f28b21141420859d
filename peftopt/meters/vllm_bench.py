"""`vllm bench serve --save-result`, best with --save-detailed; several runs where --append-result was given.

The format has no version of its own. Source: vllm/benchmarks/serve.py and lib/endpoint_request_func.py of 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping

from peftopt.goodput import Request
from peftopt.meters import RAW, SCHEDULED, About, Found, from_zero
from peftopt.records import Json

NAME, VERSIONS = "vllm bench serve", "vLLM 0.9 to 0.32"

_KEYS = {"duration", "completed", "request_throughput", "output_throughput", "model_id"}


def recognises(data: Json) -> bool:
    runs = data if isinstance(data, list) else [data]
    return bool(runs) and all(isinstance(run, Mapping) and run.keys() >= _KEYS for run in runs)


def read(data: Json, about: About) -> list[Found]:
    return [_run(run) for run in (data if isinstance(data, list) else [data])]


def _run(run: Mapping[str, Json]) -> Found:
    title = f"{run['model_id']} at {run.get('request_rate', '?')}/s, {run.get('num_prompts', '?')} prompts"
    lacks = [] if run.get("queue_times") and run.get("max_concurrency") else [SCHEDULED]
    if "failed" not in run and not any(run.get("errors", [])):
        lacks.append("failures: this version counts only the completed")
    if "ttfts" not in run:
        return Found(title, NAME, (*lacks, f"{RAW} (give it --save-detailed)"), reported=_reported(run))
    return Found(title, NAME, tuple(lacks), from_zero(_requests(run)), _reported(run))


def _requests(run: Mapping[str, Json]) -> list[Request]:
    n = len(run["ttfts"])
    starts = run.get("start_times") or [0.0] * n
    waits = run.get("queue_times") or [0.0] * n
    found = []
    for i in range(n):
        gaps, error = run["itls"][i], str(run["errors"][i] or "").strip()
        sent, ttft = starts[i], run["ttfts"][i]
        first = sent + ttft if ttft > 0 and not error else None
        last = None if first is None else first + sum(gaps)
        whole = (run.get("latencies") or [0.0] * n)[i]
        found.append(
            Request(
                id=str(i),
                model=str(run["model_id"]),
                scheduled=sent - waits[i],
                sent=sent,
                done=max(sent + whole, last or sent),
                first=first,
                last=last,
                gaps_ms=tuple(1e3 * gap for gap in gaps),
                prompt_tokens=run["input_lens"][i],
                new_tokens=run["output_lens"][i],
                error=error.splitlines()[-1] if error else "",
            )
        )
    return found


def _reported(run: Mapping[str, Json]) -> dict[str, Json]:
    """Its own figures, by its own names."""
    kept = ("completed", "failed", "duration", "max_concurrency", "request_rate", "burstiness")
    ends = ("_throughput", "_goodput", "_ms")
    return {key: value for key, value in run.items() if key in kept or key.endswith(ends)}
