"""gate: compare a run with the accepted baseline, in CI."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from peftopt.cli.shared import Artifacts, AsJson, NoForecast, Quiet, Results, app, beside, options_from, seconds
from peftopt.errors import ACCEPTED, EXIT, INCONCLUSIVE, BadInput
from peftopt.redaction import redacted

if TYPE_CHECKING:
    from peftopt.cli.console import Console
    from peftopt.gate.records import Baseline, Gate, Hashes, Snapshot
    from peftopt.records import Decision

ENDING = ".baseline.json"


@dataclass(frozen=True)
class GateOptions:
    """The options of `gate`."""

    target: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="A run's folder, or a recipe to run first.")]
    baseline: Annotated[
        Path | None,
        typer.Option(help="File of the accepted baseline; by default RECIPE.baseline.json beside the recipe."),
    ] = None
    update: Annotated[
        bool, typer.Option("--update", help="Accept this run: write the baseline from it. Review the file in git.")
    ] = False
    max_age: Annotated[str, typer.Option(help="Greatest age of a baseline to compare with: 90d, 12h.")] = "90d"
    out: Annotated[Path, typer.Option(help="Folder for junit.xml, summary.md, gate.json and code-quality.json.")] = (
        Path("results/gate")
    )
    results: Results = Path("results")
    artifacts: Artifacts = ""
    no_forecast: NoForecast = False
    as_json: AsJson = False
    quiet: Quiet = False


@dataclass(frozen=True)
class Judged:
    """The part of a run's evidence that a gate needs."""

    name: str
    snapshots: dict[str, Snapshot]
    decision: Decision


@app.command()
@options_from(GateOptions)
def gate(options: GateOptions) -> None:
    """Compare a run with the accepted baseline: exit 0 not worse, 1 worse, 3 undecided."""
    from peftopt.cli.console import Console

    if not options.target.exists():
        raise BadInput(f"there is no run and no recipe at {options.target}", "`peftopt runs` lists runs")
    console = Console(options.quiet)
    file = options.baseline or _beside(options.target)
    most_days = seconds(options.max_age) / 86_400
    accepted = _read(file)
    unfinished = _unfinished(options.target)
    if unfinished and options.update:
        console.warn(f"nothing is accepted: {unfinished}")
        raise typer.Exit(INCONCLUSIVE)
    if options.update:
        _update(file, accepted, _judged(options, console), console, options.as_json)
        return
    from peftopt.gate import judging

    missing = f"no baseline at {file}: {judging.UPDATE}"
    unusable = judging.unusable(_age_days(accepted), most_days) if accepted else missing
    unusable = unusable or unfinished
    if accepted is None or unusable:
        _conclude(judging.unable(_name(options.target), unusable), file, options, console)
    judged = _judged(options, console)
    now = judged.snapshots.get(accepted.accepted.variant)
    _conclude(judging.judge(accepted, now, judged.name), file, options, console)


# ---- the run -------------------------------------------------------------------------------------


def _judged(options: GateOptions, console: Console) -> Judged:
    """The run to judge. A recipe is run first, by the code of `run`."""
    from peftopt.runner import judged, recipe_run

    if options.target.is_dir():
        return _read_run(options.target, console)
    parsed, text = judged.read_recipe(options.target)
    with recipe_run.prepare(parsed, text, options.results, console, artifacts=options.artifacts) as run:
        recipe_run.execute(run, forecasts=not options.no_forecast)
        judged.judge(run.folder, console.warn, None, beside(run.folder))
        console.tell(f"report: {run.folder / 'report.html'}")
        return _read_run(run.folder, console)


def _read_run(folder: Path, console: Console) -> Judged:
    """Judge a run's folder again from its measurements. decision.json and the reports stay as they are."""
    from peftopt.gate import taking
    from peftopt.runner import hashes, judged

    evidence, decision = judged.weighed(folder, console.warn)
    content: Hashes | None = hashes.read(folder)
    snapshots = {name: taking.snapshot(evidence, decision, name, content) for name in evidence.plan.recipe.variants}
    return Judged(decision.recipe, {name: snapshot for name, snapshot in snapshots.items() if snapshot}, decision)


def _unfinished(target: Path) -> str:
    """Why a run's folder cannot be judged yet; "" where it can."""
    from peftopt import store

    return f"{target} is not finished: the same `peftopt run` goes on with it" if store.is_interrupted(target) else ""


