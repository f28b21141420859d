"""A diagnosis as a page, in HTML and Markdown, and as a section of a run's report. Pure, except the template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from peftopt.diagnose import screen
from peftopt.diagnose.judging import ALPHA, FAMILY, LAUNCHES, LEVEL, LEVELS, LOOKS, level_text
from peftopt.diagnose.records import BOTTLENECKS, FREE, Diagnosis, Row
from peftopt.metrics import counted, format_value, percent
from peftopt.report import html, markdown
from peftopt.report.words import MISSING, Section, figure

HEADER = ["part", "phase", "batch", "finding", "costs", "of a request", "what to do", "gain measured", "detail"]

HOW_TO_READ = (
    "A row compares two ways of serving that differ in one thing, asked in turns in random order, block by block.",
    "costs: the ratio of times with it to times without it, with the interval that is judged: "
    f"{level_text(LEVELS[0])} at the first look, {level_text(LEVELS[1])} or more later. All of it above {FREE:g}x is a "
    "cost, all below is none; else it is undecided, and --more adds blocks.",
    f"Rows are judged after {LOOKS[0]} blocks at the earliest. All {FAMILY} comparisons together call something a cost "
    f"that is not one in {percent(ALPHA)} of diagnoses at most.",
    f"Where the two ways are two servers, a cost must be above {FREE * LAUNCHES:.2f}x: launches of one and the same "
    "server differ by some percent, and no number of blocks shows it.",
    "of a request: the part of such a request's time that it takes, which orders the rows.",
    "gain measured: the time after the advice over the time before, where it was tried here, with its "
    f"{percent(LEVEL)} interval.",
)


def pages(diagnosis: Diagnosis) -> Mapping[str, str]:
    """File name -> its text."""
    title = f"diagnosis of {', '.join(diagnosis.adapters)}"
    parts = sections(diagnosis)
    page = html.page(
        "sections.html.j2",
        title=title,
        outcome=outcome(diagnosis),
        found=found(diagnosis),
        sentence=sentence(diagnosis),
        sections=parts,
        facts=facts(diagnosis),
        notes=HOW_TO_READ,
    )
    told = [*(f"{key}: {text}" for key, text in facts(diagnosis)), *HOW_TO_READ]
    return {"diagnosis.html": page, "diagnosis.md": markdown.sections(title, sentence(diagnosis), told, parts)}


def section(diagnosis: Diagnosis) -> Section:
    """For the report of a run: the costs, and the undecided rows."""
    rows = [row for row in diagnosis.rows if row.finding in ("fault", "costs", "undecided")]
    cells = [[f"{row.bottleneck}: {row.part}", *_cells(row)[1:]] for row in rows]
    return Section("Where its time goes", sentence(diagnosis), (HEADER, cells))


def sections(diagnosis: Diagnosis) -> list[Section]:
    """A section for each bottleneck, its rows with the largest costs first."""
    parts = []
    for bottleneck, what in BOTTLENECKS.items():
        rows = [row for row in diagnosis.rows if row.bottleneck == bottleneck]
        if rows:
            parts.append(Section(f"{bottleneck}: {what}", _summary(rows), (HEADER, [_cells(row) for row in rows])))
    return parts


def outcome(diagnosis: Diagnosis) -> str:
    """The colour of a page's badge: that of the worst finding."""
    findings = {row.finding for row in diagnosis.rows}
    return next((colour for finding, colour in screen.OUTCOMES.items() if finding in findings), "not judged")


def found(diagnosis: Diagnosis) -> str:
    """The text of the badge: "3 costs found, 5 rows undecided"."""
    count = Counter(row.finding for row in diagnosis.rows)
    if not count.keys() - {"not asked"}:
        return "nothing measured"
    parts = [counted(count["fault"], "fault")] if count["fault"] else []
    parts.append(f"{counted(count['costs'], 'cost') if count['costs'] else 'no costs'} found")
    parts += [f"{counted(count['undecided'], 'row')} undecided"] if count["undecided"] else []
    return ", ".join(parts)


def sentence(diagnosis: Diagnosis) -> str:
    """The largest cost, or the fault."""
    faults = [row for row in diagnosis.rows if row.finding == "fault"]
    if faults:
        return faults[0].sentence
    costly = [row for row in diagnosis.rows if row.finding == "costs"]
    if costly:
        dearest = costly[0].sentence.partition("; ")[0]  # what explains it stands in its row
        return f"Of {counted(len(costly), 'cost')} the dearest is this. {dearest}"
    open_ = screen.undecided(diagnosis)
    if open_:
        return f"No cost is sure; {counted(len(open_), 'row')} undecided"
    judged = any(row.finding == "no cost" for row in diagnosis.rows)
    return "Nothing that was measured costs" if judged else "Nothing could be measured"


def facts(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """How it was measured."""
    return [
        ("base", diagnosis.base),
        ("adapters", ", ".join(diagnosis.adapters)),
        ("engine", f"{diagnosis.engine}, {counted(diagnosis.threads, 'thread')}"),
        ("a lone request", figure("latency.p50", diagnosis.usual_request_ms)),
        ("measured in", format_value("load_time", diagnosis.seconds)),
        *(("note", note) for note in diagnosis.notes),
    ]


def _summary(rows: Sequence[Row]) -> str:
    counts = {finding: sum(row.finding == finding for row in rows) for finding in screen.OUTCOMES}
    return ", ".join(f"{count} {finding}" for finding, count in counts.items() if count)


def _cells(row: Row) -> list[str]:
    """A row's cells: those of the screen, and its sentence."""
    part, *rest = screen.cells(row)
    detail = row.sentence if not row.why or row.why in row.sentence else f"{row.sentence}: {row.why}"
    return [part.partition(": ")[2], *(cell or MISSING for cell in rest), detail]
