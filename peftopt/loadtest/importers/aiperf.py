"""AIPerf's profile_export.jsonl (each request), or its summary profile_export_aiperf.json.

Source: docs/tutorials/working-with-profile-exports.md and src/aiperf/common/models of AIPerf; summary schema 1.x.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from peftopt.loadtest.importers import GAPS, RAW, SCHEDULED, About, Found, from_zero
from peftopt.loadtest.moments import local, utc
from peftopt.loadtest.summary import Request
from peftopt.records import Json

NAME, VERSIONS = "AIPerf", "records of AIPerf 0.5 to 0.13, summary schema 1.x"

_MS = {"ms": 1.0, "sec": 1e3, "s": 1e3, "us": 1e-3, "ns": 1e-6}


def recognises(data: Json) -> bool:
    """Whether it is AIPerf's summary (a mapping) or its records (a list)."""
    if isinstance(data, Mapping):
        return "aiperf_version" in data or {"request_latency", "input_config"} <= data.keys()
    return bool(data) and all(isinstance(r, Mapping) and r.keys() >= {"metadata", "metrics"} for r in data)


def read(data: Json, about: About) -> list[Found]:
    """The one run that it holds. Raises ValueError for a summary schema other than 1.x."""
    return [_summary(data)] if isinstance(data, Mapping) else [_records(data)]


def _summary(data: Mapping[str, Json]) -> Found:
    version = str(data.get("schema_version") or "1.0")
    if version.split(".")[0] != "1":
        raise ValueError(f"summary schema {version}, not 1.x")
    reported = {
        f"{name}_{stat}": number
        for name, metric in data.items()
        if isinstance(metric, Mapping) and "unit" in metric
        for stat, number in metric.items()
        if isinstance(number, int | float)
    }
    source = f"{NAME} {data.get('aiperf_version', '?')}"
    lacks = (f"{RAW} (give profile_export.jsonl instead)",)
    return Found("summary", source, lacks, reported=reported, started=_began(data.get("start_time")))


def _began(text: Json) -> str:
    """When a run began, of ISO 8601; without a zone it stays without."""
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return ""
    return utc(moment.timestamp()) if moment.tzinfo else local(moment)


def _records(rows: list[Mapping[str, Json]]) -> Found:
    # nanoseconds since 1970 do not fit a float
    start = min(row["metadata"]["request_start_ns"] for row in rows)
    requests = [_request(n, row, start) for n, row in enumerate(rows)]
    issued = all(row["metadata"].get("credit_issued_ns") for row in rows)
    lacks = [*([] if issued else [SCHEDULED]), *([] if any(r.gaps_ms for r in requests) else [GAPS])]
    return Found(
        f"{len(requests)} requests", NAME, tuple(lacks), from_zero(requests), started=utc(start / 1e9) if start else ""
    )


def _request(number: int, row: Mapping[str, Json], start: int) -> Request:
    about, metrics, error = row["metadata"], row["metrics"] or {}, row.get("error")
    sent, done = ((about[key] - start) / 1e9 for key in ("request_start_ns", "request_end_ns"))
    ttft, between = _milliseconds(metrics, "time_to_first_token"), _milliseconds(metrics, "inter_token_latency")
    tokens = int(_value(metrics, "output_sequence_length") or _value(metrics, "output_token_count") or 0)
    first = None if ttft is None else sent + ttft / 1e3
    last = None if first is None or between is None else first + between * max(tokens - 1, 0) / 1e3
    chunks = metrics.get("inter_chunk_latency") or {"value": [], "unit": "ms"}
    failed = f"{error.get('code', '')} {error.get('type', '')}: {error.get('message', '')}".strip() if error else ""
    if not failed and about.get("was_cancelled"):
        failed = "cancelled"
    return Request(
        id=str(about.get("x_request_id") or number),
        model="",
        scheduled=((about.get("credit_issued_ns") or about["request_start_ns"]) - start) / 1e9,
        sent=sent,
        done=done,
        first=first,
        last=last,
        gaps_ms=tuple(gap * _MS[chunks["unit"]] for gap in chunks["value"]),
        prompt_tokens=_value(metrics, "input_sequence_length"),
        new_tokens=tokens,
        error=failed,
        warmup=about.get("benchmark_phase") == "warmup",
    )


def _value(metrics: Mapping[str, Json], name: str) -> Json:
    return (metrics.get(name) or {}).get("value")


def _milliseconds(metrics: Mapping[str, Json], name: str) -> float | None:
    if (value := _value(metrics, name)) is None:
        return None
    return float(value) * _MS[metrics[name]["unit"]]
