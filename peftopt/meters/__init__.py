"""Other people's meters, one file each: their result files -> the records of `peftopt load`. Pure.

A meter's file has a one-line docstring, `NAME`, `VERSIONS` (the format versions it was checked against), and

    def recognises(data: Json) -> bool                    data is a parsed JSON file, or the list of its lines
    def read(data: Json, about: About) -> list[Found]     raises ValueError, KeyError or TypeError for a broken file

What a meter does not tell is no number here: it is said in `lacks`.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from peftopt import goodput, jsonl
from peftopt.errors import BadInput
from peftopt.goodput import Request
from peftopt.records import Json, Measurement

SCHEDULED = "scheduled times: latency counts from when a request was sent, so a late sender hides a slow server"
GAPS = "gaps between tokens: no ITL"
RAW = "raw samples: its figures have no intervals, so nothing can be decided on them"


@dataclass(frozen=True)
class About:
    """What is known of a result file beside what it holds: its `name`, and the `task` that the user says it is of."""

    name: str = ""
    task: str = ""


@dataclass(frozen=True)
class Found:
    """One run of another meter. `requests` where it kept them, else what it `reported`; `probe` is "load" or "task";
    `started` is when it began, as peftopt.moments writes it, "" where the file does not tell."""

    title: str
    source: str
    lacks: tuple[str, ...]
    requests: tuple[Request, ...] = ()
    reported: Mapping[str, Json] = field(default_factory=dict)
    probe: str = "load"
    values: Mapping[str, Json] = field(default_factory=dict)
    started: str = ""

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
            values |= {"requests": [r.as_json() for r in self.requests], "reported": dict(self.reported)}
        return Measurement(self.probe, variant, workload if self.probe == "load" else "", values=values, at=at)


def modules() -> list[ModuleType]:
    """Every meter that can be read."""
    return [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]


def read(path: Path, task: str = "") -> list[Found]:
    """The runs in a result file, whichever meter wrote it; `task` as in About. Raises BadInput for a file that none can
    read."""
    known = modules()
    try:
        data = _parsed(jsonl.text_of(path.read_bytes()))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text: {error}", "save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is neither JSON nor JSON lines: {error}", "give a meter's own result file") from error
    meter = next((m for m in known if m.recognises(data)), None)
    if meter is None:  # of JSON lines, a single one
        data = [data]
        meter = next((m for m in known if m.recognises(data)), None)
    if meter is None:
        hint = f"known: {'; '.join(f'{m.NAME} ({m.VERSIONS})' for m in known)}"
        raise BadInput(f"{path} is no result of a meter that can be read", hint)
    try:
        found: list[Found] = meter.read(data, About(path.name, task))
    except jsonl.BROKEN as error:
        hint = f"format versions that can be read: {meter.VERSIONS}"
        raise BadInput(f"{path} looks like {meter.NAME}, but is not whole: {error!r}", hint) from error
    if not found:
        raise BadInput(f"{path} ({meter.NAME}) holds no runs", "measure something first")
    return found


def _parsed(text: str) -> Json:
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for _, line in jsonl.lines(text)]


def from_zero(requests: Sequence[Request]) -> tuple[Request, ...]:
    """Times moved so that the first request was scheduled at 0."""
    start = min((r.scheduled for r in requests), default=0.0)

    def moved(t: float | None) -> float | None:
        return None if t is None else t - start

    return tuple(
        Request(
            **{
                **{f: getattr(r, f) for f in r.__dataclass_fields__},
                **{f: moved(getattr(r, f)) for f in ("scheduled", "sent", "done", "first", "last")},
            }
        )
        for r in requests
    )


def as_loaded(found: Found) -> dict[str, Json]:
    """What `render.load` shows of a run, in the shape of `load.as_json`."""
    empty: dict[str, Json] = {"trials": [], "highest_rate": None, "engine": {}}
    requests = found.requests
    return {
        "figures": goodput.figures(requests),
        "by_model": goodput.by_model(requests),
        "own_delay": goodput.own_delay(requests),
        **empty,
    }
