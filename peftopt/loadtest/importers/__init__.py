"""Importers of other tools' results, one file each: their result files -> the records of `peftopt load`. Pure.

An importer has a one-line docstring, `NAME`, `VERSIONS` (the format versions it was checked against), and

    def recognises(data: Json) -> bool                    data is a parsed JSON file, or the list of its lines
    def read(data: Json, about: About) -> list[Found]     raises ValueError, KeyError or TypeError for a broken file

What a tool does not tell has no value here: it is said in `lacks`.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

from peftopt import corpus
from peftopt.errors import BROKEN, BadInput
from peftopt.loadtest import summary
from peftopt.loadtest.summary import LoadSummary, Request
from peftopt.measurements import as_json
from peftopt.records import Json, Measurement

SCHEDULED = "scheduled times: latency counts from when a request was sent, so a late sender hides a slow server"
GAPS = "gaps between tokens: no ITL"
RAW = "raw samples: its metrics have no intervals, so nothing can be decided on them"


@dataclass(frozen=True)
class About:
    """What is known of a result file beside what it holds: its `name`, the `task` that the user says it is of, and
    into windows of how many seconds a log is cut (0 = it is one run)."""

    name: str = ""
    task: str = ""
    window_s: float = 0.0


@dataclass(frozen=True)
class Found:
    """One run of another tool. `requests` where it kept them, else what it `reported`; `probe` is "load" or "task";
    `started` is when it began, as peftopt.moments writes it, "" where the file does not tell. `names` are what it may
    be called by where a file holds several: of a gateway's log the version, the arm and the adapter."""

    title: str
    source: str
    lacks: tuple[str, ...]
    requests: tuple[Request, ...] = ()
    reported: Mapping[str, Json] = field(default_factory=dict)
    probe: str = "load"
    values: Mapping[str, Json] = field(default_factory=dict)
    started: str = ""
    names: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether it is a load in which nothing was answered."""
        timed = [r for r in self.requests if not r.warmup]
        if timed:
            return all(r.error for r in timed)
        return self.probe == "load" and self.reported.get("completed") == 0

    @property
    def raw(self) -> bool:
        """Whether something can be decided on it."""
        return not any(what.startswith(RAW) for what in self.lacks)

    def measurement(self, variant: str, at: str, workload: str = "") -> Measurement:
        """The record to keep."""
        values: dict[str, Json] = {"source": self.source, "title": self.title, "lacks": list(self.lacks), **self.values}
        if self.probe == "load":
            values |= {"started": self.started} if self.started else {}
            values |= {"requests": [as_json(r.record()) for r in self.requests], "reported": dict(self.reported)}
        return Measurement(self.probe, variant, workload if self.probe == "load" else "", values=values, at=at)


def modules() -> list[ModuleType]:
    """Every importer."""
    return [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]


def read(path: Path, task: str = "", window_s: float = 0.0) -> list[Found]:
    """The runs in a result file, whichever tool wrote it; `task` and `window_s` as in About. Raises BadInput for a file
    that none can read."""
    known = modules()
    try:
        data = _parsed(corpus.text_of(path.read_bytes()))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not text: {error}", "save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"{path} is neither JSON nor JSON lines: {error}", "give the result file that the tool wrote"
        ) from error
    importer = next((m for m in known if m.recognises(data)), None)
    if importer is None:  # of JSON lines, a single one
        data = [data]
        importer = next((m for m in known if m.recognises(data)), None)
    if importer is None:
        hint = f"known: {'; '.join(f'{m.NAME} ({m.VERSIONS})' for m in known)}"
        raise BadInput(f"{path} is not a result file that can be read", hint)
    try:
        results: list[Found] = [_sound(run) for run in importer.read(data, About(path.name, task, window_s))]
    except BROKEN as error:
        hint = f"format versions that can be read: {importer.VERSIONS}"
        raise BadInput(f"{path} looks like {importer.NAME}, but is not whole: {error!r}", hint) from error
    if not results:
        raise BadInput(f"{path} ({importer.NAME}) holds no runs", "give a file of a finished run")
    return results


def _parsed(text: str) -> Json:
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for _, line in corpus.lines(text)]


def _sound(result: Found) -> Found:
    """The run without answers whose times or lengths are not valid, and how many those were. A failure stays a failure,
    whatever its times. Raises ValueError where nothing is left."""
    kept = [r for r in (_failure(r) if r.error else r for r in result.requests) if r.error or _is_sound(r)]
    if not (n := len(result.requests) - len(kept)):
        return replace(result, requests=tuple(kept))
    if not kept:
        raise ValueError("no request has valid times and lengths")
    lack = f"valid times or lengths for {n} of {len(result.requests)} requests: they are set aside"
    return replace(result, requests=tuple(kept), lacks=(*result.lacks, lack))


def _is_sound(request: Request) -> bool:
    times = (request.scheduled, request.sent, request.done, *request.gaps_ms)
    tokens = [t for t in (request.first, request.last) if t is not None]
    counts = [n for n in (request.prompt_tokens, request.new_tokens) if n is not None]
    return (
        all(map(_is_number, [*times, *tokens, *counts]))
        and request.new_tokens is not None
        and min([*counts, *request.gaps_ms], default=0) >= 0
        and request.sent <= request.done
        and tokens == sorted(tokens)
        and all(request.sent <= t for t in tokens)
    )


def _failure(request: Request) -> Request:
    """A failed request with what of it is a number."""
    due = next((t for t in (request.scheduled, request.sent) if _is_number(t)), 0.0)
    sent = request.sent if _is_number(request.sent) else due
    return replace(
        request,
        scheduled=due,
        sent=sent,
        done=request.done if _is_number(request.done) else sent,
        first=request.first if _is_number(request.first) else None,
        last=request.last if _is_number(request.last) else None,
        gaps_ms=tuple(gap for gap in request.gaps_ms if _is_number(gap)),
        prompt_tokens=request.prompt_tokens if _is_number(request.prompt_tokens) else None,
        new_tokens=request.new_tokens if _is_number(request.new_tokens) else 0,
    )


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def from_zero(requests: Sequence[Request]) -> tuple[Request, ...]:
    """Times moved so that the first request was scheduled at 0."""
    start = min((r.scheduled for r in requests if _is_number(r.scheduled)), default=0.0)

    def moved(t: float | None) -> float | None:
        return None if t is None else t - start

    return tuple(
        replace(
            r,
            scheduled=r.scheduled - start,
            sent=r.sent - start,
            done=r.done - start,
            first=moved(r.first),
            last=moved(r.last),
        )
        for r in requests
    )


def as_loaded(result: Found) -> LoadSummary:
    """What `report.load` shows of a run."""
    requests = result.requests
    return LoadSummary(
        figures=summary.figures(requests),
        by_model=summary.by_model(requests),
        own_delay=summary.own_delay(requests),
        highest_rate=None,
        cliff=None,
    )
