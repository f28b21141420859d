"""The log of `peftopt serve`: a JSON line a request.

Each version of an adapter is a run of its own, under the arm that it answered in. Cut into windows, it is a run for
each window in which every arm of the adapter answered: they shared the engine there, so they are a pair.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from peftopt.loadtest.arrivals import SERVE_CHECK, SERVE_LOG
from peftopt.loadtest.importers import GAPS, About, Found, from_zero
from peftopt.loadtest.moments import utc
from peftopt.loadtest.summary import Request
from peftopt.measurements import SERVED
from peftopt.records import Json

Row = Mapping[str, Json]
"""A line of the log."""

Which = tuple[str, str, str]
"""Adapter, version and arm."""

NAME, VERSIONS = SERVED, "format 1"

THEIRS = ("cancelled", "request")
"""Kinds of errors that are the client's: it went away, or asked for what cannot be."""


def recognises(data: Json) -> bool:
    """Whether every line says that it is one of serve's, and one of a request is among them."""
    if not isinstance(data, list) or not all(isinstance(row, Mapping) for row in data):
        return False
    kinds = {str(row.get("kind")) for row in data}
    return SERVE_LOG in kinds and kinds <= {SERVE_LOG, SERVE_CHECK}


def read(data: Json, about: About) -> list[Found]:
    """A run for each version of each adapter that answered. Raises ValueError for lines of another format.
    Checks of adapters are passed over."""
    asked = [row for row in data if row["kind"] == SERVE_LOG]
    if wrong := {row["format"] for row in asked} - {1}:
        raise ValueError(f"format {sorted(wrong)[0]}, not 1")
    runs: dict[Which, list[Row]] = defaultdict(list)
    for row in asked:
        runs[row["adapter"], row["version"], row["arm"]].append(row)
    # what was turned away before it had a version counts against the version that was live
    versions = {(adapter, arm): version for adapter, version, arm in runs if version}
    for adapter, version, arm in list(runs):
        at = (adapter, versions.get((adapter, "live"), ""), "live")
        if adapter and not arm and at in runs:
            runs[at] += runs.pop((adapter, version, arm))
    known = {which: sorted(rows, key=lambda r: r["timestamp"]) for which, rows in runs.items() if which[0]}
    if about.window_s <= 0:
        return [_run(which, rows, utc(rows[0]["timestamp"] / 1e3)) for which, rows in known.items()]
    return [
        found for adapter in dict.fromkeys(which[0] for which in known) for found in _windows(adapter, known, about)
    ]


def _windows(adapter: str, known: Mapping[Which, Sequence[Row]], about: About) -> list[Found]:
    """A run for each arm of an adapter and each window in which all of its arms answered."""
    span_ms = 1e3 * about.window_s
    arms = {which: rows for which, rows in known.items() if which[0] == adapter}
    windows: dict[int, dict[Which, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for which, rows in arms.items():
        for row in rows:
            windows[int(row["timestamp"] // span_ms)][which].append(row)
    shared = {n: parts for n, parts in sorted(windows.items()) if len(parts) == len(arms)}
    if not shared:
        raise ValueError(f"no window of {about.window_s:g} s in which every version of {adapter} answered")
    lost = len(windows) - len(shared)
    lacks = (f"all arms in {lost} of {len(windows)} windows: those are left out",) if lost else ()
    return [
        _run(which, rows, utc(number * about.window_s), lacks)
        for number, parts in shared.items()
        for which, rows in parts.items()
    ]


def _run(which: Which, rows: Sequence[Row], started: str, also: Sequence[str] = ()) -> Found:
    adapter, version, arm = which
    ours = [row for row in rows if row["error_kind"] not in THEIRS]
    lacks = [GAPS, *also]
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
        values={"version": version, "arm": arm},
        started=started,
        names=tuple(name for name in (version, f"{adapter}/{arm}", arm, adapter) if name),
    )


def _request(row: Row) -> Request:
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
        kind=str(row["error_kind"]) if error else None,
    )
