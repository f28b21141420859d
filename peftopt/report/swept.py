"""The results of a sweep: the state of each cell, which variant wins in which cells, its price, what is open. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from peftopt.decision.duration import NOTHING, Span, total
from peftopt.decision.duration import words as length
from peftopt.errors import ACCEPTED, BAD_INPUT, BUG, ENVIRONMENT, EXIT, INCONCLUSIVE, REJECTED
from peftopt.metrics import counted, format_value
from peftopt.recipe.grid import Cell
from peftopt.records import Decision, Interval, JsonValue, VariantDecision
from peftopt.report import html, scorecard, words
from peftopt.report.headline import named
from peftopt.report.table import busiest, speed_of
from peftopt.report.words import MISSING, Section, Table

State = Literal["decided", "failed", "running", "unfinished", "waiting"]
"""decided: has a decision that judged something. failed: the last command ended without a decision. unfinished:
interrupted, and can continue. waiting: not measured yet."""

WORST = (BUG, ENVIRONMENT, BAD_INPUT, INCONCLUSIVE, REJECTED, ACCEPTED)
"""Exit codes from worst to best: a sweep ends with the worst one of its cells."""

OUTCOME = {BUG: "not judged", ENVIRONMENT: "not judged", BAD_INPUT: "not judged", INCONCLUSIVE: "inconclusive"}
"""The badge of a sweep, by its exit code."""


@dataclass(frozen=True)
class CellResult:
    """The state of a cell. `run`: the name of its run's folder, "" without one. `why` and `hint`: those of a failure.
    `seconds`: the time of its commands so far. `host`: the machine of the last command."""

    cell: Cell
    state: State
    decision: Decision | None = None
    run: str = ""
    why: str = ""
    hint: str = ""
    exit_code: int = INCONCLUSIVE
    seconds: float = 0.0
    host: str = ""

    def decided(self, decision: Decision) -> CellResult:
        """The same result with a decision."""
        return replace(self, state="decided", decision=decision, exit_code=EXIT[decision.outcome])

    def failed(self, exit_code: int, why: str, hint: str = "", decision: Decision | None = None) -> CellResult:
        """The same result with a failure and its reason, and with the decision if it judged nothing."""
        return replace(self, state="failed", exit_code=exit_code, why=why, hint=hint, decision=decision)

    def standing(self, state: State, why: str = "") -> CellResult:
        """The same result in a state that is neither decided nor failed."""
        return replace(self, state=state, why=why)

    @property
    def outcome(self) -> str:
        """The decision's outcome, else the state."""
        return self.decision.outcome if self.decision and self.state == "decided" else self.state

    @property
    def chosen(self) -> VariantDecision | None:
        """The variant that the cell's decision ships; None where it ships none."""
        return named(self.decision, self.decision.chosen) if self.decision else None

    @property
    def speed(self) -> Interval | None:
        """The chosen variant's ratio of times to the baseline's."""
        return _speed(self.decision, self.chosen) if self.decision and self.chosen else None

    @property
    def shipped(self) -> VariantDecision | None:
        """The variant to serve: the chosen one, or the baseline if nothing may replace it."""
        if self.decision is None or self.outcome not in ("accepted", "rejected"):
            return None
        return self.chosen or named(self.decision, self.decision.baseline)


def worst(results: Iterable[CellResult]) -> int:
    """The exit code of all cells together."""
    codes = {result.exit_code for result in results}
    return next((code for code in WORST if code in codes), ACCEPTED)


def left(results: Iterable[CellResult]) -> list[CellResult]:
    """The cells that a sweep would measure now."""
    return [result for result in results if result.state not in ("decided", "running")]


def undecided(results: Iterable[CellResult]) -> list[CellResult]:
    """The cells that were measured and whose decision is open: more blocks may decide them."""
    return [result for result in results if result.outcome == "inconclusive"]


# ---- in words ----------------------------------------------------------------------------------


def sentence(results: Sequence[CellResult]) -> str:
    """How many cells are decided, and their decisions."""
    decided = Counter(result.outcome for result in results if result.state == "decided")
    texts = {
        "accepted": "{} to ship another variant",
        "rejected": "{} to keep the adapter as it is",
        "inconclusive": "{} not settled",
    }
    outcomes = ", ".join(text.format(decided[name]) for name, text in texts.items() if decided[name])
    states = Counter(result.state for result in results if result.state != "decided")
    others = "".join(f"; {number} {state}" for state, number in sorted(states.items()))
    of = f"{sum(decided.values())} of {counted(len(results), 'cell')} decided"
    return f"{of}: {outcomes}{others}." if outcomes else f"{of}{others}."


