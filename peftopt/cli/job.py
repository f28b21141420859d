"""run, decide and report: the whole way from a recipe to a report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import (
    Artifacts,
    AsJson,
    NoForecast,
    Quiet,
    Results,
    RunFolder,
    app,
    beside,
    conclude,
    find_run,
)
from peftopt.errors import BadInput

if TYPE_CHECKING:
    from peftopt.cli.console import Console


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML); `peftopt new` writes one.")],
    results: Results = Path("results"),
    artifacts: Artifacts = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run; do not continue an unfinished one.")] = False,
    more: Annotated[
        bool,
        typer.Option(
            "--more", help="Add blocks to the last run of this recipe, if a variant is undecided or left open."
        ),
    ] = False,
    no_forecast: NoForecast = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print where the time went, and write trace.json for Perfetto.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Build every variant, measure it against the baseline, decide, and write the report."""
    from peftopt import store
    from peftopt.cli.console import Console
    from peftopt.runner import judged, recipe_run

    console = Console(quiet)
    parsed, text = judged.read_recipe(recipe)
    with recipe_run.prepare(parsed, text, results, console, fresh, more, artifacts) as run:
        with profiled(run.folder, console) if profile else contextlib.nullcontext():
            if more and store.is_finished(run.folder):
                recipe_run.add_blocks(run)
            else:
                recipe_run.execute(run, forecasts=not no_forecast)
        conclude(run.folder, console, as_json)


@contextlib.contextmanager
def profiled(folder: Path, console: Console) -> Iterator[None]:
    """Print where the time went, and write a trace into the run's folder, also for an interrupted run."""
    from peftopt import machine
    from peftopt.runner import trace

    with trace.recording() as recorder:
        try:
            yield
        finally:
            for line in trace.words(recorder, machine.cores()):
                console.tell(line)
            recorder.write(folder / trace.FILE)
            console.tell(f"trace: {folder / trace.FILE}; open it at ui.perfetto.dev or chrome://tracing")


@app.command()
def decide(
    run_folder: RunFolder = None,
    results: Results = Path("results"),
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Judge by the thresholds of this recipe, as they are now. It takes the newest run of this recipe's "
            "name, else the newest with its variants. A folder of imported measurements needs a recipe."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a run again from its files, without a model and without a GPU."""
    from peftopt.cli.console import Console
    from peftopt.runner import judged

    parsed = judged.read_recipe(recipe)[0] if recipe else None
    try:
        folder = find_run(run_folder, results, parsed.name if parsed else "")
    except BadInput:
        renamed = judged.run_of(results, parsed) if parsed else None
        if renamed is None:
            raise
        folder = renamed
    conclude(folder, Console(), as_json, parsed)


@app.command()
def report(
    run_folder: RunFolder = None,
    results: Results = Path("results"),
    only: Annotated[str, typer.Option(help="Print only this part: scorecard, variants, rules, answers, …")] = "",
    price_per_hour: Annotated[
        str,
        typer.Option(
            help='Price of the machine per hour, such as "2.10 USD", in place of the recipe\'s; the reports then give '
            "the price of tokens."
        ),
    ] = "",
    open_page: Annotated[bool, typer.Option("--open", help="Open report.html in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's reports again, from decision.json and its measurements, and print the Markdown report."""
    from peftopt import report as reports
    from peftopt import store
    from peftopt.cli.console import Console, print_json, print_text
    from peftopt.runner import judged

    if only and only not in reports.parts.TITLES:
        raise BadInput(f"a report has no part {only!r}", f"its parts: {', '.join(reports.parts.TITLES)}")
    price = reports.scorecard.price(price_per_hour) if price_per_hour else None
    folder = find_run(run_folder, results)
    console = Console()
    again = judged.report_again(folder, console.warn, beside(folder), price)
    page = folder / "report.html"
    text = again.part(only) if only else store.read_text(folder / "report.md")
    if as_json:
        decision = again.decision
        files = {"html": page, "markdown": folder / "report.md", "junit": folder / "junit.xml"}
        headline = reports.headline.headline(decision)
        values = {"outcome": decision.outcome, "chosen": decision.chosen, "headline": headline}
        print_json({"run": folder, **values, **files, "text": text})
    else:
        print_text(text)
    print_text(f"report: {page}", stderr=True)
    if open_page:
        _open(page, console)


def _open(page: Path, console: Console) -> None:
    """Open a page in the browser, or warn that there is none."""
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        console.warn(f"no browser was found: open {page} yourself")
