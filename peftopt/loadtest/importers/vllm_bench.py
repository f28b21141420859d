"""`vllm bench serve --save-result`, best with --save-detailed; several runs where --append-result was given.

The format has no version of its own. Source: vllm/benchmarks/serve.py and lib/endpoint_request_func.py of 0.32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta

from peftopt.loadtest.importers import RAW, SCHEDULED, About, Found, from_zero
from peftopt.loadtest.moments import local
from peftopt.loadtest.summary import Request
from peftopt.records import Json

NAME, VERSIONS = "vllm bench serve", "vLLM 0.9 to 0.32"

_KEYS = {"duration", "completed", "request_throughput", "output_throughput", "model_id"}


def recognises(data: Json) -> bool:
    """Whether it is one result, or a list of them, with the keys that all versions write."""
    runs = data if isinstance(data, list) else [data]
    return bool(runs) and all(isinstance(run, Mapping) and run.keys() >= _KEYS for run in runs)


def read(data: Json, about: About) -> list[Found]:
    """A run for each result in the file."""
    return [_run(run) for run in (data if isinstance(data, list) else [data])]


def _run(run: Mapping[str, Json]) -> Found:
    title = f"{run['model_id']} at {run.get('request_rate', '?')}/s, {run.get('num_prompts', '?')} prompts"
    lacks = [] if run.get("queue_times") and run.get("max_concurrency") else [SCHEDULED]
    if "failed" not in run and not any(run.get("errors") or []):
        lacks.append("failures: this version counts only the completed")
    began, reported = _began(run), _reported(run)
    if "ttfts" not in run:
        return Found(title, NAME, (*lacks, f"{RAW} (give it --save-detailed)"), reported=reported, started=began)
    if not run.get("start_times"):
        lacks.append(
            "when each request was sent (vLLM before 2026): they are laid evenly over the run, so rates are its own"
        )
    return Found(title, NAME, tuple(lacks), from_zero(_requests(run)), reported, started=began)


def _began(run: Mapping[str, Json]) -> str:
    """When the run began: its `date` is the local time of its end. "" for none, or in another form."""
    try:
        ended = datetime.strptime(str(run.get("date", "")), "%Y%m%d-%H%M%S")
        return local(ended - timedelta(seconds=float(run["duration"])))
    except (ValueError, OverflowError):
        return ""


def _spread(run: Mapping[str, Json]) -> list[float]:
    """Where no request tells when it was sent: starts, evenly, such that the last is done at the end of the run."""
    took = run.get("latencies") or [
        (t or 0.0) + sum(gaps or ()) for t, gaps in zip(run["ttfts"], run["itls"], strict=True)
    ]
    last, whole = max(len(took) - 1, 1), float(run["duration"])
    if not 0 < whole < math.inf:
        raise ValueError(f"its duration is {run['duration']}, and it has no start_times")
    return [max(0.0, whole - t) * i / last for i, t in enumerate(took)]


def _requests(run: Mapping[str, Json]) -> list[Request]:
    n = len(run["ttfts"])
    starts = run.get("start_times") or _spread(run)
    waits = run.get("queue_times") or [0.0] * n
    errors = run.get("errors") or [""] * n
    if n - sum(map(bool, errors)) > run["completed"]:  # older ones do not say why
        nothing = [not (run["ttfts"][i] or run["output_lens"][i]) for i in range(n)]
        errors = [error or ("failed, without a reason" if nothing[i] else "") for i, error in enumerate(errors)]
    requests = []
    for i in range(n):
        gaps, error = run["itls"][i] or [], str(errors[i] or "").strip()
        sent, ttft = starts[i], run["ttfts"][i] or 0.0
        first = sent + ttft if ttft > 0 and not error else None
        last = None if first is None else first + sum(gaps)
        whole = (run.get("latencies") or [0.0] * n)[i]
        requests.append(
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
    return requests


def _reported(run: Mapping[str, Json]) -> dict[str, Json]:
    """Its own metrics, by its own names."""
    kept = ("completed", "failed", "duration", "max_concurrency", "request_rate", "burstiness")
    ends = ("_throughput", "_goodput", "_ms")
    return {key: value for key, value in run.items() if key in kept or key.endswith(ends)}
