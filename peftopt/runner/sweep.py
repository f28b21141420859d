"""A sweep: which cells there are, which are left, and each of those to its decision on a machine of its class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from peftopt import store
from peftopt.errors import BadInput
from peftopt.metrics import format_value
from peftopt.recipe import grid as grids
from peftopt.recipe.grid import Cell, Grid
from peftopt.report import swept
from peftopt.report.swept import CellResult
from peftopt.runner import cells, judged, objects, remote
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


def sweep(
    listed: Sequence[Cell], results: Path, name: str, executor: Executor, listener: Listener, artifacts: str = ""
) -> list[CellResult]:
    """Have every cell measured that is left and has a machine; where all of them stand then. A cell that fails is told,
    and the others go on. `artifacts`: where machines share them, see `remote.opened`."""
    warn = listener.warn
    store.Store(results.resolve(), warn).check_writable()
    if artifacts:
        remote.opened(artifacts, warn, listener.tell)
    by_name = {cell.name: cell for cell in listed}
    classes = {cell.machine.name: cell.machine for cell in listed}
    served = {each for each, needs in classes.items() if executor.machines(needs)}
    standing = cells.stand(listed, results, name)
    home = cells.folder_of(results, name)
    submitted = {each.cell.name for each in standing if executor.found(home / each.cell.name)}
    left = {each.cell.name for each in swept.left(standing) if each.cell.machine.name in served}
    todo = [cell for cell in listed if cell.name in left | submitted]
    jobs = [
        cells.job(cell, results, name, objects.absolute(artifacts))
        for cell in todo
        if cell.name in submitted or not _judged(cell, results, warn)
    ]
    for job in jobs:
        executor.submit(job)
    with listener.progress("sweep", len(jobs), "cells") as show:
        for done in range(1, len(jobs) + 1):
            job, attempt = executor.wait()
            (result,) = cells.stand([by_name[job.name]], results, name)
            _tell(job, attempt, result, listener)
            show(done, job.name)
    return cells.stand(listed, results, name)


def _judged(cell: Cell, results: Path, warn: Callable[[str], None]) -> bool:
    """Whether a cell's run has measured everything and was stopped before its decision, which is then made here."""
    run = cells.newest(cells.runs(results.resolve()).get(cell.name, ()))
    if run is None or not store.is_finished(run) or cells.decision_of(run):
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
