"""Decision + Measurements -> the reports of a run. Pure, but for reading the HTML template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peftopt.records import Decision, Measurement
from peftopt.report import as_json, html, junit, load, markdown, table

__all__ = ["as_json", "html", "junit", "load", "markdown", "reports", "table"]


def reports(decision: Decision, measurements: Sequence[Measurement]) -> Mapping[str, str]:
    """File name -> its text, for every report that is rendered from decision.json."""
    writers = {"report.md": markdown.render, "report.html": html.render, "junit.xml": junit.render}
    return {name: write(decision, measurements) for name, write in writers.items()}
