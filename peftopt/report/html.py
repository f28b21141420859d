"""The report as one HTML file that loads nothing: a forest plot, the table, the rules, the evidence."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from peftopt.decision.evidence import Evidence
from peftopt.records import Decision, Interval, VariantDecision
from peftopt.report import answers, glossary, measured, parts, production, scorecard, table, words
from peftopt.report.headline import headline
from peftopt.report.scorecard import Price
from peftopt.report.words import Section

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

OUTPUT = 600
DETAIL = 4_000
ROW = 66
"""Height of a plot's row in pixels: a line of text, the interval, the dots."""
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
NEAREST = 7.0
"""Per cent of the width below which two tick labels would touch on a phone."""


@dataclass(frozen=True)
class Dot:
    """A block's ratio in the plot: `x` in per cent of the width, `y` in pixels below the row's highest dots."""

    x: float
    y: float


@dataclass(frozen=True)
class PlotRow:
    """A variant in the plot; positions in per cent of the width, None where there is nothing to draw."""

    name: str
    outcome: str
    text: str
    top: int
    x: float
    low: float
    high: float
    limit: float | None
    limit_text: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Plot:
    """A forest plot of ratios to the baseline on a log scale."""

    workload: str
    clock: str
    height: int
    one: float
    ticks: tuple[tuple[float, str], ...]
    rows: tuple[PlotRow, ...]


def render(decision: Decision, evidence: Evidence, beside: Sequence[Section] = (), price: Price | None = None) -> str:
    """The page, with sections of what else is known of the run, and costs where there is a price."""
    plots = [plot(decision, evidence, workload) for workload in table.workloads(decision)]
    prompts = answers.prompts(decision, evidence)
    return page(
        "report.html.j2",
        script=_script(),
        decision=decision,
        recipe=PurePath(decision.recipe).name or decision.recipe,
        headline=headline(decision),
        card=scorecard.scorecard(decision, price),
        warnings=table.warnings(decision),
        notes=table.notes(decision),
        first=table.first(decision),
        figures=(),
        plots=[drawn for drawn in plots if drawn],
        rules={v.name: table.rule_rows(v) for v in decision.variants},
        prompts=prompts[: answers.EXAMPLES],
        further_prompts=max(len(prompts) - answers.EXAMPLES, 0),
        about_production=production.ABOUT,
        production=production.sections(decision, evidence),
        by_workload=table.by_workload(decision),
        more=table.more(decision),
        slices=answers.slices(decision, evidence),
        expected=measured.expected(decision, evidence),
        effort=words.filled(measured.effort(decision, evidence)),
        facts=measured.facts(decision, evidence),
        failures=measured.failures(evidence),
        how_to_read=glossary.HOW_TO_READ,
        terms=glossary.glossary(table.metrics(decision)),
        beside=beside,
    )


def page(template: str, **values: object) -> str:
    """A page of a template of this folder. Text from recipes, models and errors is escaped."""
    from markupsafe import Markup

    def shown(value: object) -> object:
        return value if isinstance(value, Markup) else words.clean(value)

    kit = {
        "alarming": production.BAD,
        "missing": words.MISSING,
        "row_height": ROW,
        "titles": parts.TITLES,
        "command": parts.command,
        "clip": lambda text: words.clip(text, OUTPUT),
        "detail": lambda text: words.clip(text, DETAIL),
        "slug": lambda outcome: outcome.replace(" ", "-"),
    }
    return _environment(finalize=shown).get_template(template).render({**kit, **values})


def _environment(finalize: Callable[[object], object] | None = None) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("peftopt.report", ""),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True)
class Script:
    """The page's only script, and its hash, without which the page's own policy would not let it run."""

    text: Markup
    digest: str


