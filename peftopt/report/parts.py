"""The parts of a report by name: what `peftopt report --only` prints, and the command under each table. Pure."""

from __future__ import annotations

TITLES = {
    "scorecard": "Against the baseline",
    "variants": "Variants",
    "notes": "Notes",
    "rules": "Rules",
    "answers": "Answers that changed",
    "slices": "Right answers by slice",
    "steps": "Tokens a step by slice",
    "production": "In production",
    "beside": "Beside the decision",
    "workloads": "By workload",
    "more": "More metrics",
    "expected": "Expected and measured",
    "method": "How it was measured",
    "failures": "Failures",
    "words": "How to read this report",
}
"""Name -> heading, in the order of the report."""


def against(variant: str, chosen: bool, baseline: str) -> str:
    """Whose values the scorecard has: "int8 (chosen) against adapter (baseline)"."""
    what = "chosen" if chosen else "not chosen"
    return f"{variant} ({what}) against {baseline} (baseline)"


def command(name: str) -> str:
    """The command that prints this part again; RUN stands for the run's folder."""
    return f"peftopt report RUN --only {name}"
