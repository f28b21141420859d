"""sweep: run many recipes, on this machine or on a cluster, and report their decisions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from peftopt.cli.shared import Artifacts, AsJson, NoForecast, Quiet, Results, app
from peftopt.errors import BadInput

if TYPE_CHECKING:
    from peftopt.cli.console import Console
    from peftopt.decision.duration import Span
    from peftopt.recipe.grid import Cell, Grid
    from peftopt.report.swept import CellResult
    from peftopt.runner.executors import Executor

GridFile = Annotated[Path, typer.Argument(metavar="GRID", help="A grid (YAML): docs/sweeps.md says what it holds.")]


HERE = ("local", "submitit:local")
"""Executors of the one machine that this process runs on."""


class _RunByDefault(TyperGroup):
    """`peftopt sweep GRID` is `peftopt sweep run GRID`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words after `sweep`. Without a verb in front, they are the words of `run`."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


sweeps = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Decide for many models, adapters and machines: `peftopt sweep GRID` is `peftopt sweep run GRID`.",
)
app.add_typer(sweeps, name="sweep")


@sweeps.command("run")
def run(
    grid: GridFile,
    on: Annotated[
        str,
        typer.Option(
            help="Where cells run: local (this machine), ray (the cluster that it is in), ray:HOST:PORT, slurm (the "
            "default partition) or slurm:PARTITION. submitit:local is for trying the last two without Slurm."
        ),
    ] = "local",
    machine: Annotated[
        str, typer.Option(help="Only cells of this class of machines; with --on local, the class of this machine.")
    ] = "",
    results: Results = Path("results"),
    artifacts: Artifacts = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells, which are left and how long they take; run nothing.")
    ] = False,
    more: Annotated[
        bool, typer.Option("--more", help="Add blocks to the cells that were measured and are undecided.")
    ] = False,
    no_forecast: NoForecast = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure and decide every cell of a grid that is not decided yet, each in a `peftopt run` of its own. The exit
    code is the worst of the cells': 5, 4, 2, 3 (also for a cell that waits), 1, 0."""
    from peftopt.cli.console import Console
    from peftopt.metrics import counted
    from peftopt.report import swept
    from peftopt.runner import cells, executors, sweep

    console = Console(quiet)
    read, listed = _planned(grid)
    classes = list(dict.fromkeys(cell.machine.name for cell in listed))
    here = sweep.here(read, machine, classes) if on in HERE or machine else ""
    ours = [cell for cell in listed if not machine or cell.machine.name == machine]
    executor = executors.opened(on, here)
    try:
        standing = cells.stand(ours, results, read.name)
        unknown = on in HERE and not no_forecast and not swept.times_of(standing, here)
        forecasts = sweep.forecasts(read, standing, here, results, console) if unknown else {}
        _print_forecast(standing, executor, forecasts, console)
        if more:
            console.tell(f"{counted(len(swept.undecided(standing)), 'undecided cell')} to get more blocks")
        console.tell(sweep.disk(read))
        if not dry_run:
            takes = sweep.lengths(read, ours)
            sweep.sweep(standing, results, read.name, executor, console, artifacts, more, takes)
    finally:
        if still := executor.close():
            console.warn(still)
    cell_results = cells.stand(listed, results, read.name)
    if dry_run and not as_json:
        console.say(swept.sentence(cell_results))
        return
    _conclude(read, cell_results, console, as_json)
    if not dry_run:
        raise typer.Exit(swept.worst(cell_results))


@sweeps.command("status")
def status(grid: GridFile, results: Results = Path("results"), as_json: AsJson = False) -> None:
    """Show the state of each cell of a grid, from the files of its runs; also while they run."""
    from peftopt.cli.console import Console
    from peftopt.runner import cells

    read, listed = _planned(grid)
    _conclude(read, cells.stand(listed, results, read.name), Console(), as_json)


