"""Decision + Evidence -> the reports of a run. Pure, but for reading the HTML template.

A report shows what was judged: it reads the decision and the evidence behind it, and no measurement of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from peftopt.decision.evidence import Evidence
from peftopt.records import Decision
from peftopt.report import as_json, html, junit, load, markdown, table

__all__ = ["as_json", "html", "junit", "load", "markdown", "reports", "table"]


def reports(decision: Decision, evidence: Evidence) -> Mapping[str, str]:
    """File name -> its text, for every report that is rendered from decision.json."""
    return {
        "report.md": markdown.render(decision, evidence),
        "report.html": html.render(decision, evidence),
        "junit.xml": junit.render(decision),
    }
