"""`diagnose --plan` from start to end: times of the engine, the options under the plan, and plan.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from peftopt import machine, store
from peftopt.diagnose.planning import breakeven, page, plan, speed_asking, traffic, traffic_log, words
from peftopt.diagnose.planning.breakeven import Breakeven
from peftopt.diagnose.planning.plan import Evaluated
from peftopt.diagnose.planning.traffic import Traffic
from peftopt.diagnose.setting import Setting
from peftopt.errors import BROKEN, BadInput
from peftopt.measurements import as_json
from peftopt.metrics import format_value
from peftopt.records import Json
from peftopt.report.words import Section

PLAN = "plan.json"


@dataclass(frozen=True)
class Planned:
    """The result of a plan: the options, the break-evens, and all of it as JSON."""

    evaluated: Evaluated
    breakevens: tuple[Breakeven, ...]
    values: dict[str, Json]


def read(text: str, log: Path | None) -> Traffic:
    """The plan of `--plan` and `--plan-from`, with the free memory of this machine if they name none. Raises BadInput
    for an invalid plan, MissingEnvironment for a log that cannot be read."""
    planned = traffic.traffic(text, traffic_log.read(log) if log else None)
    if planned.memory_bytes:
        return planned
    free = machine.free_memory()
    note = f"memory: the {format_value('bytes', free)} that are free here; say another size with memory=24GB"
    return replace(planned, memory_bytes=free, notes=(*planned.notes, note))


def run(setting: Setting, planned: Traffic, folder: Path, tell: Callable[[str], None]) -> Planned:
    """Measure missing values, judge every option, and store it in the folder. Raises as `speed_asking.speeds`."""
    speeds = speed_asking.speeds(setting, planned, folder, tell)
    tell("simulating the options")
    evaluated = plan.evaluate(speeds, planned, plan.DRAWS)
    breakevens = breakeven.breakevens(speeds, evaluated, breakeven.DRAWS)
    values = words.as_json(evaluated, breakevens, as_json(speeds))
    write(values, folder)
    for name, text in page.pages(evaluated, breakevens).items():
        store.write(folder / name, text)
    return Planned(evaluated, breakevens, values)


def write(values: Mapping[str, Json], folder: Path) -> None:
    """Store a plan's result."""
    store.write(folder / PLAN, json.dumps(values, indent=1, allow_nan=False) + "\n")


def section(folder: Path) -> Section | None:
    """For the report of a run: the plan in its folder, None for none."""
    try:
        return page.section(json.loads(store.read_text(folder / PLAN)))
    except (BadInput, *BROKEN):
        return None
