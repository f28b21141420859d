"""Decision + Measurements -> the four reports of a run. Pure, but for reading the HTML template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peftopt.records import Decision, Measurement
from peftopt.render import as_json, html, junit, markdown

REPORTS: Mapping[str, Callable[[Decision, Sequence[Measurement]], str]] = {
    "decision.json": as_json.render,
    "report.md": markdown.render,
    "report.html": html.render,
    "junit.xml": junit.render,
}
"""File name -> what writes it."""
