"""A sweep: which cells there are, which are left, and each of those to its decision on a machine of its class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from peftopt import store
from peftopt.decision.duration import Duration, Span
from peftopt.errors import BadInput, PeftoptError
from peftopt.metrics import format_value
from peftopt.recipe import grid as grids
from peftopt.recipe.grid import Cell, Grid
from peftopt.report import swept
from peftopt.report.swept import CellResult
from peftopt.runner import build, cells, duration, judged, objects, remote
from peftopt.runner.cells import Attempt, Job
from peftopt.runner.executors import Executor
from peftopt.runner.run import Listener


def read_grid(path: Path) -> Grid:
    """A grid from its file, with the recipe that it names. Raises BadRecipe with all its mistakes, BadInput for a group
    of variants that is not a recipe."""
    text = store.read_text(path)
    grid = grids.parse(
        text, str(path.resolve()), lambda name: judged.read_recipe(Path(name)), lambda name: Path(name).is_dir()
    )
    for group, cell in {cell.group: cell for cell in grids.cells(grid)}.items():
        judged.recipe_of(cell.recipe, f"{grid.path}, its variants {group}")
    return grid


def here(grid: Grid, machine: str, classes: Sequence[str]) -> str:
    """The class of this machine: the one that is named, or the only one. Raises BadInput where that is not known."""
    if machine and machine not in classes:
        raise BadInput(f"{grid.path} has no class of machines named {machine!r}", f"known: {', '.join(classes)}")
    if not machine and len(classes) > 1:
        hint = f"say which class this machine is: --machine {classes[0]}, or give --on ray or --on slurm"
        raise BadInput(f"{grid.path} has {len(classes)} classes of machines, and a cell runs on its own alone", hint)
    return machine or classes[0]


def disk(grid: Grid) -> str:
    """How much all artifacts take at most, in words: of each the size of its base."""
    sizes = {name: store.size(Path(served.base)) for name, served in grid.models.items()}
    counts = grids.builds(grid)
    whole = sum(sizes[name] * number for name, number in counts.items())
    return f"at most {sum(counts.values())} artifacts, {format_value('size', whole)}" if whole else "nothing is built"


def forecasts(
    grid: Grid, standing: Sequence[CellResult], machine: str, results: Path, listener: Listener
) -> dict[str, Span]:
    """Seconds that each cell takes that is left for this machine, of the class `machine`; by the cell's name. Of each
    group of variants the first layers of one cell's model are timed. Another model takes longer by as much as its
    weights are larger. A group without a forecast is told, and left out."""
    sizes = {name: store.size(Path(served.base)) for name, served in grid.models.items()}
    still = [result.cell for result in swept.left(standing) if result.cell.machine.name == machine]
    seconds: dict[str, Span] = {}
    for group in dict.fromkeys(cell.group for cell in still):
        alike = [cell for cell in still if cell.group == group]
        for cell in {cell.model: cell for cell in reversed(alike)}.values():
            takes = _foreseen(cell, results, listener)
            if takes.parts:
                seconds |= {each.name: takes.whole * (sizes[each.model] / sizes[cell.model]) for each in alike}
                break
        else:
            listener.tell(f"no forecast of cells of the variants {group}: {takes.unknown}")
    return seconds


def _foreseen(cell: Cell, results: Path, listener: Listener) -> Duration:
    """How long a cell takes on this machine. What is wrong with its files is said by its own run."""
    home = store.Store(results.resolve(), listener.warn)
    try:
        with build.bars(listener.progress) as hear:
            return duration.foreseen(judged.recipe_of(cell.recipe, cell.name), home, hear)[1]
    except (PeftoptError, OSError) as error:
        return Duration(unknown=str(error))


def lengths(grid: Grid, listed: Sequence[Cell]) -> dict[str, float]:
    """How long each cell takes beside the others of its class, by the cell's name: the bytes of its model's weights,
    times the variants that race. Good for an order, and for nothing else."""
    sizes = {name: store.size(Path(served.base)) for name, served in grid.models.items()}
    arms = {group: len({*names, grid.recipe.recipe.baseline}) for group, names in grid.groups.items()}
    return {cell.name: float(sizes[cell.model] * arms[cell.group]) for cell in listed}


def ordered(todo: Sequence[Cell], machines: Mapping[str, int], takes: Mapping[str, float]) -> list[Cell]:
    """The cells in the order in which they are submitted. Machines of a class end at about the same time if the longest
    cells begin first; a class with one machine keeps the order of the list. A cluster may refuse all but the first so
    many, so each class has among them a share that fits its number of `machines`. `takes`: how long cells take, in any
    unit, by their names."""
    by_class: dict[str, list[Cell]] = defaultdict(list)
    for cell in todo:
        by_class[cell.machine.name].append(cell)
    rounds = []
    for name, cells_ in by_class.items():
        number = max(machines.get(name, 0), 1)
        if number > 1:
            cells_.sort(key=lambda cell: takes.get(cell.name, 0.0), reverse=True)
        rounds += [(place / number, cell) for place, cell in enumerate(cells_)]
    return [cell for _, cell in sorted(rounds, key=lambda each: each[0])]


def sweep(
    standing: Sequence[CellResult],
    results: Path,
    name: str,
    executor: Executor,
    listener: Listener,
    artifacts: str = "",
    more: bool = False,
    takes: Mapping[str, float] | None = None,
) -> None:
    """Have every cell measured that is left and has a machine. A cell that fails is told, and the others go on.
    `standing`: where the cells stand. `artifacts`: where machines share them, see `remote.opened`. With `more`, cells
    whose decision is open get more blocks. `takes`: see `ordered`."""
    warn = listener.warn
    store.Store(results.resolve(), warn).check_writable()
    if artifacts:
        remote.opened(artifacts, warn, listener.tell)
    home = cells.folder_of(results, name)
    submitted = {each.cell.name for each in standing if executor.found(home / each.cell.name)}
    undecided = {each.cell.name for each in swept.undecided(standing)} if more else set()
    left = {each.cell.name for each in swept.left(standing)} | undecided
    by_name = {each.cell.name: each for each in standing}
    shared = objects.absolute(artifacts)
    jobs = [
        cells.job(by_name[cell.name], results, name, shared, cell.name in undecided)
        for cell in _todo([each.cell for each in standing], submitted, left, executor, takes or {})
        if cell.name in submitted or not _judged(by_name[cell.name], results, warn)
    ]
    for job in jobs:
        executor.submit(job)
    with listener.progress("sweep", len(jobs), "cells") as show:
        for done in range(1, len(jobs) + 1):
            job, attempt = executor.wait()
            _tell(job, attempt, cells.stand_of(by_name[job.name].cell, job), listener)
            show(done, job.name)


def _todo(
    listed: Sequence[Cell],
    submitted: Collection[str],
    left: Collection[str],
    executor: Executor,
    takes: Mapping[str, float],
) -> list[Cell]:
    """The cells to submit, in their order: those that an earlier sweep submitted, and those that are left and have a
    machine."""
    classes = {cell.machine.name: cell.machine for cell in listed}
    machines = {name: executor.machines(needs) for name, needs in classes.items()}
    todo = [cell for cell in listed if cell.name in submitted or (cell.name in left and machines[cell.machine.name])]
    return ordered(todo, machines, takes)


def _judged(stands: CellResult, results: Path, warn: Callable[[str], None]) -> bool:
    """Whether a cell's run has measured everything and was stopped before its decision, which is then made here."""
    run = results.resolve() / "runs" / stands.run
    if not stands.run or not store.is_finished(run) or cells.decision_of(run):
        return False
    try:
        judged.judge(run, warn)
    except BadInput as error:
        warn(f"{run.name} cannot be judged, and is measured again: {error.message}")
        return False
    return True


def _tell(job: Job, attempt: Attempt, result: CellResult, listener: Listener) -> None:
    """Say how a cell ended."""
    if result.state == "decided":
        ships = f", ships {result.chosen.name}" if result.chosen else ""
        listener.done("cell", f"{job.name}: {result.outcome}{ships}", attempt.seconds, f"on {attempt.host}")
        return
    why = result.why or attempt.message or f"exit code {attempt.exit_code}"
    listener.warn(f"{job.name}: {result.state}: {why}")
    if hint := result.hint or attempt.hint:
        listener.tell(hint)