@sweeps.command("report")
def report(
    grid: GridFile,
    results: Results = Path("results"),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File of the page; by default results/sweeps/NAME/report.html."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a row for each variant of each cell to this file.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="The same as Parquet.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one page on all decisions of a grid: which variant wins in which cell, its cost, and what is undecided."""
    from peftopt import store
    from peftopt.api.opened import write
    from peftopt.cli.console import Console
    from peftopt.report import swept
    from peftopt.runner import cells

    console = Console()
    read, listed = _planned(grid)
    cell_results = cells.stand(listed, results, read.name)
    folder = cells.folder_of(results, read.name)
    page = output or folder / "report.html"
    if output is None:
        folder.mkdir(parents=True, exist_ok=True)
    runs = os.path.relpath(results.resolve() / "runs", page.parent.resolve())
    store.write(page, swept.page(read.name, cell_results, runs), hint="choose another place: --output FILE")
    for file, ending in ((csv, ".csv"), (parquet, ".parquet")):
        if file:
            write(swept.rows(cell_results), swept.COLUMNS, file, ending)
            console.tell(f"wrote {file}")
    _conclude(read, cell_results, console, as_json, page)


def _planned(path: Path) -> tuple[Grid, list[Cell]]:
    """A grid and its cells."""
    from peftopt.recipe import grid as grids
    from peftopt.runner import sweep

    read = sweep.read_grid(path)
    listed = grids.cells(read)
    if not listed:
        raise BadInput(f"{path} has no cell", "no class of machines takes any of its groups of variants")
    return read, listed


def _print_forecast(
    cell_results: Sequence[CellResult], executor: Executor, forecasts: Mapping[str, Span], console: Console
) -> None:
    """Print the cells, which are left and on which machines, and how long they take: by those that ended, or by
    `forecasts`, seconds by the cell's name."""
    from peftopt.decision.duration import words
    from peftopt.metrics import counted
    from peftopt.report import swept

    console.tell(swept.size([result.cell for result in cell_results]))
    console.tell(swept.sentence(cell_results))
    left = Counter(result.cell.machine.name for result in swept.left(cell_results))
    classes = {result.cell.machine.name: result.cell.machine for result in cell_results}
    machines = {name: executor.machines(needs) for name, needs in classes.items()}
    for name, number in left.items():
        on = f"on {counted(machines[name], 'machine')}" if machines[name] else "without a machine here"
        console.tell(f"{counted(number, 'cell')} of the class {name} left, {on}")
    if not any(machines[name] for name in left):
        return
    takes = swept.takes(cell_results, machines, forecasts)
    by = "by the times of first layers" if forecasts else "by the cells that ended"
    unknown = "the time of a cell is known once one has ended; `peftopt check` estimates it for one recipe"
    console.tell(f"about {words(takes)} {by}" if takes else unknown)


def _conclude(
    grid: Grid, cell_results: Sequence[CellResult], console: Console, as_json: bool, page: Path | None = None
) -> None:
    """Print the state of each cell, which variant wins in which cell, and what is open."""
    from peftopt.cli.console import print_json
    from peftopt.report import swept

    if as_json:
        summary = {"sweep": grid.name, "sentence": swept.sentence(cell_results), "exit_code": swept.worst(cell_results)}
        report = {"report": str(page)} if page else {}
        print_json({**summary, **report, "cells": [_fields(result) for result in cell_results]})
        return
    header, rows = swept.cells(cell_results)
    console.table(header, rows, [result.outcome for result in cell_results])
    for header, rows in (swept.winners(cell_results), swept.still_open(cell_results)):
        if rows:
            console.say("")
            console.table(header, rows)
    console.say("")
    console.say(swept.sentence(cell_results), "bold")
    if page:
        console.say(f"report: {page}")


def _fields(result: CellResult) -> dict[str, object]:
    """A cell for programs."""
    cell = result.cell
    named = {"cell": cell.name, "model": cell.model, "adapter": cell.adapter, "variants": cell.group}
    return {
        **named,
        "machine": cell.machine.name,
        "state": result.state,
        "outcome": result.decision.outcome if result.decision else None,
        "chosen": result.decision.chosen if result.decision else None,
        "exit_code": result.exit_code,
        "run": result.run or None,
        "host": result.host or None,
        "seconds": result.seconds,
        "why": result.why,
        "what_to_do": result.hint,
    }