def size(cells: Sequence[Cell]) -> str:
    """The size of a sweep: "24 cells: 2 models, 6 adapters, 2 classes of machines"."""
    models = len({cell.model for cell in cells})
    adapters = len({(cell.model, cell.adapter) for cell in cells})
    groups = len({cell.group for cell in cells})
    classes = len({cell.machine.name for cell in cells})
    more = [counted(groups, "group") + " of variants"] if groups > 1 else []
    more += [counted(classes, "class", "classes") + " of machines"] if classes > 1 else []
    parts = [counted(models, "model"), counted(adapters, "adapter"), *more]
    return f"{counted(len(cells), 'cell')}: {', '.join(parts)}"


def takes(
    results: Sequence[CellResult], machines: Mapping[str, int], forecasts: Mapping[str, Span] | None = None
) -> Span | None:
    """Seconds until all cells with machines are decided, from the times of decided cells of the same class; without
    any, from `forecasts` (seconds by the cell's name), else from the times of all decided cells. `machines`: how many
    machines each class has. None if that is not known of a class, or if no cell is left."""
    spans = []
    for name, number in machines.items():
        still = [result for result in left(results) if result.cell.machine.name == name]
        if number and still:
            spans.append(_whole(still, results, number, forecasts or {}))
    known = [span for span in spans if span]
    if not spans or len(known) < len(spans):
        return None
    return Span(max(span.least for span in known), max(span.most for span in known))


