"""sweep: many recipes, on this machine or on a cluster, and what they decided."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from peftopt.cli.shared import AsJson, Quiet, Results, app
from peftopt.errors import BadInput

if TYPE_CHECKING:
    from peftopt.cli.console import Console
    from peftopt.recipe.grid import Cell, Grid
    from peftopt.report.swept import CellResult
    from peftopt.runner.executors import Executor

GridFile = Annotated[Path, typer.Argument(metavar="GRID", help="A grid (YAML): docs/sweeps.md says what it holds.")]


HERE = ("local", "submitit:local")
"""Executors of the one machine that this process runs on."""


class _RunByDefault(TyperGroup):
    """`peftopt sweep GRID` is `peftopt sweep run GRID`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words behind `sweep`; without a verb in front they are those of `run`."""
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is, what is left and what it will take; run nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure and decide every cell of a grid that is not decided yet, each by a `peftopt run` of its own. Ends with
    the worst exit code of its cells: 5, 4, 2, 3 (also for a cell that waits), 1, 0."""
    from peftopt.cli.console import Console
    from peftopt.report import swept
    from peftopt.runner import cells, executors, sweep

    console = Console(quiet)
    read, listed = _planned(grid)
    classes = list(dict.fromkeys(cell.machine.name for cell in listed))
    here = sweep.here(read, machine, classes) if on in HERE or machine else ""
    ours = [cell for cell in listed if not machine or cell.machine.name == machine]
    executor = executors.opened(on, here)
    try:
        _foretell(cells.stand(ours, results, read.name), executor, console)
        console.tell(sweep.disk(read))
        if not dry_run:
            sweep.sweep(ours, results, read.name, executor, console)
    finally:
        if still := executor.close():
            console.warn(still)
    standing = cells.stand(listed, results, read.name)
    if dry_run and not as_json:
        console.say(swept.sentence(standing))
        return
    _conclude(read, standing, console, as_json)
    if not dry_run:
        raise typer.Exit(swept.worst(standing))


@sweeps.command("status")
def status(grid: GridFile, results: Results = Path("results"), as_json: AsJson = False) -> None:
    """Say where each cell of a grid stands, from the files of its runs; also while they run."""
    from peftopt.cli.console import Console
    from peftopt.runner import cells

    read, listed = _planned(grid)
    _conclude(read, cells.stand(listed, results, read.name), Console(), as_json)


@sweeps.command("report")
def report(
    grid: GridFile,
    results: Results = Path("results"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; results/sweeps/NAME/report.html by default.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a row for each variant of each cell to this file.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="The same as Parquet.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one page over all decisions of a grid: which variant wins where, what it costs, what is not decided."""
    from peftopt import store
    from peftopt.api.opened import write
    from peftopt.cli.console import Console
    from peftopt.report import swept
    from peftopt.runner import cells

    console = Console()
    read, listed = _planned(grid)
    standing = cells.stand(listed, results, read.name)
    folder = cells.folder_of(results, read.name)
    page = output or folder / "report.html"
    if output is None:
        folder.mkdir(parents=True, exist_ok=True)
    runs = os.path.relpath(results.resolve() / "runs", page.parent.resolve())
    store.write(page, swept.page(read.name, standing, runs), hint="choose another place: --output FILE")
    for file, ending in ((csv, ".csv"), (parquet, ".parquet")):
        if file:
            write(swept.rows(standing), swept.COLUMNS, file, ending)
            console.tell(f"wrote {file}")
    _conclude(read, standing, console, as_json, page)


def _planned(path: Path) -> tuple[Grid, list[Cell]]:
    """A grid and its cells."""
    from peftopt.recipe import grid as grids
    from peftopt.runner import sweep

    read = sweep.read_grid(path)
    listed = grids.cells(read)
    if not listed:
        raise BadInput(f"{path} has no cell", "no class of machines takes any of its groups of variants")
    return read, listed


def _foretell(standing: Sequence[CellResult], executor: Executor, console: Console) -> None:
    """Say what there is, what is left and on which machines, and how long that takes."""
    from peftopt.decision.duration import words
    from peftopt.metrics import counted
    from peftopt.report import swept

    console.tell(swept.size([each.cell for each in standing]))
    console.tell(swept.sentence(standing))
    left = Counter(each.cell.machine.name for each in swept.left(standing))
    classes = {each.cell.machine.name: each.cell.machine for each in standing}
    machines = {name: executor.machines(needs) for name, needs in classes.items()}
    for name, number in left.items():
        on = f"on {counted(machines[name], 'machine')}" if machines[name] else "for which there is no machine here"
        console.tell(f"{counted(number, 'cell')} of the class {name} left, {on}")
    if not any(machines[name] for name in left):
        return
    takes = swept.takes(standing, machines)
    unknown = "how long a cell takes is known when one has ended; `peftopt check` says it of one recipe"
    console.tell(f"about {words(takes)} by the cells that ended" if takes else unknown)


def _conclude(
    grid: Grid, standing: Sequence[CellResult], console: Console, as_json: bool, page: Path | None = None
) -> None:
    """Print where the cells stand, which variant wins where, and what is open."""
    from peftopt.cli.console import print_json
    from peftopt.report import swept

    if as_json:
        told = {"sweep": grid.name, "sentence": swept.sentence(standing), "exit_code": swept.worst(standing)}
        report = {"report": str(page)} if page else {}
        print_json({**told, **report, "cells": [_fields(each) for each in standing]})
        return
    header, rows = swept.cells(standing)
    console.table(header, rows, [each.outcome for each in standing])
    for header, rows in (swept.winners(standing), swept.still_open(standing)):
        if rows:
            console.say("")
            console.table(header, rows)
    console.say("")
    console.say(swept.sentence(standing), "bold")
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
