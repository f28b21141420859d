"""import: read results of other tools."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import AsJson, app
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, BadInput

if TYPE_CHECKING:
    from peftopt.cli.console import Console
    from peftopt.loadtest.importers import Found


@app.command("import")
def import_(
    file: Annotated[
        list[Path],
        typer.Argument(help="Results of vllm bench serve, GuideLLM, AIPerf, lm-evaluation-harness, or a log of serve."),
    ],
    variant: Annotated[
        list[str],
        typer.Option(
            help="The measured variant, or one for each file; by default the file's name. For a log of serve also "
            "ARM=NAME or VERSION=NAME, repeated; other arms and versions are left out."
        ),
    ] = [],  # noqa: B006
    workload: Annotated[
        str, typer.Option(help="The recipe's workload that these results are a block of, for `decide`.")
    ] = "",
    task: Annotated[
        str,
        typer.Option(help="The task of lm-evaluation-harness samples; by default, the file's name gives it."),
    ] = "",
    window: Annotated[
        float, typer.Option(help="Cut a log of serve into windows of this many seconds; each is a block for `decide`.")
    ] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Append them to this measurements.jsonl.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read other tools' results into peftopt's records, and say what they lack."""
    from peftopt.cli.console import Console, print_json
    from peftopt.loadtest import importers
    from peftopt.loadtest import runs as loading
    from peftopt.metrics import counted

    variants = _arms(variant)
    if not variants and len(variant) > 1 and len(variant) != len(file):
        raise BadInput(
            f"--variant is given {len(variant)} times for {counted(len(file), 'file')}",
            "give it once, or once for each file",
        )
    names = [path.stem for path in file]
    if variant and not variants:
        names = variant if len(variant) > 1 else variant * len(file)
    console = Console()
    raw = True
    answered = True
    for path, default in zip(file, names, strict=True):
        runs = list(_named(path, importers.read(path, task, window), variants, default))
        for imported, name in runs:
            answered = answered and not imported.failed
            raw = raw and imported.raw
            kept = loading.keep(out, imported, name, workload)
            if as_json:
                print_json(kept)
            elif not window:
                _show(console, path, imported, f" as {name}" if variants else "")
        if window and not as_json:
            _show_windows(console, path, runs)
    if not answered:
        raise typer.Exit(ENVIRONMENT)
    raise typer.Exit(ACCEPTED if raw else INCONCLUSIVE)


def _arms(variants: list[str]) -> dict[str, str]:
    """The variant of each arm or version in ARM=NAME. Raises BadInput for a mixture with plain names."""
    pairs = [tuple(each.split("=", 1)) for each in variants if "=" in each]
    if pairs and len(pairs) < len(variants):
        raise BadInput("--variant is given as NAME and as ARM=NAME", "write ARM=NAME for each arm of the log")
    return {arm: name for arm, name in pairs}


def _named(path: Path, runs: list[Found], variants: dict[str, str], default: str) -> Iterator[tuple[Found, str]]:
    """The runs of a file, each with its variant: `variants` gives it by arm or version; without `variants`, it is
    `default`. Raises BadInput for an arm or version that is not in the file."""
    names = dict.fromkeys(name for run in runs for name in run.names)
    unknown = [name for name in variants if name not in names]
    if unknown:
        raise BadInput(f"{path} has no {', '.join(unknown)}", f"known: {', '.join(names) or 'none with a name'}")
    for run in runs:
        name = next((variants[known] for known in run.names if known in variants), "")
        if name or not variants:
            yield run, name or default


def _show_windows(console: Console, path: Path, runs: list[tuple[Found, str]]) -> None:
    """Print a line for each arm of a log's windows, and what they lack."""
    from peftopt.metrics import counted

    arms: dict[str, list[Found]] = {}
    for imported, name in runs:
        arms.setdefault(f"{imported.title} as {name}", []).append(imported)
    for title, windows in arms.items():
        requests = counted(sum(len(imported.requests) for imported in windows), "request")
        console.say(f"{path}: {title}: {counted(len(windows), 'window')}, {requests}", "bold")
    for what in dict.fromkeys(what for imported, _ in runs for what in imported.lacks):
        console.warn(f"it lacks {what}")


def _show(console: Console, path: Path, imported: Found, named: str) -> None:
    """Print a run, and what it lacks."""
    from peftopt import report
    from peftopt.loadtest import importers

    console.say(f"{path}: {imported.source}, {imported.title}{named}", "bold")
    if imported.requests:
        console.table(report.load.HEADER, report.load.rows(importers.as_loaded(imported)))
    else:
        shown = imported.reported or {k: v for k, v in imported.values.items() if k != "samples"}
        console.pairs("as it reports", {k: v for k, v in shown.items() if v is not None})
    for what in imported.lacks:
        console.warn(f"it lacks {what}")
    if imported.failed:
        console.warn("every request failed")
