"""The report as GitHub Markdown, compact enough for a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from peftopt.decision.evidence import Evidence
from peftopt.records import Decision, Outcome, VariantDecision
from peftopt.report import answers, measured, production, table, words

MOST = 65_000
"""GitHub refuses comments of more than 65,536 characters."""
OUTPUT = 160
DETAIL = 300

MARKS: dict[Outcome, str] = {"accepted": "✅", "rejected": "❌", "inconclusive": "❔", "not judged": "➖"}

_MARKUP = re.compile(r"[&<>|`*\[\]\\~#$]|(?<!\w)[_@]|_(?!\w)|(?<=:)//|(?<=w)\.(?=\w)|\n\r?|\t")
_NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def render(decision: Decision, evidence: Evidence, beside: Sequence[words.Section] = ()) -> str:
    """As much of the report as a comment can hold: all of it, or without example answers, or the table alone."""
    head = _head(decision)
    shortened = "Shortened: the rest is in report.html."
    full, plain = ([*head, *_evidence(decision, evidence, examples, beside)] for examples in (answers.EXAMPLES, 0))
    texts = ["\n\n".join(filter(None, parts)) + "\n" for parts in (full, plain, [*head, shortened])]
    return next((text for text in texts if len(text) <= MOST), words.clip(texts[-1], MOST))


def sections(title: str, sentence: str, notes: Sequence[str], parts: Sequence[words.Section]) -> str:
    """A page of sections, without a decision."""
    told = "\n".join(f"- {escape(note)}" for note in notes)
    bodies = [f"### {escape(part.title)}\n\n{escape(part.about)}\n\n{_table(part.table)}" for part in parts]
    return "\n\n".join(filter(None, [f"## {escape(title)}", f"**{escape(sentence)}**", *bodies, told])) + "\n"


def _head(decision: Decision) -> list[str]:
    return [
        f"## {MARKS[decision.outcome]} {escape(decision.recipe)}: {decision.outcome}",
        f"**{escape(decision.sentence)}**" if decision.sentence else "",
        _warnings(decision),
        _table(table.rows(decision)),
    ]


def _evidence(decision: Decision, evidence: Evidence, examples: int, beside: Sequence[words.Section]) -> list[str]:
    flips = answers.flips(decision, evidence, examples)
    return [
        *(_variant(decision, variant, flips[variant.name]) for variant in decision.variants),
        _section("In production", _production(decision, evidence)),
        *(_section(part.title, f"{escape(part.about)}\n\n{_table(part.table)}") for part in beside),
        _section("By workload", _table(table.by_workload(decision))),
        _section("More figures", _table(table.further(decision))),
        _section("Right answers by slice", _table(answers.slices(decision, evidence))),
        _section("Expected and measured", _table(measured.expected(decision, evidence), DETAIL)),
        _section("How it was measured", _method(decision, evidence)),
        _heading("Failures", _table(measured.failures(evidence), DETAIL)),
        _section("How to read this", "\n".join(f"- {escape(line)}" for line in table.HOW_TO_READ)),
    ]


def escape(text: object) -> str:
    """Text that shows as it is: no markup, no mention, no link, on one line."""
    return _MARKUP.sub(lambda match: "".join(map(_entity, match[0])), words.clean(text))


def _entity(character: str) -> str:
    return " " if character.isspace() else _NAMED.get(character, f"&#{ord(character)};")


def _warnings(decision: Decision) -> str:
    lines = [f"> - {escape(line)}" for line in table.warnings(decision)]
    return "\n".join(["> [!WARNING]", *lines]) if lines else ""


def _variant(decision: Decision, variant: VariantDecision, flips: Sequence[answers.Flip]) -> str:
    chain = " → ".join(variant.techniques)
    title = f"{MARKS[variant.outcome]} <b>{escape(variant.name)}</b>{f' ({escape(chain)})' if chain else ''}"
    decided = f": {variant.outcome} by {escape(variant.decided_by)}" if variant.decided_by else ""
    header = ["prompt", "change", "expected", decision.baseline, variant.name]
    body = [[f.row, f.change, f.expected, f.before, f.after] for f in flips]
    lines = "\n".join(f"- {escape(line)}" for line in (*variant.certificates, *variant.remarks))
    parts = [_table(table.rule_rows(variant)), lines, _code_table(header, body)]
    return _section(title + decided, "\n\n".join(filter(None, parts)), titled=True)


def _production(decision: Decision, evidence: Evidence) -> str:
    parts = []
    for each in production.sections(decision, evidence):
        facts = "\n".join(f"- {escape(label)}: {escape(text)}" for label, text in each.facts)
        parts += [f"**{escape(each.variant)}**", facts, _table(each.table)]
    return "\n\n".join(filter(None, [escape(production.ABOUT), *parts])) if parts else ""


def _method(decision: Decision, evidence: Evidence) -> str:
    facts = "\n".join(f"- {escape(key)}: {escape(text)}" for key, text in measured.facts(decision, evidence))
    return f"{_table(measured.effort(decision, evidence))}\n\n{facts}"


def _section(title: str, body: str, titled: bool = False) -> str:
    shown = title if titled else escape(title)
    return f"<details><summary>{shown}</summary>\n\n{body}\n\n</details>" if body else ""


def _heading(title: str, body: str) -> str:
    return f"### {title}\n\n{body}" if body else ""


def _table(cells: words.Table, most: int = MOST) -> str:
    header, body = cells
    return _lines(header, ([escape(words.clip(cell, most)) for cell in row] for row in body)) if body else ""


def _code_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """As a table of raw text: inside <code> GitHub links nothing."""
    cells = ([f"<code>{escape(words.clip(c, OUTPUT))}</code>" if c else "" for c in row] for row in body)
    return _lines(header, cells) if body else ""


def _lines(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A pipe table. The cells of `body` are Markdown already, those of `header` are not."""
    rows = [list(map(escape, header)), ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
