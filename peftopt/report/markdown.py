"""The report as GitHub Markdown, compact enough for a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from peftopt.decision.evidence import Evidence
from peftopt.records import Decision, Outcome, VariantDecision
from peftopt.report import answers, glossary, measured, parts, production, scorecard, table, words
from peftopt.report.headline import headline
from peftopt.report.scorecard import Price, Scorecard

MOST = 65_000
"""GitHub refuses comments of more than 65,536 characters."""
OUTPUT = 160
DETAIL = 300

MARKS: dict[Outcome, str] = {"accepted": "✅", "rejected": "❌", "inconclusive": "❔", "not judged": "➖"}

_MARKUP = re.compile(r"[&<>|`*\[\]\\~#$]|(?<!\w)[_@]|_(?!\w)|(?<=:)//|(?<=w)\.(?=\w)|\n\r?|\t")
_NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_OPEN = ("scorecard", "variants", "failures")
"""Parts that are not folded."""


def render(
    decision: Decision, evidence: Evidence, beside: Sequence[words.Section] = (), price: Price | None = None
) -> str:
    """As much of the report as a comment can hold: all of it, or without example answers, or the table alone."""
    head = _head(decision)
    bodies = _bodies(decision, evidence, beside, price)
    full = _pages(bodies)
    plain = _pages({name: body for name, body in bodies.items() if name != "answers"})
    least = [*_pages({name: bodies[name] for name in ("scorecard", "variants")}), _SHORTENED]
    texts = ["\n\n".join(filter(None, [*head, *pages])) + "\n" for pages in (full, [*plain, _SHORTENED], least)]
    return next((text for text in texts if len(text) <= MOST), words.clip(texts[-1], MOST))


_SHORTENED = "Shortened: the rest is in report.html."


def part(
    decision: Decision,
    evidence: Evidence,
    name: str,
    beside: Sequence[words.Section] = (),
    price: Price | None = None,
) -> str:
    """One part of the report, by its name in `parts.TITLES`, under its heading; the heading says where it is empty."""
    body = _bodies(decision, evidence, beside, price)[name]
    return f"### {parts.TITLES[name]}\n\n{body or 'Nothing in this run.'}\n"


def sections(title: str, sentence: str, notes: Sequence[str], shown: Sequence[words.Section]) -> str:
    """A page of sections, without a decision."""
    told = _list(notes)
    bodies = [f"### {escape(part.title)}\n\n{escape(part.about)}\n\n{_table(part.table)}" for part in shown]
    return "\n\n".join(filter(None, [f"## {escape(title)}", f"**{escape(sentence)}**", *bodies, told])) + "\n"


def _head(decision: Decision) -> list[str]:
    return [
        f"## {MARKS[decision.outcome]} {escape(decision.recipe)}: {decision.outcome}",
        f"**{escape(headline(decision))}**",
        escape(decision.sentence),
        _warnings(decision),
    ]


def _bodies(
    decision: Decision, evidence: Evidence, beside: Sequence[words.Section], price: Price | None
) -> Mapping[str, str]:
    """The text of each part by its name, "" for an empty part."""
    card = scorecard.scorecard(decision, price)
    more = table.more(decision)
    return {
        "scorecard": _card(decision, card) if card else "",
        "variants": _table(table.rows(decision)),
        "notes": _list(table.notes(decision)),
        "rules": "\n\n".join(_variant(variant) for variant in decision.variants),
        "answers": _answers(decision, evidence),
        "slices": _table(answers.slices(decision, evidence)),
        "steps": _table(answers.steps(decision, evidence)),
        "production": _production(decision, evidence),
        "beside": "\n\n".join(f"**{escape(p.title)}**\n\n{escape(p.about)}\n\n{_table(p.table)}" for p in beside),
        "workloads": _table(table.by_workload(decision)),
        "more": "\n\n".join(f"**{title}**\n\n{_table(sheet.table)}" for title, sheet in more.items()),
        "expected": _table(measured.expected(decision, evidence), DETAIL),
        "method": _method(decision, evidence),
        "failures": _table(measured.failures(evidence), DETAIL),
        "words": _words(decision),
    }


def _pages(bodies: Mapping[str, str]) -> list[str]:
    """The parts under their headings, most of them folded. Rules are folded by variant."""
    shown = []
    for name, body in bodies.items():
        title = parts.TITLES[name]
        if name == "rules":
            shown.append(body)
        elif name in _OPEN:
            shown.append(_heading(title, body))
        else:
            shown.append(_section(title, body))
    return shown


def escape(text: object) -> str:
    """Text that shows as it is: no markup, no mention, no link, on one line."""
    return _MARKUP.sub(lambda match: "".join(map(_entity, match[0])), words.clean(text))


def _entity(character: str) -> str:
    return " " if character.isspace() else _NAMED.get(character, f"&#{ord(character)};")


def _warnings(decision: Decision) -> str:
    lines = [f"> - {escape(line)}" for line in table.warnings(decision)]
    return "\n".join(["> [!WARNING]", *lines]) if lines else ""


def _card(decision: Decision, card: Scorecard) -> str:
    whose = parts.against(card.variant, decision.chosen is not None, card.baseline)
    return f"{escape(whose)}\n\n{_table(scorecard.rows(card))}"


def _variant(variant: VariantDecision) -> str:
    chain = " → ".join(variant.techniques)
    title = f"{MARKS[variant.outcome]} <b>{escape(variant.name)}</b>{f' ({escape(chain)})' if chain else ''}"
    decided = f": {variant.outcome} by {escape(variant.decided_by)}" if variant.decided_by else ""
    lines = _list((*variant.certificates, *variant.remarks))
    body = "\n\n".join(filter(None, [_table(table.rule_rows(variant)), lines]))
    return _section(title + decided, body, titled=True)


def _answers(decision: Decision, evidence: Evidence) -> str:
    """A row for each answer to each prompt, the same prompt once for all variants that answer it alike."""
    prompts = answers.prompts(decision, evidence)
    header = ["prompt", "change", "variants", "expected", decision.baseline, "their answer"]
    body = [
        [prompt.row, each.change, ", ".join(each.variants), prompt.expected, prompt.before, each.after]
        for prompt in prompts[: answers.EXAMPLES]
        for each in prompt.changed
    ]
    rest = len(prompts) - answers.EXAMPLES
    more = f"\n\nAnd {rest} more prompts." if rest > 0 else ""
    return f"{_code_table(header, body)}{more}" if body else ""


def _production(decision: Decision, evidence: Evidence) -> str:
    shown = []
    for each in production.sections(decision, evidence):
        facts = _list(f"{label}: {text}" for label, text in each.facts)
        shown += [f"**{escape(each.variant)}**", facts, _table(each.table)]
    return "\n\n".join(filter(None, [escape(production.ABOUT), *shown])) if shown else ""


def _method(decision: Decision, evidence: Evidence) -> str:
    facts = _list(f"{key}: {text}" for key, text in measured.facts(decision, evidence))
    return f"{_table(measured.effort(decision, evidence))}\n\n{facts}"


def _words(decision: Decision) -> str:
    terms = [f"{term}: {meaning}" for term, meaning in glossary.glossary(table.metrics(decision))]
    names = f"One part again: {parts.command('NAME')}. RUN is the run's folder, NAME one of {', '.join(parts.TITLES)}."
    return _list([*glossary.HOW_TO_READ, *terms, names])


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


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
