"""What became of the answers: which of them flipped, and how many are right in each slice. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftopt.records import Decision, Json, Measurement
from peftopt.report.words import MISSING, Table, clean, strings

EXAMPLES = 5


@dataclass(frozen=True)
class Flip:
    """An answer that changed: the baseline's and the variant's, and what is wrong or right about it now.

    `gravity`: 1 broken as in no run of the baseline, 2 a critical prompt now wrong, 3 another, 4 now right.
    """

    gravity: int
    row: str
    change: str
    expected: str
    before: str
    after: str


def flips(decision: Decision, measurements: Sequence[Measurement], most: int = EXAMPLES) -> dict[str, list[Flip]]:
    """Example answers that flipped, by variant, the gravest first."""
    answers = _answers(measurements)
    before = answers.get(decision.baseline, {})
    found: dict[str, list[Flip]] = {v.name: [] for v in decision.variants}
    for name in found.keys() & answers.keys() - {decision.baseline}:
        pairs = [(before[row], after) for row, after in answers[name].items() if row in before]
        flipped = [flip for pair in pairs if (flip := _flip(*pair))]
        found[name] = sorted(flipped, key=lambda flip: flip.gravity)[:most]
    return found


_Answers = dict[str, dict[str, list[Mapping[str, Json]]]]


def _answers(measurements: Sequence[Measurement]) -> _Answers:
    """variant -> row -> its answers, one per run."""
    found: _Answers = defaultdict(lambda: defaultdict(list))
    for m in measurements:
        if m.probe == "quality":
            found[m.variant][str(m.values.get("row"))].append(m.values)
    return found


def _flip(before: Sequence[Mapping[str, Json]], after: Sequence[Mapping[str, Json]]) -> Flip | None:
    old, new = before[0], after[0]
    known = {flag for answer in before for flag in strings(answer.get("flags"))}
    if broken := [flag for flag in strings(new.get("flags")) if flag not in known]:
        gravity, change = 1, ", ".join(broken)
    elif bool(old.get("correct")) == bool(new.get("correct")):
        return None
    elif new.get("correct"):
        gravity, change = 4, "now right"
    else:
        gravity, change = (2, "critical prompt now wrong") if new.get("critical") else (3, "now wrong")
    shown = (old.get("row"), change, old.get("expected", ""), old.get("output", ""), new.get("output", ""))
    return Flip(gravity, *map(clean, shown))


def slices(decision: Decision, measurements: Sequence[Measurement]) -> Table:
    """Share of right answers by slice: a row each, a column per variant, with the change to the baseline."""
    answers = _answers(measurements)
    names = [v.name for v in decision.variants if v.name in answers]
    counts = {name: _slice_counts(answers[name]) for name in names}
    base = counts.get(decision.baseline, {})
    keys = sorted({key for found in counts.values() for key in found} - {_ALL})
    header = [clean(cell) for cell in ("slice", *names)]
    if not keys:
        return header, []
    body = [
        [key, *(_slice_cell(counts[n].get(key), base.get(key) if n != decision.baseline else None) for n in names)]
        for key in (_ALL, *keys)
    ]
    return header, [list(map(clean, row)) for row in body]


_ALL = "all"


def _slice_counts(answers: Mapping[str, list[Mapping[str, Json]]]) -> dict[str, tuple[int, int]]:
    """slice -> (right, asked), from the first run of each row."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for runs in answers.values():
        for key in {_ALL, *strings(runs[0].get("slices"))}:
            right, asked = found[key]
            found[key] = right + bool(runs[0].get("correct")), asked + 1
    return found


def _slice_cell(mine: tuple[int, int] | None, base: tuple[int, int] | None) -> str:
    if mine is None:
        return MISSING
    share = 100 * mine[0] / mine[1]
    change = "" if base is None else f", {share - 100 * base[0] / base[1]:+.0f}"
    return f"{share:.0f} % ({mine[0]} of {mine[1]}{change})"
