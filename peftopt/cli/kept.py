"""list, runs and clean: what a recipe can name, which runs exist, and which artifacts can go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import AsJson, Results, app, seconds
from peftopt.errors import BadInput

if TYPE_CHECKING:
    from peftopt.runner.kept import KeptRun

SIZES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="techniques, engines, policies, probes or recipes; all by default.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the techniques, engines and policies that a recipe can name, the probes, and recipes to copy."""
    from peftopt.cli.console import Console, print_json

    known = _named()
    if what and what not in known:
        raise BadInput(f"there is no list named {what!r}", f"known: {', '.join(known)}")
    chosen = {what: known[what]} if what else known
    if as_json:
        print_json(chosen)
        return
    console = Console()
    for title, names in chosen.items():
        console.glossary(title, names)


def _named() -> dict[str, dict[str, str]]:
    """Names by kind, each with one line of help."""
    from peftopt import measurements, plugins
    from peftopt.cli.around import starters

    kinds = {"techniques": "transform", "engines": "engine", "policies": "policy"}
    catalogue = plugins.catalogue().values()
    named = {title: {p.name: p.help for p in catalogue if p.kind == kind} for title, kind in kinds.items()}
    named["probes"] = {name: _what(record.__doc__ or "") for name, record in measurements.PROBES.items()}
    named["recipes"] = {name: _first_comment(file) for name, file in starters().items()}
    return named


def _what(docstring: str) -> str:
    """The first sentence of a probe's docstring, without the name in front."""
    text = " ".join(docstring.split()).partition(": ")[2]
    return text.partition(". ")[0].removesuffix(".")


def _first_comment(file: Path) -> str:
    """The first sentence of a recipe's comment. The comment follows the line for editors."""
    lines = [line.removeprefix("#").strip() for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    text = " ".join(lines[: next((n for n, line in enumerate(lines) if line.startswith("model:")), 3)])
    for end in (". ", "? "):
        if end in text:
            text = text.partition(end)[0] + end.strip()
    return text


@app.command("runs")
def runs_(results: Results = Path("results"), as_json: AsJson = False) -> None:
    """List the runs of a results folder, newest first: age, size and decision."""
    from peftopt.cli.console import Console, print_json
    from peftopt.metrics import format_value
    from peftopt.runner import kept

    found = kept.runs(results)
    if as_json:
        print_json({"runs": [_fields(run) for run in found]})
        return
    rows = [
        [
            run.folder.name,
            _age(run.age_s),
            format_value("size", run.size_bytes),
            str(run.variants or "-"),
            run.outcome + (f": {run.chosen}" if run.chosen else ""),
        ]
        for run in found
    ]
    Console().table(["run", "age", "size", "variants", "outcome"], rows, [run.outcome for run in found])


@app.command()
def clean(
    results: Results = Path("results"),
    older: Annotated[str, typer.Option(help="Only artifacts older than this, such as 30d.")] = "0",
    over: Annotated[str, typer.Option(help="Only the oldest, until the rest takes at most this: 20GB.")] = "0GB",
    runs_older: Annotated[
        str, typer.Option(help="Also runs older than this, and artifacts that only they use; never the newest run.")
    ] = "",
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete them. Without this option, nothing changes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the artifacts that no run uses; with --delete, remove them. Artifacts of the remaining runs stay."""
    from peftopt.cli.console import Console, print_json
    from peftopt.metrics import format_value
    from peftopt.runner import kept

    older_s, over_bytes = seconds(older), _bytes(over)
    all_runs = kept.runs(results)
    old_runs = [run for run in all_runs[1:] if runs_older and run.age_s > seconds(runs_older)]
    kept_runs = [run for run in all_runs if run not in old_runs]
    unused = kept.unused(kept.artifacts(results, kept_runs), older_s, over_bytes)
    if delete:
        for run in old_runs:
            kept.remove(run.folder)
        for artifact in unused:
            kept.remove(artifact.folder)
    total = sum(run.size_bytes for run in old_runs) + sum(artifact.size_bytes for artifact in unused)
    if as_json:
        runs = [str(run.folder) for run in old_runs]
        artifacts = [str(artifact.folder) for artifact in unused]
        print_json({"runs": runs, "artifacts": artifacts, "bytes": total, "deleted": delete})
        return
    console = Console()
    rows = [[run.folder.name, "run", _age(run.age_s), format_value("size", run.size_bytes)] for run in old_runs]
    rows += [
        [artifact.folder.name[:12], artifact.what, _age(artifact.age_s), format_value("size", artifact.size_bytes)]
        for artifact in unused
    ]
    if rows:
        console.table(["folder", "what", "age", "size"], rows)
    what = "deleted" if delete else "can go; --delete removes it" if rows else "nothing to clean"
    console.say(f"{format_value('size', total)} {what}" if rows else what)


def _fields(run: KeptRun) -> dict[str, object]:
    return {**vars(run), "folder": str(run.folder), "artifacts": sorted(run.artifacts)}


def _age(age_s: float) -> str:
    """A length of time in its largest unit."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if age_s >= size:
            return f"{age_s / size:.0f} {unit}"
    return f"{age_s:.0f} s"


def _bytes(text: str) -> float:
    number, unit = text[:-2], text[-2:].upper()
    try:
        return float(number) * SIZES[unit]
    except (ValueError, KeyError) as error:
        raise BadInput(f"{text!r} is not a size", "write 500MB or 20GB") from error
