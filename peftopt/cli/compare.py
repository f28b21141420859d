"""compare: show runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import AsJson, app
from peftopt.errors import BadInput

if TYPE_CHECKING:
    from peftopt.cli.console import Console
    from peftopt.decision.comparing import Comparison
    from peftopt.report.words import Table

WIDTH = 100
"""Greatest width of a row in the table of differences, in characters."""

ENDINGS = {".html": "html", ".md": "markdown", ".json": "json"}


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, or their decision.json; the first is the reference."),
    ],
    form: Annotated[
        str, typer.Option("--format", help="text, html, markdown or json; by default, the ending of -o gives it.")
    ] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Compare this metric, such as ttft.p50@chat, and not the usual ones; repeat for several."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs of different machines, versions or models: the differences, the ratios to each run's own baseline,
    and the verdicts."""
    from peftopt import store
    from peftopt.cli.console import Console, print_json, print_text
    from peftopt.decision import comparing
    from peftopt.report import compared as files
    from peftopt.report import comparison as wording
    from peftopt.runner import compared

    form = form or _form(output)
    renderers = {"html": files.as_html, "markdown": files.as_markdown, "json": files.as_json}
    if form not in ("text", *renderers):
        raise BadInput(f"--format {form} is not known", "known: text, html, markdown, json")
    if as_json and output is None and form not in ("text", "json"):
        raise BadInput(f"--json prints data, and --format {form} another form", "leave one out, or give -o FILE")
    if form == "text" and output:
        raise BadInput("text is for the screen only", "give --format html, markdown or json, or -o FILE.html")
    if len(runs) > wording.MOST:
        raise BadInput(f"{len(runs)} runs are too many to compare side by side", f"give at most {wording.MOST}")
    for name in metric or ():
        _check(name)
    console = Console()
    comparison = comparing.compare([compared.read(run, console.warn) for run in runs], metric or comparing.COMPARED)
    for name in metric or ():
        if not any(name in (value.metric, value.metric.partition("@")[0]) for value in comparison.values):
            raise BadInput(f"no variant has a value of {name} in two of the runs", "see docs/metrics.md")
    if output:
        store.write(output, renderers[form](comparison), hint="choose another place")
    if as_json:
        print_json(files.data(comparison))
    elif output:
        console.say(f"wrote {output}")
    elif form == "text":
        _show(console, comparison)
    else:
        print_text(renderers[form](comparison), end="")


def _form(output: Path | None) -> str:
    """The format by a file's ending, and text for the screen."""
    return ENDINGS.get(output.suffix.lower(), "text") if output else "text"


def _check(name: str) -> None:
    """Raises BadInput for a name that is not a metric's."""
    from peftopt.metrics import METRICS, REPORTED, described
    from peftopt.recipe.reader import nearest

    if described(name) is None:
        raise BadInput(
            f"--metric {name}: there is no such metric", nearest(name.partition("@")[0], {**METRICS, **REPORTED})
        )


def _show(console: Console, comparison: Comparison) -> None:
    """Print the differences, the values run by run, the verdicts, and last the sentence."""
    from peftopt.report import comparison as wording
    from peftopt.report.words import clip

    header, rows = wording.runs(comparison)
    console.table(header, rows, [run.decision.outcome for run in comparison.runs])
    header, rows = wording.differing(comparison)
    room = WIDTH // len(header)
    _titled(console, "what differs", (header, [[clip(cell, room) for cell in row] for row in rows]))
    if not rows:
        console.say("no difference in what is known of all of them")
    for note in (*wording.cautions(comparison), *wording.remarks(comparison)):
        console.say(f"- {note}")
    for other in range(1, len(comparison.runs)):
        _titled(console, "values, relative to each run's own baseline", wording.values(comparison, [other]))
    _titled(console, "verdicts", wording.verdicts(comparison))
    console.say("")
    console.say(wording.how_sure(comparison))
    console.say(wording.sentence(comparison), "bold")


def _titled(console: Console, title: str, table: Table) -> None:
    """Print a table under its title. Only a variant's first row has its name."""
    header, rows = table
    console.say("")
    console.say(title, "bold")
    if rows:
        before = ["", *(row[0] for row in rows)]
        shown = [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(rows, before, strict=False)]
        console.table(header, shown)
