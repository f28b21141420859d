"""import: results of other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from peftopt.cli.shared import AsJson, app
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, BadInput


@app.command("import")
def import_(
    file: Annotated[
        list[Path],
        typer.Argument(help="Results of vllm bench serve, GuideLLM, AIPerf, lm-evaluation-harness, or a log of serve."),
    ],
    variant: Annotated[
        list[str], typer.Option(help="The variant they measured, or one for each file; by default the file's name.")
    ] = [],  # noqa: B006
    workload: Annotated[
        str, typer.Option(help="The recipe's workload that this was: `decide` takes it as a block of it.")
    ] = "",
    task: Annotated[
        str,
        typer.Option(help="The task that samples of lm-evaluation-harness are of; by default the file's name says."),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Append them to this measurements.jsonl.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read other tools' results into the same records, and say what they lack."""
    from peftopt import report
    from peftopt.cli.console import Console
    from peftopt.loadtest import importers
    from peftopt.loadtest import runs as loading
    from peftopt.metrics import counted

    if len(variant) > 1 and len(variant) != len(file):
        raise BadInput(
            f"--variant is given {len(variant)} times for {counted(len(file), 'file')}",
            "give it once, or once for each file",
        )
    names = variant * len(file) if len(variant) == 1 else variant or [path.stem for path in file]
    console, raw, answered = Console(), True, True
    for path, name in zip(file, names, strict=True):
        for found in importers.read(path, task):
            answered = answered and not found.failed
            kept = loading.keep(out, found, name, workload)
            raw = raw and found.raw
            if as_json:
                print(json.dumps(report.as_json.plain(kept), allow_nan=False))
                continue
            console.say(f"{path}: {found.source}, {found.title}", "bold")
            if found.requests:
                console.table(report.load.HEADER, report.load.rows(importers.as_loaded(found)))
            else:
                shown = found.reported or {k: v for k, v in found.values.items() if k != "samples"}
                console.pairs("as it reports", {k: v for k, v in shown.items() if v is not None})
            for what in found.lacks:
                console.warn(f"it lacks {what}")
            if found.failed:
                console.warn("nothing was answered: every request failed")
    raise typer.Exit(ENVIRONMENT if not answered else ACCEPTED if raw else INCONCLUSIVE)
