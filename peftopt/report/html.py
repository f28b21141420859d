"""The report as one HTML file that loads no other files: the decision, plots, the rules, the evidence."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from peftopt.decision.evidence import Evidence
from peftopt.records import Decision
from peftopt.report import answers, glossary, measured, parts, plots, production, scorecard, table, words
from peftopt.report.headline import headline
from peftopt.report.scorecard import Price
from peftopt.report.words import Section

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

OUTPUT = 600
DETAIL = 4_000


def render(decision: Decision, evidence: Evidence, beside: Sequence[Section] = (), price: Price | None = None) -> str:
    """The page, with further sections (`beside`), and the price of tokens if there is a price."""
    prompts = answers.prompts(decision, evidence)
    card = scorecard.scorecard(decision, price)
    return page(
        "report.html.j2",
        script=_script(),
        decision=decision,
        recipe=PurePath(decision.recipe).name or decision.recipe,
        headline=headline(decision),
        card=card,
        compared=parts.against(card.variant, decision.chosen is not None, card.baseline) if card else "",
        warnings=table.warnings(decision),
        notes=table.notes(decision),
        first=table.first(decision),
        figures=plots.figures(decision, evidence),
        rules={v.name: table.rule_rows(v) for v in decision.variants},
        prompts=prompts[: answers.EXAMPLES],
        further_prompts=max(len(prompts) - answers.EXAMPLES, 0),
        about_production=production.ABOUT,
        production=production.sections(decision, evidence),
        by_workload=table.by_workload(decision),
        more=table.more(decision),
        slices=answers.slices(decision, evidence),
        steps=answers.steps(decision, evidence),
        expected=measured.expected(decision, evidence),
        effort=words.filled(measured.effort(decision, evidence)),
        facts=measured.facts(decision, evidence),
        failures=measured.failures(evidence),
        how_to_read=glossary.HOW_TO_READ,
        terms=glossary.glossary(table.metrics(decision)),
        beside=beside,
    )


def page(template: str, **values: object) -> str:
    """A page from a template of this folder. Text from recipes, models and errors is escaped."""
    from markupsafe import Markup

    def shown(value: object) -> object:
        return value if isinstance(value, Markup) else words.clean(value)

    kit = {
        "alarming": production.BAD,
        "missing": words.MISSING,
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
    """The page's only script, and its hash: the page's security policy allows only a script with this hash."""

    text: Markup
    digest: str


def _script() -> Script:
    from markupsafe import Markup

    text = _environment().get_template("sort.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(Markup(text), digest)  # nosec B704 # our own script, with nothing of a run in it
