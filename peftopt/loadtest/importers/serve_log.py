"""The log of `peftopt serve`: a JSON line a request.

Each version of an adapter is a run of its own, under the arm that it answered in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from peftopt.loadtest.arrivals import SERVE_LOG
from peftopt.loadtest.importers import GAPS, About, Found, from_zero
from peftopt.loadtest.moments import utc
from peftopt.loadtest.summary import Request
from peftopt.records import Json

NAME, VERSIONS = "peftopt serve", "format 1"

THEIRS = ("cancelled", "request")
"""Kinds of errors that are the client's: it went away, or asked for what cannot be."""


def recognises(data: Json) -> bool:
    """Whether every line says that it is one of serve's."""
    return (
        isinstance(data, list)
        and bool(data)
        and all(isinstance(r, Mapping) and r.get("kind") == SERVE_LOG for r in data)
    )


def read(data: Json, about: About) -> list[Found]:
    """A run for each version of each adapter that answered. Raises ValueError for lines of another format."""
    if wrong := {row["format"] for row in data} - {1}:
        raise ValueError(f"format {sorted(wrong)[0]}, not 1")
    runs: dict[tuple[str, str, str], list[Mapping[str, Json]]] = defaultdict(list)
    for row in data:
        runs[row["adapter"], row["version"], row["arm"]].append(row)
    # what was turned away before it had a version counts against the version that was live
    versions = {(adapter, arm): version for adapter, version, arm in runs if version}
    for adapter, version, arm in list(runs):
        at = (adapter, versions.get((adapter, "live"), ""), "live")
        if adapter and not arm and at in runs:
            runs[at] += runs.pop((adapter, version, arm))
    return [_run(*which, sorted(rows, key=lambda r: r["timestamp"])) for which, rows in runs.items() if which[0]]


def _run(adapter: str, version: str, arm: str, rows: Sequence[Mapping[str, Json]]) -> Found:
    ours = [row for row in rows if row["error_kind"] not in THEIRS]
    lacks = [GAPS]
    if theirs := len(rows) - len(ours):
        lacks.append(f"{theirs} of {len(rows)} requests, which their clients gave up or asked wrongly: left out")
    guessed = sum(row["sources"].get("new_tokens") == "derived" for row in ours)
    if guessed:
        lacks.append(f"the engine's count of tokens for {guessed} requests: each message was taken for a token")
    return Found(
        title=" ".join(part for part in (adapter, version, arm) if part),
        source=NAME,
        lacks=tuple(lacks),
        requests=from_zero([_request(row) for row in ours]),
        started=utc(rows[0]["timestamp"] / 1e3),
    )


def _request(row: Mapping[str, Json]) -> Request:
    arrived = row["timestamp"] / 1e3
    error = str(row["error"] or "")
    first = None if error or row["ttft_ms"] is None else arrived + row["ttft_ms"] / 1e3
    last = first
    if first is not None and row["tpot_ms"] is not None:
        last = first + row["tpot_ms"] * (row["new_tokens"] - 1) / 1e3
    done = arrived + row["request_duration_ms"] / 1e3
    return Request(
        id=str(row["request_id"]),
        model=str(row["adapter"]),
        scheduled=arrived,
        sent=arrived + row["queue_gateway_ms"] / 1e3,
        done=max(done, last or done),
        first=first,
        last=last,
        prompt_tokens=row["prompt_tokens"],
        new_tokens=row["new_tokens"],
        error=error,
    )
