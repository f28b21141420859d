"""How often a forecast is right: what is expected of every shipped recipe's variants, beside what runs measured.

    python benchmarks/forecast.py --runs results/runs --keep forecasts.jsonl

It times the first layers of each recipe's variants here (a minute a recipe), and takes what was measured from the
newest run of the recipe below `--runs`, else from its decision in results/example. With `--keep FILE` the forecasts are
kept there, and taken from there the next time.

Said is "slower" or "faster" where the interval is beyond 1.05x either way, measured where it is beyond 1. A hit says
what was measured; a false alarm says slower of what is not; a miss says nothing of what is measured as slower by more
than 1.05x. Where neither the run nor the forecast is sure, nothing is counted.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt import machine, plugins, report, store
from peftopt.cli.around import starters
from peftopt.decision import forecast as judging
from peftopt.decision.evidence import Evidence
from peftopt.measurements import Forecast, Measured, as_json, structured
from peftopt.records import Decision, Interval, Recipe
from peftopt.runner import forecast
from peftopt.runner.judged import read_recipe
from peftopt.runner.run import planned

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "results" / "example"


@dataclass(frozen=True)
class Row:
    """One variant on one workload against another: what was said of it and what was measured."""

    recipe: str
    variant: str
    workload: str
    forecast: Forecast
    measured: Interval | None
    source: str

    @property
    def said(self) -> str:
        """ "slower", "faster", or "" where the forecast is not sure."""
        told = Interval(self.forecast.ratio or 1.0, self.forecast.low or 0.0, self.forecast.high or math.inf, 0)
        return "slower" if judging.slower(told) else "faster" if judging.faster(told) else ""

    @property
    def outcome(self) -> str:
        """A hit, a false alarm, a miss, or that nothing is counted."""
        if self.measured is None:
            return "not measured"
        seen = "slower" if self.measured.low > 1 else "faster" if self.measured.high < 1 else ""
        if self.said and seen:
            return "hit" if self.said == seen else "false alarm" if self.said == "slower" else "wrongly faster"
        if self.said:
            return "run undecided"
        return "miss" if self.measured.low > judging.SURE else "nothing said"


def forecasts(
    recipe: Recipe, kept: Mapping[str, Sequence[Measured]]
) -> tuple[Sequence[Measured], float, dict[str, str]]:
    """What is expected of a recipe, the seconds that took, and of which variants nothing is."""
    if recipe.name in kept:
        return kept[recipe.name], 0.0, {}
    with tempfile.TemporaryDirectory() as home:  # what an earlier look kept would take no time
        outlook = forecast.outlook(recipe, planned(recipe).sources, Path(home))
    return outlook.forecasts, outlook.seconds or 0.0, dict(outlook.left_out)


def rows(recipe: Recipe, expected: Sequence[Measured], runs: Path | None) -> Iterator[Row]:
    """Each forecast of a speed beside its measured ratio."""
    evidence = _evidence(recipe, runs)
    example = EXAMPLES / ("." if recipe.name == "demo" else recipe.name) / "decision.json"
    decision = report.as_json.decision_from_json(example.read_text()) if example.is_file() else None
    for each in expected:
        told = each.values
        if not isinstance(told, Forecast) or told.kind != "speed":
            continue
        if evidence:
            seen = evidence.ratio(each.variant, told.against, each.workload, "request_duration_ms")
            yield Row(recipe.name, each.variant, each.workload, told, seen, "run")
        elif decision:
            seen = _quotient(decision, each.variant, told.against, each.workload)
            yield Row(recipe.name, each.variant, each.workload, told, seen, "example")


def _evidence(recipe: Recipe, runs: Path | None) -> Evidence | None:
    """Of the newest finished run of a recipe."""
    folders = sorted(runs.glob(f"*-{recipe.name}-????????")) if runs else []
    finished = [folder for folder in folders if (folder / "decision.json").is_file()]
    if not finished:
        return None
    plan = store.read_plan(finished[-1] / "plan.json")
    return Evidence(plan, store.read(finished[-1] / "measurements.jsonl", print))


def _quotient(decision: Decision, variant: str, other: str, workload: str) -> Interval | None:
    """A variant's ratio to another, of their ratios to the baseline: the bounds are those of the worst of both."""
    ratios = {v.name: v.figures.get(f"latency.ratio@{workload}") for v in decision.variants}
    ours = ratios.get(variant)
    theirs = Interval(1.0, 1.0, 1.0, 0) if other == decision.baseline else ratios.get(other)
    if not ours or not theirs:
        return None
    return Interval(ours.estimate / theirs.estimate, ours.low / theirs.high, ours.high / theirs.low, ours.n)


