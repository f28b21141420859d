"""The decision as JUnit XML: a suite per variant, a case per verdict. A build fails where nothing is shipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.etree import ElementTree

from peftopt.records import Decision, Outcome, VariantDecision
from peftopt.report import words

Case = tuple[str, Outcome, str]

Tags = Mapping[Outcome, str]
"""The element for each outcome; a case without an element has passed."""

Suite = tuple[str, Sequence[Case], Tags]
"""A name, its cases, and how their outcomes are told."""

UNDECIDED: Tags = {"rejected": "failure", "inconclusive": "error", "not judged": "skipped"}
TURNED_DOWN: Tags = dict.fromkeys(UNDECIDED, "skipped")
COUNTED = {"failures": "failure", "errors": "error", "skipped": "skipped"}


def render(decision: Decision) -> str:
    """If a variant is shipped, rejected variants are skipped, with the reason: the build passes. Otherwise, rejected is
    a failure, inconclusive an error, and not judged is skipped; a run without any decision is an error."""
    undecided: Outcome = "inconclusive" if decision.outcome == "not judged" else decision.outcome
    suites: list[Suite] = [("decision", [("decision", undecided, decision.sentence)], UNDECIDED)]
    tags = TURNED_DOWN if decision.outcome == "accepted" else UNDECIDED
    for variant in decision.variants:
        cases = list(_cases(variant, variant.name == decision.baseline))
        if cases:
            suites.append((variant.name, cases, tags))
    return document(decision.recipe, suites)


def document(recipe: str, parts: Sequence[Suite]) -> str:
    """The suites of one recipe as a file."""
    suites = ElementTree.Element("testsuites", name="peftopt")
    for name, cases, tags in parts:
        _suite(suites, recipe, name, cases, tags)
    for count in ("tests", *COUNTED):
        suites.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    ElementTree.indent(suites)
    text = ElementTree.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _cases(variant: VariantDecision, baseline: bool) -> Iterator[Case]:
    """The verdicts, and the variant's outcome where none of them decided it (nothing judged, A/A failed)."""
    for verdict in variant.verdicts:
        yield verdict.rule, verdict.outcome, words.reason(verdict)
    if all(verdict.rule != variant.decided_by for verdict in variant.verdicts) and not baseline:
        yield variant.decided_by or "outcome", variant.outcome, "; ".join(variant.notes) or "see the warnings"


def _suite(suites: ElementTree.Element, recipe: str, name: str, cases: Sequence[Case], tags: Tags) -> None:
    suite = ElementTree.SubElement(suites, "testsuite", name=words.clean(name), tests=str(len(cases)))
    for count, counted in COUNTED.items():
        suite.set(count, str(sum(tags.get(outcome) == counted for _, outcome, _ in cases)))
    for rule, outcome, reason in cases:
        names = {"classname": words.clean(f"{recipe}.{name}"), "name": words.clean(rule)}
        case = ElementTree.SubElement(suite, "testcase", names)
        tag = tags.get(outcome)
        if tag:
            message = words.clean(f"{outcome}: {reason}")
            # GitHub's readers show the attribute, GitLab the content
            ElementTree.SubElement(case, tag, message=message, type=outcome).text = message
        else:
            ElementTree.SubElement(case, "system-out").text = words.clean(reason)
