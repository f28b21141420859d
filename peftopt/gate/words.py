"""A gate's answer as a Markdown summary, as JUnit, and as annotations in the forms of GitHub and GitLab."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

from peftopt import identity
from peftopt.gate.records import Case, Gate
from peftopt.records import Outcome
from peftopt.report import junit, markdown, words

HEADER = ["case", "outcome", "accepted", "now", "change", "limit", "why"]

TITLES: Mapping[Outcome, str] = {
    "accepted": "not worse",
    "rejected": "worse",
    "inconclusive": "undecided",
    "not judged": "nothing measured",
}

LEVELS: Mapping[Outcome, str] = {"rejected": "error", "inconclusive": "warning"}
"""Outcome -> the command of GitHub Actions that annotates it."""

SEVERITIES: Mapping[Outcome, str] = {"rejected": "critical", "inconclusive": "major"}
"""Outcome -> the severity of a code quality report."""

WORST_FIRST = ("rejected", "inconclusive", "not judged", "accepted")


def rows(gate: Gate) -> words.Table:
    """A row for each case, worst first."""
    ordered = sorted(gate.cases, key=lambda case: WORST_FIRST.index(case.outcome))
    return HEADER, [_row(case) for case in ordered]


def _row(case: Case) -> list[str]:
    unit = "critical_errors" if case.name.endswith("critical_errors") else case.unit
    ratio = case.change is not None
    return [
        case.name,
        case.outcome,
        words.figure(unit, case.accepted),
        words.figure(unit, case.now),
        words.figure("ratio", case.change),
        (f"{case.limit:.2f}x" if ratio else f"{100 * case.limit:g} %") if case.limit is not None else words.MISSING,
        case.reason,
    ]


def summary(gate: Gate) -> str:
    """The answer as Markdown, for a job's summary or a comment."""
    title = f"{markdown.MARKS[gate.outcome]} gate {gate.recipe}: {TITLES[gate.outcome]}"
    about = (
        "A figure passes where its whole interval stays within the limit, and fails where the whole interval misses it."
    )
    return markdown.sections(title, gate.sentence, gate.notes, [words.Section("Figures", about, rows(gate))])


def as_junit(gate: Gate) -> str:
    """A case for each rule: rejected is a failure, inconclusive an error, not judged skipped."""
    found = [(case.name, case.outcome, case.reason) for case in gate.cases]
    overall = ("gate", gate.outcome if gate.outcome != "not judged" else "inconclusive", gate.sentence)
    return junit.document(gate.recipe, [("gate", [overall, *found], junit.UNDECIDED)])


# ---- annotations ---------------------------------------------------------------------------------


def github(gate: Gate, file: str, line_of: Callable[[str], int]) -> Iterator[str]:
    """A workflow command for each case that does not pass, worst first: GitHub shows ten of a kind. `file` is the
    baseline's path in the repository, `line_of` says where in it a case is.
    Source: docs.github.com, "Workflow commands for GitHub Actions"; escaped as actions/toolkit does.
    """
    for level in LEVELS.values():
        for case in gate.cases:
            if LEVELS.get(case.outcome) != level:
                continue
            where = f"file={_property(file)},line={line_of(case.name)},title={_property(f'peftopt gate: {case.name}')}"
            yield f"::{level} {where}::{_data(f'{case.outcome}: {case.reason}')}"


def _data(text: str) -> str:
    return words.clean(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def code_quality(gate: Gate, file: str, line_of: Callable[[str], int]) -> str:
    """GitLab's code quality report, which a merge request shows beside the lines of the baseline. A fingerprint is of
    the case alone, so that GitLab knows it again.
    Source: docs.gitlab.com/ci/testing/code_quality, "Code Quality report format".
    """
    found = [
        {
            "description": words.clean(f"{case.name}: {case.reason}"),
            "check_name": f"peftopt.gate.{case.name}",
            "fingerprint": identity.of_value([gate.recipe, case.name]),
            "severity": SEVERITIES[case.outcome],
            "location": {"path": file, "lines": {"begin": line_of(case.name)}},
        }
        for case in gate.cases
        if case.outcome in SEVERITIES
    ]
    return json.dumps(found, indent=1) + "\n"
