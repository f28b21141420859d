"""The report as one HTML file that loads nothing: the table, figures, the rules, the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from peftopt.decision.evidence import Evidence
from peftopt.records import Decision
from peftopt.report import answers, measured, plots, production, table, words
from peftopt.report.words import Section

OUTPUT = 600
DETAIL = 4_000


def render(decision: Decision, evidence: Evidence, beside: Sequence[Section] = ()) -> str:
    """The page, with sections of what else is known of the run."""
    return page(
        "report.html.j2",
        decision=decision,
        recipe=PurePath(decision.recipe).name or decision.recipe,
        warnings=table.warnings(decision),
        table=table.rows(decision),
        figures=plots.figures(decision, evidence),
        rules={v.name: table.rule_rows(v) for v in decision.variants},
        flips=answers.flips(decision, evidence),
        about_production=production.ABOUT,
        production=production.sections(decision, evidence),
        by_workload=table.by_workload(decision),
        further=table.further(decision),
        slices=answers.slices(decision, evidence),
        expected=measured.expected(decision, evidence),
        effort=measured.effort(decision, evidence),
        facts=measured.facts(decision, evidence),
        failures=measured.failures(evidence),
        how_to_read=table.HOW_TO_READ,
        beside=beside,
    )


def page(template: str, **values: object) -> str:
    """A page of a template of this folder. Text from recipes, models and errors is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: object) -> object:
        return value if isinstance(value, Markup) else words.clean(value)

    environment = Environment(
        loader=PackageLoader("peftopt.report", ""),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    kit = {
        "alarming": production.BAD,
        "missing": words.MISSING,
        "clip": lambda text: words.clip(text, OUTPUT),
        "detail": lambda text: words.clip(text, DETAIL),
        "slug": lambda outcome: outcome.replace(" ", "-"),
    }
    return environment.get_template(template).render({**kit, **values})