def _script() -> Script:
    from markupsafe import Markup

    text = _environment().get_template("sort.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(Markup(text), digest)


# ---- the forest plot ---------------------------------------------------------------------------


def plot(decision: Decision, evidence: Evidence, workload: str) -> Plot | None:
    """Ratio to the baseline by variant, with the raw block ratios beneath; None when there is no ratio."""
    name = table.ratio_name(decision, workload)
    ratios = [(variant, variant.figures.get(name)) for variant in decision.variants]
    drawn = [(variant, ratio) for variant, ratio in ratios if ratio and _positive(ratio.estimate)]
    if not drawn:
        return None
    blocks = measured.block_ratios(decision, evidence, workload)
    limits = {v.name: _limit(decision, v, workload) for v, _ in drawn}
    edges = [x for _, ratio in drawn for x in (ratio.estimate, ratio.low, ratio.high) if _positive(x)]
    central = sorted(x for v, _ in drawn for x in blocks.get(v.name, []) if _positive(x))
    central = central[len(central) // 20 : len(central) - len(central) // 20]
    scale = Scale.around([1.0, *edges, *central, *(x for x in limits.values() if x is not None)])

    def row(number: int, variant: VariantDecision, ratio: Interval) -> PlotRow:
        is_baseline = variant.name == decision.baseline
        limit = limits[variant.name]
        return PlotRow(
            name=f"{variant.name} (baseline)" if is_baseline else variant.name,
            outcome="baseline" if is_baseline else variant.outcome,
            text=words.speed(ratio, compact=True),
            top=number * ROW,
            x=scale.at(ratio.estimate),
            low=scale.at(ratio.low),
            high=scale.at(ratio.high),
            limit=None if limit is None else scale.at(limit),
            limit_text="" if limit is None else f"limit {limit:.2f}x",
            dots=_dots(scale, blocks.get(variant.name, [])),
        )

    rows = tuple(row(number, variant, ratio) for number, (variant, ratio) in enumerate(drawn))
    clock = "CPU time" if name.startswith("cpu") else "wall clock"
    return Plot(workload, clock, len(rows) * ROW, scale.at(1.0), scale.ticks(), rows)


@dataclass(frozen=True)
class Scale:
    """Log ratio -> per cent of the width, within 1 to 99 so that no mark is cut."""

    low: float
    high: float

    @classmethod
    def around(cls, ratios: Sequence[float]) -> Scale:
        """The scale on which all these ratios lie, with a margin at either side."""
        logs = [math.log(ratio) for ratio in ratios]
        margin = max((max(logs) - min(logs)) * 0.06, 0.02)
        return cls(min(logs) - margin, max(logs) + margin)

    def at(self, ratio: float) -> float:
        """Where a ratio lies; what lies beyond the edge is drawn at the edge."""
        if not ratio > 0:
            return 1.0
        share = (math.log(ratio) - self.low) / (self.high - self.low) if math.isfinite(ratio) else 1.0
        return round(1 + 98 * min(max(share, 0.0), 1.0), 2)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Labelled positions that leave each other room, 1 first."""
        kept: list[tuple[float, str]] = []
        for tick in sorted(TICKS, key=lambda t: abs(math.log(t))):
            x = self.at(tick)
            if self.low < math.log(tick) < self.high and all(abs(x - other) >= NEAREST for other, _ in kept):
                kept.append((x, f"{tick:g}x"))
        return tuple(sorted(kept))


def _limit(decision: Decision, variant: VariantDecision, workload: str) -> float | None:
    """The ratio a rule asks for, where the rule compares what the plot compares."""
    if workload != decision.minimize.partition("@")[2]:
        return None
    asked = [
        v.limit
        for v in variant.verdicts
        if v.rule.endswith((".gain", ".not_slower")) and v.against == decision.baseline and v.unit == "x"
    ]
    return next((limit for limit in asked if limit is not None and _positive(limit)), None)


def _dots(scale: Scale, ratios: Sequence[float]) -> tuple[Dot, ...]:
    """One dot per block, spread over three heights so that equal ratios stay apart."""
    return tuple(Dot(scale.at(ratio), 4.0 * (n % 3)) for n, ratio in enumerate(ratios))


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
