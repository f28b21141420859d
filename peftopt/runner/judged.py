"""Read a recipe from its file, and turn a run's measurements into its decision and reports."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from peftopt import plugins, report, store
from peftopt.decision.decide import decide
from peftopt.decision.evidence import Evidence
from peftopt.errors import BadInput
from peftopt.recipe import parse as recipes
from peftopt.recipe import plan as planning
from peftopt.records import Decision, Recipe
from peftopt.report.scorecard import Price
from peftopt.report.words import Section

JUDGED = "judged.json"
"""The file of the plan that a run was judged by, if it differs from the plan that it was measured by."""

Warn = Callable[[str], None]


class Silent:
    """A listener that shows nothing."""

    def done(self, step: str, what: str, seconds: float | None, note: str = "") -> None:
        """Nothing is shown."""

    def warn(self, text: str) -> None:
        """Nothing is shown."""

    def tell(self, text: str) -> None:
        """Nothing is shown."""

    @contextlib.contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        """No bar."""
        yield lambda done, what: None


def read_recipe(path: Path) -> tuple[Recipe, str]:
    """A recipe and its text. Raises BadRecipe with all its mistakes, BadInput for a file that is not text."""
    text = store.read_text(path)
    return recipe_of(text, str(path.resolve())), text


def recipe_of(text: str, path: str) -> Recipe:
    """The recipe in a text. Its paths are relative to the folder of `path`. Raises BadRecipe with all its mistakes."""
    defaults = (Path(__file__).parent.parent / "recipes" / "tradeoffs.yaml").read_text(encoding="utf-8")

    def read(name: str) -> str:
        return Path(name).read_text(encoding="utf-8")

    return recipes.parse(text, path, plugins.catalogue(), defaults, read)


def weighed(folder: Path, warn: Warn) -> tuple[Evidence, Decision]:
    """A run's evidence, and its decision by its own plan. Writes nothing."""
    evidence = Evidence(store.read_plan(folder / "plan.json"), store.read(folder / "measurements.jsonl", warn))
    return evidence, decide(evidence, store.read_object(folder / "machine.json"))


def judge(folder: Path, warn: Warn, recipe: Recipe | None = None, beside: Sequence[Section] = ()) -> Decision:
    """Decide from a run folder's files alone, and write decision.json and the reports; by the thresholds of another
    recipe where one is given, and by that recipe alone where no run of peftopt's measured. The plan that judges is kept
    where it is not the run's own, so that reports show what was judged. `beside`: further sections of the reports."""
    told = []
    machine = {}
    if recipe and not (folder / "plan.json").exists() and (folder / "measurements.jsonl").exists():
        plan = planning.elsewhere(recipe)
    else:
        plan = store.read_plan(folder / "plan.json")
        machine = store.read_object(folder / "machine.json")
        if recipe:
            told = _differences(plan.recipe, recipe)
            plan = planning.rejudged(planning.completed(plan, plugins.catalogue()), recipe)
    if recipe:
        store.write(folder / JUDGED, json.dumps(asdict(plan), indent=1))
    else:
        (folder / JUDGED).unlink(missing_ok=True)
    evidence = Evidence(plan, store.read(folder / "measurements.jsonl", warn))
    decision = decide(evidence, machine)
    decision = replace(decision, warnings=(*told, *decision.warnings))
    if store.is_interrupted(folder):
        warning = "the run is not finished, and this is its result so far: the same `peftopt run` continues it"
        ahead = f"finish the run: peftopt run {Path(plan.recipe.path).name}" if decision.next_step else ""
        decision = replace(decision, warnings=(warning, *decision.warnings), next_step=ahead)
    store.write(folder / "decision.json", report.as_json.render(decision))
    _write_reports(folder, evidence, beside)
    return decision


def _differences(old: Recipe, new: Recipe) -> list[str]:
    """Warnings of differences between the recipe that judges and the recipe of the run."""
    lines = []
    if changed := planning.changes(old, new):
        lines.append(f"judged by thresholds that were changed after the run: {', '.join(changed)}")
    if kept := planning.kept(old, new):
        lines.append(f"the recipe has changed since; the run is judged as it was measured: {', '.join(kept)}")
    return lines


def run_of(results: Path, recipe: Recipe) -> Path | None:
    """The newest run of a results folder that the recipe can judge, whatever its own recipe's name; None without
    one."""
    for file in sorted((results / "runs").glob("*/plan.json"), reverse=True):
        with contextlib.suppress(BadInput):
            planning.rejudged(planning.completed(store.read_plan(file), plugins.catalogue()), recipe)
            return file.parent
    return None


@dataclass(frozen=True)
class Reported:
    """The inputs of the reports."""

    decision: Decision
    evidence: Evidence
    beside: Sequence[Section] = ()
    price: Price | None = None

    def part(self, name: str) -> str:
        """One part of the report, as Markdown."""
        return report.markdown.part(self.decision, self.evidence, name, self.beside, self.price)


def report_again(folder: Path, warn: Warn, beside: Sequence[Section] = (), price: Price | None = None) -> Reported:
    """Write the reports of the decision on disk again. With a `price`, or the recipe's, they have the price of tokens.
    Raises BadInput for a run without a decision."""
    if not (folder / "decision.json").exists():
        hint = f"decide from what it has measured so far: peftopt decide {folder}"
        raise BadInput(f"{folder} has no decision yet", hint)
    plan = store.read_plan(folder / (JUDGED if (folder / JUDGED).exists() else "plan.json"))
    return _write_reports(folder, Evidence(plan, store.read(folder / "measurements.jsonl", warn)), beside, price)


def _write_reports(folder: Path, evidence: Evidence, beside: Sequence[Section], price: Price | None = None) -> Reported:
    """Render every report from decision.json on disk, so that a later `report` writes the same bytes."""
    decision = report.as_json.decision_from_json(store.read_text(folder / "decision.json"))
    own = evidence.plan.recipe.price_per_hour
    price = price or (report.scorecard.price(own) if own else None)
    for name, text in report.reports(decision, evidence, beside, price).items():
        store.write(folder / name, text)
    return Reported(decision, evidence, beside, price)