def _kept(file: Path | None) -> dict[str, list[Measured]]:
    by_recipe: dict[str, list[Measured]] = {}
    for line in file.read_text().splitlines() if file and file.is_file() else ():
        value = json.loads(line)
        told = structured(Forecast, value["forecast"], "forecast")
        by_recipe.setdefault(value["recipe"], []).append(Measured(told, value["variant"], value["workload"]))
    return by_recipe


def _keep(file: Path | None, recipe: str, expected: Sequence[Measured]) -> None:
    if not file:
        return
    with file.open("a") as out:
        for each in expected:
            assert isinstance(each.values, Forecast)
            line = {"recipe": recipe, "variant": each.variant, "workload": each.workload}
            out.write(json.dumps({**line, "forecast": as_json(each.values)}) + "\n")


def shown(interval: Interval | None) -> str:
    """ "1.20x (1.10–1.31)"."""
    return f"{interval.estimate:.2f}x ({interval.low:.2f}–{interval.high:.2f})" if interval else "—"


def main() -> None:
    """Print the table, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", help="names; all that come with peftopt by default")
    parser.add_argument("--runs", type=Path, help="a folder of finished runs")
    parser.add_argument("--keep", type=Path, help="a file to keep forecasts in")
    asked = parser.parse_args()
    forecast.DEADLINE_S = 3600.0  # a busy machine is no reason to say nothing
    kept = _kept(asked.keep)
    facts = machine.describe()
    print(f"{facts.get('cpu')}, {machine.cores()} cores, Python {platform.python_version()}, {facts['versions']}\n")
    print("| recipe | variant | against | workload | expected | measured | outcome |\n|---|---|---|---|---|---|---|")
    counts: Counter[str] = Counter()
    errors: list[float] = []
    others: list[str] = []
    for name in asked.recipes or starters():
        recipe, _ = read_recipe(ROOT / "recipes" / f"{name}.yaml")
        if any(variant.engine.plugin not in plugins.catalogue() for variant in recipe.variants.values()):
            continue
        expected, seconds, left_out = forecasts(recipe, kept)
        if seconds:
            _keep(asked.keep, name, expected)
        for row in rows(recipe, expected, asked.runs):
            counts[row.outcome] += 1
            if row.measured and row.forecast.ratio:
                errors.append(abs(math.log(row.measured.estimate / row.forecast.ratio)))
            told = judging.times(row.forecast)
            cells = (name, row.variant, row.forecast.against, row.workload, told, shown(row.measured), row.outcome)
            print(f"| {' | '.join(cells)} |", flush=True)
        spoken = {each.variant for each in expected}
        others += [f"{name}: {each}" for each in recipe.variants if each not in spoken and each != recipe.baseline]
        for each in expected:
            if isinstance(each.values, Forecast) and each.values.kind != "speed":
                others.append(f"{name}: {each.variant} on {each.workload}, {each.values.kind}: {each.values.reason}")
        print(f"<!-- {name}: {seconds:.0f} s {left_out or ''} -->")
    print("\n" + ", ".join(f"{what}: {n}" for what, n in counts.most_common()))
    if errors:
        middle, worst = math.exp(sorted(errors)[len(errors) // 2]), math.exp(max(errors))
        print(f"the median forecast is off by a factor of {middle:.2f}, the worst by {worst:.2f}")
    print("\nNo speed is said of:\n" + "\n".join(f"- {line}" for line in others))


if __name__ == "__main__":
    main()
