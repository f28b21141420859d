"""GuideLLM's benchmarks.json, one run for each rate of a sweep.

Source: src/guidellm/benchmark/schemas and src/guidellm/schemas of GuideLLM, report formats 1 and 2 (0.8.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peftopt.loadtest.importers import GAPS, SCHEDULED, About, Found, from_zero
from peftopt.loadtest.moments import utc
from peftopt.loadtest.summary import Request
from peftopt.records import Json

NAME, VERSIONS = "GuideLLM", "report formats 1 and 2"

OTHER_CLOCK_S = 86_400.0
"""A request that would have waited longer than this was due on another clock: 0.8.1's workers that begin before the
start is set count from 0."""

EPOCH_S = 1e9
"""No run began before 2001: a smaller number counts from something else than 1970."""

_ALL = ("successful", "errored", "incomplete")


def recognises(data: Json) -> bool:
    """Whether it has `benchmarks`, and beside them the report's `args` or `metadata`."""
    return (
        isinstance(data, Mapping)
        and isinstance(data.get("benchmarks"), list)
        and ("args" in data or "metadata" in data)
    )


def read(data: Json, about: About) -> list[Found]:
    """A run for each benchmark. Raises ValueError for a report format other than 1 and 2."""
    version = (data.get("metadata") or {}).get("version")
    if version not in (1, 2):
        raise ValueError(f"report format {version}, not 1 or 2")
    return [_run(run, str(data["metadata"].get("guidellm_version", "?"))) for run in data["benchmarks"]]


def _run(run: Mapping[str, Json], version: str) -> Found:
    rows = [(status, row) for status in _ALL for row in run["requests"].get(status) or []]
    never = [row for _, row in rows if _sent(row["info"]["timings"]) is None]
    rows = [(status, row) for status, row in rows if _sent(row["info"]["timings"]) is not None]
    requests = [_request(row, status) for status, row in rows]
    targeted = rows and all(_due(row["info"]["timings"]) for _, row in rows)
    totals = (run.get("metrics") or {}).get("request_totals") or {}
    total = sum(totals.get(status) or 0 for status in _ALL)
    lacks = [GAPS, *([] if targeted else [SCHEDULED])]
    if total > len(rows) + len(never):
        lacks.append(f"requests: {len(rows)} of {total} were kept, so counts and rates are of a sample")
    if never:
        lacks.append(f"{len(never)} requests that were cancelled before they were sent: they are left out")
    strategy = (run.get("config") or {}).get("strategy") or {}
    rate = f" {strategy['rate']}/s" if strategy.get("rate") else ""
    title = f"{strategy.get('type_', 'run')}{rate}, {len(rows)} requests"
    return Found(title, f"{NAME} {version}", tuple(lacks), from_zero(requests), started=_began(run, requests))


def _began(run: Mapping[str, Json], requests: Sequence[Request]) -> str:
    """When the run began, by the clock of its requests where they are seconds since 1970."""
    moments = [run.get("start_time") or 0.0, *(r.sent for r in requests)]
    return next((utc(t) for t in moments if t > EPOCH_S), "")


def _request(row: Mapping[str, Json], status: str) -> Request:
    info, times = row["info"], row["info"]["timings"]
    sent = float(_sent(times) or 0.0)
    done = times.get("request_end") or times.get("resolve_end") or sent
    error = {"errored": info.get("error") or "errored", "incomplete": "incomplete"}.get(status, "")
    return Request(
        id=str(row["request_id"]),
        model="",
        scheduled=_due(times) or sent,
        sent=sent,
        done=done,
        first=_after(sent, times.get("first_token_iteration", times.get("first_iteration"))),
        last=_after(sent, times.get("last_token_iteration", times.get("last_iteration"))),
        prompt_tokens=row.get("prompt_tokens"),
        new_tokens=row.get("output_tokens") or 0,
        error=str(error).strip().splitlines()[-1] if error else "",
    )


def _sent(times: Mapping[str, Json]) -> float | None:
    """When a request was sent; None for one that never was."""
    return times.get("request_start") or times.get("resolve_start")


def _after(sent: float, token: float | None) -> float | None:
    """A token's time; None for one before its request was sent, which is none."""
    return token if token is not None and token >= sent else None


def _due(times: Mapping[str, Json]) -> float | None:
    """When a request was due; None where that is not told on the clock of the others."""
    due = times.get("targeted_start")
    return due if due and abs((_sent(times) or 0.0) - due) < OTHER_CLOCK_S else None