def _whole(
    still: Sequence[CellResult], results: Sequence[CellResult], number: int, forecasts: Mapping[str, Span]
) -> Span | None:
    """Seconds that cells of one class take on a `number` of machines, each of which takes the next one when it is
    free; None where that is not known."""
    foreseen = [forecasts[result.cell.name] for result in still if result.cell.name in forecasts]
    times = times_of(results, still[0].cell.machine.name)
    if not times and len(foreseen) == len(still):
        together = total(foreseen) * (1 / number)
        longest = max(span.most for span in foreseen)
        return Span(max(together.least, *(span.least for span in foreseen)), together.most + longest * (1 - 1 / number))
    times = times or times_of(results)
    return Span(min(times), max(times)) * -(-len(still) // number) if times else None


def times_of(results: Iterable[CellResult], machine: str = "") -> list[float]:
    """Seconds that each decided cell of a class of machines took; of all classes by default."""
    decided = [each for each in results if each.state == "decided" and each.seconds > 0]
    return [each.seconds for each in decided if machine in ("", each.cell.machine.name)]


def spent(results: Iterable[CellResult]) -> str:
    """How long all commands took so far, in words."""
    whole = total(Span(result.seconds, result.seconds) for result in results)
    return length(whole) if whole != NOTHING else ""


# ---- tables ------------------------------------------------------------------------------------


def cells(results: Sequence[CellResult]) -> Table:
    """A row for each cell: the variant it ships, with its speed, its size and its price."""
    header = ["model", "adapter", "variants", "machine", "outcome", "ships", "speed", "size", "cost of 1M tokens"]
    rows = [
        [
            result.cell.model,
            result.cell.adapter,
            result.cell.group,
            result.cell.machine.name,
            result.outcome,
            result.shipped.name if result.shipped else MISSING,
            words.speed(result.speed, compact=True),
            words.estimate("size", result.shipped.figures.get("size") if result.shipped else None),
            _cost(result),
        ]
        for result in results
    ]
    alone = [len({row[column] for row in rows}) < 2 for column in (2, 3)]
    kept = [n for n in range(len(header)) if not (n in (2, 3) and alone[n - 2])]
    return words.filled(([header[n] for n in kept], [[row[n] for n in kept] for row in rows]))


def _cost(result: CellResult) -> str:
    if not result.cell.price or result.shipped is None or result.decision is None:
        return MISSING
    price = scorecard.price(result.cell.price)
    cost = scorecard.million(result.shipped, busiest(result.decision), price)
    return MISSING if cost is None else scorecard.money(cost, price.currency)


def winners(results: Sequence[CellResult]) -> Table:
    """A row for each variant on each class of machines: in how many cells it is chosen, accepted, rejected, open."""
    header = ["variant", "machine", "cells", "chosen", "accepted", "rejected", "open", "speed"]
    judged: dict[tuple[str, str], list[tuple[CellResult, VariantDecision]]] = {}
    for result in results:
        for variant in result.decision.variants if result.decision else ():
            if result.decision and variant.name != result.decision.baseline:
                judged.setdefault((variant.name, result.cell.machine.name), []).append((result, variant))
    rows = []
    for (name, machine), pairs in sorted(judged.items()):
        outcomes = Counter(variant.outcome for _, variant in pairs)
        chosen = sum(result.chosen is variant for result, variant in pairs)
        still = outcomes["inconclusive"] + outcomes["not judged"]
        counts = (len(pairs), chosen, outcomes["accepted"], outcomes["rejected"], still)
        rows.append([name, machine, *map(str, counts), _range(pairs)])
    return header, rows


def _range(pairs: Iterable[tuple[CellResult, VariantDecision]]) -> str:
    """The lowest and the highest ratio of times to the baseline's."""
    speeds = [_speed(result.decision, variant) for result, variant in pairs if result.decision]
    known = sorted(speed.estimate for speed in speeds if speed)
    if not known:
        return MISSING
    low, high = (format_value("ratio", value) for value in (known[0], known[-1]))
    return low if low == high else f"{low} to {high}"


def _speed(decision: Decision, variant: VariantDecision) -> Interval | None:
    return speed_of(decision, variant, decision.minimize.partition("@")[2])


def still_open(results: Sequence[CellResult]) -> Table:
    """A row for each started cell without a decision to ship or to keep: the reason, and what to do."""
    rows = []
    for result in results:
        if result.outcome in ("accepted", "rejected", "waiting"):
            continue
        decision = result.decision if result.state == "decided" else None
        reason = decision.sentence if decision else result.why
        what = decision.next_step if decision else result.hint
        if result.state == "unfinished":
            what = "the same sweep continues it"
        rows.append([result.cell.name, result.outcome, reason or MISSING, what or MISSING])
    return ["cell", "outcome", "reason", "what to do"], rows


# ---- as a page and as data ---------------------------------------------------------------------

HOW_TO_READ = (
    "A cell is one recipe on one class of machines: a run of its own, whose own report has the rest.",
    "ships: what the cell's decision says to serve; the baseline where nothing may replace it.",
    "speed: the ratio of times to the baseline's on what the recipe minimizes, with its interval; below 1x is faster. "
    "Every ratio is of one cell: cells are never pooled, and each cell's error is its own.",
    "cost of 1M tokens: a million output tokens on a machine that is never idle, at the price of its class.",
)


def page(title: str, results: Sequence[CellResult], runs: str = "") -> str:
    """The sweep as one page that loads nothing. `runs`: the folder of runs, from where the page lies; each decided cell
    links to its run's own report there."""
    links = [f"{runs}/{result.run}/report.html" if runs and result.decision else "" for result in results]
    parts = [
        Section("Cells", "what each cell decided; its model leads to the cell's own report", cells(results), links),
        Section("Which variant wins where", "of the cells that have a decision", winners(results)),
        Section("Not decided", "what failed, what is open, and what to do", still_open(results)),
    ]
    hosts = ", ".join(sorted({result.host for result in results if result.host}))
    facts = {"cells": size([result.cell for result in results]), "measured for": spent(results), "machines": hosts}
    code = worst(results)
    outcome = OUTCOME.get(code, "accepted")
    return html.page(
        "sections.html.j2",
        title=f"sweep {title}",
        outcome=outcome,
        found="decided" if code in (ACCEPTED, REJECTED) else "open",
        sentence=sentence(results),
        sections=[part for part in parts if part.table[1]],
        facts=[(name, text) for name, text in facts.items() if text],
        notes=HOW_TO_READ,
    )


COLUMNS = (
    *("cell", "model", "adapter", "variants", "machine", "state", "cell_outcome", "run", "host", "seconds"),
    *("variant", "outcome", "is_baseline", "is_chosen", "decided_by"),
    *("speed", "speed_low", "speed_high", "speed_n", "size_bytes", "accuracy", "cost_of_million_tokens", "currency"),
    *("why", "what_to_do"),
)
"""The columns of `rows`."""


def rows(results: Sequence[CellResult]) -> list[dict[str, JsonValue]]:
    """A row for each variant of each cell, or one for a cell without a decision. Unknown values are None."""
    listed = []
    for result in results:
        variants = result.decision.variants if result.decision else ()
        listed += [_row(result, variant) for variant in variants] or [_row(result, None)]
    return listed


def _row(result: CellResult, variant: VariantDecision | None) -> dict[str, JsonValue]:
    cell, decision = result.cell, result.decision
    values: dict[str, JsonValue] = {
        **dict.fromkeys(COLUMNS),
        "cell": cell.name,
        "model": cell.model,
        "adapter": cell.adapter,
        "variants": cell.group,
        "machine": cell.machine.name,
        "state": result.state,
        "cell_outcome": decision.outcome if decision else None,
        "run": result.run or None,
        "host": result.host or None,
        "seconds": result.seconds,
        "why": result.why or None,
        "what_to_do": (decision.next_step if decision else "") or result.hint or None,
    }
    if decision is None or variant is None:
        return values
    speed = _speed(decision, variant)
    price = scorecard.price(cell.price) if cell.price else None
    figures = {name: value.estimate for name, value in variant.figures.items()}
    values |= {
        "variant": variant.name,
        "outcome": variant.outcome,
        "is_baseline": variant.name == decision.baseline,
        "is_chosen": variant.name == decision.chosen,
        "decided_by": variant.decided_by,
        "size_bytes": figures.get("size"),
        "accuracy": figures.get("accuracy"),
        "cost_of_million_tokens": scorecard.million(variant, busiest(decision), price) if price else None,
        "currency": price.currency if price else None,
    }
    if speed is not None:
        values |= {"speed": speed.estimate, "speed_low": speed.low, "speed_high": speed.high, "speed_n": speed.n}
    return values
