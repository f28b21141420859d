"""What there is: list, runs, clean."""

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
    """List what a recipe can name: techniques, engines, policies; what is measured; recipes to copy."""
    from peftopt.cli.console import Console, print_json

    known = _named()
    if what and what not in known:
        raise BadInput(f"nothing is called {what}", f"known: {', '.join(known)}")
    chosen = {what: known[what]} if what else known
    if as_json:
        print_json(chosen)
        return
    console = Console()
    for title, names in chosen.items():
        console.glossary(title, names)


def _named() -> dict[str, dict[str, str]]:
    """Names by kind, each with its line of help."""
    from peftopt import measurements, plugins
    from peftopt.cli.around import starters

    kinds = {"techniques": "transform", "engines": "engine", "policies": "policy"}
    catalogue = plugins.catalogue().values()
    named = {title: {p.name: p.help for p in catalogue if p.kind == kind} for title, kind in kinds.items()}
    named["probes"] = {name: _what(record.__doc__ or "") for name, record in measurements.PROBES.items()}
    named["recipes"] = {name: _first_comment(file) for name, file in starters().items()}
    return named


def _what(docstring: str) -> str:
    """A probe's first sentence, behind its name."""
    text = " ".join(docstring.split()).partition(": ")[2]
    return text.partition(". ")[0].removesuffix(".")


def _first_comment(file: Path) -> str:
    """The first sentence of a recipe's comment, which comes after the line for editors."""
    lines = [line.removeprefix("#").strip() for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    text = " ".join(lines[: next((n for n, line in enumerate(lines) if line.startswith("model:")), 3)])
    for end in (". ", "? "):
        if end in text:
            text = text.partition(end)[0] + end.strip()
    return text


@app.command("runs")
def runs_(results: Results = Path("results"), as_json: AsJson = False) -> None:
    """List the runs of a results folder, newest first: how old and large they are, and what they decided."""
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
            _length(run.age_s),
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
    older: Annotated[str, typer.Option(help="Only what is older than this, such as 30d.")] = "0",
    over: Annotated[str, typer.Option(help="Only so much, oldest first, that this is left, such as 20GB.")] = "0GB",
    runs_older: Annotated[
        str, typer.Option(help="Also runs older than this, and artifacts that only they use; never the newest run.")
    ] = "",
    delete: Annotated[bool, typer.Option("--delete", help="Delete. Without it nothing is touched.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which artifacts no run uses, and with --delete remove them. Those of a run that is kept stay."""
    from peftopt.cli.console import Console, print_json
    from peftopt.metrics import format_value
    from peftopt.runner import kept

    older_s, over_bytes = seconds(older), _bytes(over)
    every = kept.runs(results)
    leaving = [run for run in every[1:] if runs_older and run.age_s > seconds(runs_older)]
    staying = [run for run in every if run not in leaving]
    going = kept.unused(kept.artifacts(results, staying), older_s, over_bytes)
    if delete:
        for run in leaving:
            kept.remove(run.folder)
        for each in going:
            kept.remove(each.folder)
    total = sum(run.size_bytes for run in leaving) + sum(each.size_bytes for each in going)
    if as_json:
        listed = {"runs": [str(run.folder) for run in leaving], "artifacts": [str(each.folder) for each in going]}
        print_json({**listed, "bytes": total, "deleted": delete})
        return
    console = Console()
    rows = [[run.folder.name, "run", _length(run.age_s), format_value("size", run.size_bytes)] for run in leaving]
    rows += [
        [each.folder.name[:12], each.what, _length(each.age_s), format_value("size", each.size_bytes)] for each in going
    ]
    if rows:
        console.table(["folder", "what", "age", "size"], rows)
    what = "deleted" if delete else "can go; --delete removes it" if rows else "nothing to clean"
    console.say(f"{format_value('size', total)} {what}" if rows else what)


def _fields(run: KeptRun) -> dict[str, object]:
    return {**vars(run), "folder": str(run.folder), "artifacts": sorted(run.artifacts)}


def _length(length_s: float) -> str:
    """A length of time in its largest unit."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if length_s >= size:
            return f"{length_s / size:.0f} {unit}"
    return f"{length_s:.0f} s"


def _bytes(text: str) -> float:
    number, unit = text[:-2], text[-2:].upper()
    try:
        return float(number) * SIZES[unit]
    except (ValueError, KeyError) as error:
        raise BadInput(f"{text!r} is not a size", "write 500MB or 20GB") from error
