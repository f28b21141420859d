"""The cells of a sweep on disk: their recipes, how the commands that measured them ended, and where they stand.

A cell's run is found by its recipe's name, which no other cell has. So the state of a sweep is what its runs left, and
nothing else keeps it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from peftopt import store
from peftopt.errors import ACCEPTED, BAD_INPUT, BROKEN, BUG, ENVIRONMENT, BadInput
from peftopt.measurements import structured
from peftopt.recipe.grid import Cell, MachineClass
from peftopt.records import Decision
from peftopt.redaction import redacted
from peftopt.report.as_json import decision_from_json
from peftopt.report.swept import CellResult

ATTEMPTS, LOG = "attempts.jsonl", "log.txt"
FAILURES = (BAD_INPUT, ENVIRONMENT, BUG)
"""Exit codes of a run that left no decision."""


@dataclass(frozen=True)
class Job:
    """A command of peftopt's that measures a cell: `arguments` after the program's name; what a machine `needs` to run
    it; the cell's `folder`, and the `results` that its run belongs to. `more`: it adds blocks to a run that is not
    decided. `run`: the name of the run that spoke for the cell when the job was planned, "" for none."""

    name: str
    arguments: tuple[str, ...]
    needs: MachineClass
    folder: Path
    results: Path
    more: bool = False
    run: str = ""


@dataclass(frozen=True)
class Attempt:
    """How one command of a cell ended: when it `began`, on which `host`, its exit code, and what it said of an
    error."""

    began: str
    seconds: float
    exit_code: int
    host: str
    message: str = ""
    hint: str = ""


def folder_of(results: Path, sweep: str) -> Path:
    """Where the cells of a sweep lie."""
    return results.resolve() / "sweeps" / sweep


def job(stands: CellResult, results: Path, sweep: str, artifacts: str = "", more: bool = False) -> Job:
    """The job that measures a cell, or adds `more` blocks to it; its recipe is written where it is not there yet.
    `artifacts`: the URL where machines share them, as any machine may use it."""
    cell = stands.cell
    folder = folder_of(results, sweep) / cell.name
    recipe = folder / f"{cell.name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    if not recipe.exists() or recipe.read_text(encoding="utf-8") != cell.recipe:
        store.write(recipe, cell.recipe)
    shared = ("--artifacts", artifacts) if artifacts else ()
    added = ("--more",) if more else ()
    arguments = ("run", str(recipe), "--results", str(results.resolve()), *shared, *added, "--json")
    return Job(cell.name, arguments, cell.machine, folder, results.resolve(), more, stands.run)


def keep(folder: Path, attempt: Attempt) -> None:
    """Add an attempt to those of a cell."""
    store.add_lines(folder / ATTEMPTS, redacted(json.dumps(asdict(attempt))) + "\n")


def attempts(folder: Path) -> list[Attempt]:
    """How the commands of a cell ended, in order. A line that is not whole is left out."""
    file = folder / ATTEMPTS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    kept = []
    for line in lines:
        try:
            kept.append(structured(Attempt, json.loads(line), ATTEMPTS))
        except (BadInput, *BROKEN):
            continue
    return kept


def now() -> str:
    """The time as attempts have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- where cells stand -------------------------------------------------------------------------

_TIME, _KEY = len("20261129T120000-"), len("-01234567")
"""What stands before and after a recipe's name in the name of a run's folder: see recipe_run.prepare."""


def runs(results: Path) -> Mapping[str, Sequence[Path]]:
    """The runs of a results folder by the name of their recipe, oldest first. It lists all runs, so it is called for
    all cells together."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    home = results / "runs"
    for folder in sorted(home.iterdir()) if home.is_dir() else ():
        by_name[folder.name[_TIME:-_KEY]].append(folder)
    return by_name


def runs_of(job: Job) -> list[Path]:
    """The runs of a job's cell as they are now, oldest first: the one that was known when it was planned, and all that
    any process has begun or continued since. No other cell's runs are listed."""
    names = {*store.noted(job.results, job.name), *filter(None, [job.run])}
    return [run for name in sorted(names) if (run := job.results / "runs" / name).is_dir()]


def stand(cells: Sequence[Cell], results: Path, sweep: str) -> list[CellResult]:
    """Where each cell stands, by what is on disk. Nothing is written."""
    by_name = runs(results.resolve())
    home = folder_of(results, sweep)
    return [_stands(cell, by_name.get(cell.name, ()), home / cell.name) for cell in cells]


def stand_of(cell: Cell, job: Job) -> CellResult:
    """Where the cell of a job stands now."""
    return _stands(cell, runs_of(job), job.folder)


def newest(folders: Sequence[Path]) -> Path | None:
    """The run that speaks for a cell: the newest that has measured everything, else the newest; None without one."""
    finished = [folder for folder in folders if store.is_finished(folder)]
    return [*folders, *finished][-1] if folders else None


def is_decided(job: Job) -> bool:
    """Whether a cell has a decision that judged something, and that the job is not to go on with."""
    run = newest(runs_of(job))
    decision = decision_of(run) if run else None
    open_ = ("not judged", "inconclusive") if job.more else ("not judged",)
    return decision is not None and decision.outcome not in open_


def decision_of(run: Path) -> Decision | None:
    """What a run has decided; None for one that has not measured everything, or whose decision is not there or not
    whole."""
    if not store.is_finished(run) or not (run / "decision.json").exists():
        return None
    try:
        return decision_from_json(store.read_text(run / "decision.json"))
    except BadInput:
        return None


def _stands(cell: Cell, folders: Sequence[Path], home: Path) -> CellResult:
    run = newest(folders)
    tried = attempts(home)
    seconds = sum(attempt.seconds for attempt in tried)
    last = tried[-1] if tried else Attempt("", 0.0, ACCEPTED, "")
    told = CellResult(cell, "waiting", run=run.name if run else "", seconds=seconds, host=last.host)
    decision = decision_of(run) if run else None
    if decision and decision.outcome == "not judged":
        return told.failed(ENVIRONMENT, decision.sentence, decision.next_step, decision)
    if decision:
        return told.decided(decision)
    if owner := store.owner(home) or (store.owner(run) if run else ""):
        return told.standing("running", owner)
    if last.exit_code in FAILURES:
        return told.failed(last.exit_code, last.message, last.hint)
    return told.standing("unfinished" if run else "waiting")
