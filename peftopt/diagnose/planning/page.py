"""An evaluated plan as a page, in HTML and Markdown, and as a section of a run's report. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peftopt.diagnose.planning import words
from peftopt.diagnose.planning.breakeven import Breakeven
from peftopt.diagnose.planning.plan import Evaluated
from peftopt.errors import BROKEN
from peftopt.metrics import counted
from peftopt.records import Json
from peftopt.report import html, markdown
from peftopt.report.words import MISSING, Section

TITLE = "Merge or keep apart"


def pages(evaluated: Evaluated, breakevens: Sequence[Breakeven]) -> Mapping[str, str]:
    """File name -> its text."""
    said = words.sentences(evaluated, breakevens)
    sentence = said.pop("recommended")
    facts = [*said.items(), *(("note", note) for note in evaluated.traffic.notes)]
    table = [[cell or MISSING for cell in row] for row in words.rows(evaluated)]
    about = f"{counted(evaluated.draws, 'draw')} of {counted(evaluated.requests, 'request')} each"
    parts = [Section("Options", about, (list(words.HEADER), table))]
    outcome = "accepted" if evaluated.sure else "inconclusive" if evaluated.best else "rejected"
    page = html.page(
        "sections.html.j2",
        title=TITLE,
        outcome=outcome,
        found=outcome,
        sentence=sentence,
        sections=parts,
        facts=facts,
        notes=words.HOW_TO_READ,
    )
    told = [*(f"{key}: {text}" for key, text in facts), *words.HOW_TO_READ]
    return {"plan.html": page, "plan.md": markdown.sections(TITLE, sentence, told, parts)}


def section(values: Mapping[str, Json]) -> Section | None:
    """For the report of a run: the result in a plan.json; None for a broken one."""
    try:
        table = values["table"]
        rows = [[str(cell) or MISSING for cell in row] for row in table["rows"]]
        return Section(TITLE, str(values["what_to_do"]), ([str(cell) for cell in table["header"]], rows))
    except BROKEN:
        return None
