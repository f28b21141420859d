"""export-data: a run's measurements as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftopt.cli.shared import AsJson, Results, app, find_run, print_lines


@app.command("export-data")
def export_data(
    run_folder: Annotated[
        Path | None, typer.Argument(help="A folder below results/runs; the newest by default.", show_default=False)
    ] = None,
    to: Annotated[Path, typer.Option(help="File to write; its ending gives the format: .parquet or .csv.")] = Path(
        "requests.csv"
    ),
    table: Annotated[
        str, typer.Option(help="requests, blocks, answers, figures, verdicts or measurements.")
    ] = "requests",
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Write a run's requests, blocks, answers or figures as Parquet or CSV."""
    from peftopt.api.opened import export, open_run

    rows = export(open_run(find_run(run_folder, results)), table, to)
    print_lines(f"wrote {to}", {"rows": f"{rows} of {table}"}, {"path": str(to), "table": table, "rows": rows}, as_json)