def _name(target: Path) -> str:
    return target.name if target.is_dir() else target.stem


# ---- the baseline --------------------------------------------------------------------------------


def _beside(target: Path) -> Path:
    """The default path of the baseline of a recipe, or of a run's recipe."""
    from peftopt import store

    recipe = Path(store.read_plan(target / "plan.json").recipe.path) if target.is_dir() else target
    beside_it = recipe.with_suffix(ENDING)
    return beside_it if beside_it.parent.is_dir() else Path(beside_it.name)


def _read(file: Path) -> Baseline | None:
    from peftopt import store
    from peftopt.gate import keeping

    return keeping.read(store.read_text(file), str(file)) if file.exists() else None


def _age_days(baseline: Baseline) -> float:
    try:
        written = date.fromisoformat(baseline.written)
    except ValueError as error:
        raise BadInput(
            f"the baseline was written on {baseline.written!r}: not a day", "write it as 2026-01-31"
        ) from error
    return (datetime.now(UTC).date() - written).days


def _update(file: Path, before: Baseline | None, judged: Judged, console: Console, as_json: bool) -> None:
    """Accept a decided run: write its baseline, and print the changes for the reviewer."""
    from peftopt import store
    from peftopt.cli.console import print_json
    from peftopt.gate import judging, keeping, taking
    from peftopt.gate.records import Baseline, Tolerances

    decision = judged.decision
    ships = taking.shipped(decision)
    if decision.outcome not in ("accepted", "rejected"):
        console.warn(f"the run is {decision.outcome}, so there is nothing to accept: {decision.sentence}")
        raise typer.Exit(EXIT[decision.outcome])
    if judged.snapshots[ships].hashes is None:
        raise BadInput("this run has no hashes of its models and prompts", "run the recipe again with this peftopt")
    tolerances = before.tolerances if before else Tolerances()
    after = Baseline(datetime.now(UTC).date().isoformat(), judged.snapshots[ships], tolerances)
    text = keeping.render(after)
    changes = judging.changes(before, keeping.read(text, str(file)))
    store.write(file, text)
    if as_json:
        print_json({"baseline": str(file), "ships": ships, "changes": changes})
    else:
        console.pairs(f"wrote {file}", {"ships": ships})
        for line in changes:
            console.say(f"  {line}")
    raise typer.Exit(ACCEPTED)


# ---- the answer ----------------------------------------------------------------------------------


def _conclude(answer: Gate, file: Path, options: GateOptions, console: Console) -> NoReturn:
    """Write the files, tell the CI that runs this, print the summary, exit with the outcome."""
    from peftopt import store
    from peftopt.cli.console import print_json, print_text
    from peftopt.gate import keeping, words
    from peftopt.report import as_json

    text = store.read_text(file) if file.exists() else ""
    located = _in_repository(file if text else options.target)

    def line_of(case: str) -> int:
        return keeping.line_of(text, case.removeprefix("answers."))

    summary = words.summary(answer)
    written = {
        "junit.xml": words.as_junit(answer),
        "summary.md": summary,
        "code-quality.json": words.code_quality(answer, located, line_of),
        "gate.json": json.dumps(as_json.plain(answer), indent=2, allow_nan=False) + "\n",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        store.write(options.out / name, content)
    _append(os.environ.get("GITHUB_STEP_SUMMARY", ""), summary)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in words.github(answer, located, line_of):
            print_text(line, stderr=options.as_json)
    if options.as_json:
        print_json(answer)
    else:
        if not all(case.reason and case.reason in answer.sentence for case in answer.cases):
            header, rows = words.rows(answer)
            console.table(header, rows, [row[1] for row in rows])
        for note in answer.notes:
            console.tell(note)
        console.say(answer.sentence, "bold")
    raise typer.Exit(EXIT[answer.outcome])


def _append(file: str, text: str) -> None:
    """Append a text to the file of a job's summary, if there is one."""
    if file:
        with Path(file).open("a", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(redacted(text))


def _in_repository(file: Path) -> str:
    """The path from the root of the repository, as CI shows it. A path outside the repository stays as it is."""
    root = os.environ.get("GITHUB_WORKSPACE") or os.environ.get("CI_PROJECT_DIR") or "."
    resolved, home = file.resolve(), Path(root).resolve()
    return resolved.relative_to(home).as_posix() if resolved.is_relative_to(home) else file.as_posix()
