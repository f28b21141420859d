"""Decision + Evidence -> the reports of a run. Pure, but for reading the HTML template.

A report shows what was judged: it reads the decision and the evidence behind it, and no measurement of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peftopt.decision.evidence import Evidence
from peftopt.records import Decision
from peftopt.report import as_json, headline, html, junit, load, markdown, parts, scorecard, table
from peftopt.report.scorecard import Price
from peftopt.report.words import Section

__all__ = ["as_json", "headline", "html", "junit", "load", "markdown", "parts", "reports", "scorecard", "table"]


def reports(
    decision: Decision,
    evidence: Evidence,
    beside: Sequence[Section] = (),
    price: Price | None = None,
) -> Mapping[str, str]:
    """File name -> text, for each report of decision.json. `beside`: further sections. `price`: the machine's, for the
    price of tokens."""
    return {
        "report.md": markdown.render(decision, evidence, beside, price),
        "report.html": html.render(decision, evidence, beside, price),
        "junit.xml": junit.render(decision),
    }
