"""Changed answers: which answers flipped, and how many are right in each slice. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from peftopt.decision.evidence import ANSWERED_WRONG, CriticalError, Evidence
from peftopt.measurements import Answer
from peftopt.metrics import counted
from peftopt.records import Decision, Interval
from peftopt.report.diff import Piece, pieces
from peftopt.report.words import MISSING, Table, clean

EXAMPLES = 12
"""Most prompts whose answers are shown."""


@dataclass(frozen=True)
class Flip:
    """An answer that flipped: the baseline's, the variant's, and the change in words.

    `gravity`: 1 broken as in no run of the baseline, 2 a critical prompt now wrong, 3 another prompt now wrong, 4 now
    right. The rules count 1 and 2.
    """

    gravity: int
    row: str
    change: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Changed:
    """The answer that some variants share, beside the baseline's answer."""

    variants: tuple[str, ...]
    gravity: int
    change: str
    after: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt whose answer flipped in some variants: their answers, and the variants that did not flip (`kept`)."""

    row: str
    gravity: int
    expected: str
    before: str
    changed: tuple[Changed, ...]
    kept: tuple[str, ...]


def flips(decision: Decision, evidence: Evidence) -> dict[str, list[Flip]]:
    """The flipped answers by variant, the gravest first."""
    names = [v.name for v in decision.variants]
    return {name: _flips(evidence, name) if name != decision.baseline else [] for name in names}


def prompts(decision: Decision, evidence: Evidence) -> list[Prompt]:
    """The prompts with flipped answers, once for all variants: the gravest first, then those of the most variants."""
    by_row: dict[str, list[tuple[str, Flip]]] = defaultdict(list)
    for variant, flipped in flips(decision, evidence).items():
        for flip in flipped:
            by_row[flip.row].append((variant, flip))
    answered = {
        variant.name: {clean(row) for row in evidence.rows(variant.name)}
        for variant in decision.variants
        if variant.name != decision.baseline
    }
    changed = [_prompt(row, flipped, answered) for row, flipped in by_row.items()]
    return sorted(
        changed, key=lambda prompt: (prompt.gravity, -sum(len(c.variants) for c in prompt.changed), prompt.row)
    )


def _prompt(row: str, flipped: list[tuple[str, Flip]], answered: dict[str, set[str]]) -> Prompt:
    alike: dict[tuple[int, str, str], list[str]] = defaultdict(list)
    for variant, flip in flipped:
        alike[flip.gravity, flip.change, flip.after].append(clean(variant))
    _, first = flipped[0]
    changed = [
        Changed(tuple(names), gravity, change, after, pieces(first.before, after))
        for (gravity, change, after), names in sorted(alike.items(), key=lambda each: each[0][0])
    ]
    names = {variant for variant, _ in flipped}
    kept = tuple(clean(variant) for variant, rows in answered.items() if row in rows and variant not in names)
    return Prompt(row, changed[0].gravity, first.expected, first.before, tuple(changed), kept)


def _flips(evidence: Evidence, variant: str) -> list[Flip]:
    before = evidence.rows(evidence.baseline)
    errors = {error.row: error for error in evidence.critical_errors(variant)[0]}
    pairs = [(before[row], after, errors.get(row)) for row, after in evidence.rows(variant).items() if row in before]
    flipped = [_flip(*pair) for pair in pairs]
    return sorted((flip for flip in flipped if flip), key=lambda flip: flip.gravity)


def _flip(old: Answer, new: Answer, error: CriticalError | None) -> Flip | None:
    if error:
        gravity, change = _graded(error)
    elif old.correct == new.correct:
        return None
    elif new.correct:
        gravity, change = 4, "now right"
    else:
        gravity, change = 3, "now wrong"
    shown = (old.row, change, old.expected, old.output, new.output)
    return Flip(gravity, *map(clean, shown))


def _graded(error: CriticalError) -> tuple[int, str]:
    """The gravity of an error, and its words; for an error that no rule counts, they say why."""
    flags = [flag for flag in (error.flag, *error.others) if flag != ANSWERED_WRONG]
    change = ", ".join(flags) or "critical prompt now wrong"
    if error.near_tie:
        return 3, f"{change}, at a near tie"
    if error.asked_once:
        return 3, f"{change}, in a prompt that the baseline was asked only once"
    return (1 if flags else 2), change


def slices(decision: Decision, evidence: Evidence) -> Table:
    """The share of right answers by slice: a row per slice, a column per variant, with the change to the baseline."""
    counts = {v.name: _slice_counts(evidence, v.name) for v in decision.variants if evidence.rows(v.name)}
    base = counts.get(decision.baseline, {})
    keys = sorted({key for by_slice in counts.values() for key in by_slice} - {_ALL})
    header = [clean(cell) for cell in ("slice", *counts)]
    if not keys:
        return header, []
    body = [
        [
            key,
            *(
                _slice_cell(mine.get(key), base.get(key) if n != decision.baseline else None)
                for n, mine in counts.items()
            ),
        ]
        for key in (_ALL, *keys)
    ]
    return header, [list(map(clean, row)) for row in body]


def steps(decision: Decision, evidence: Evidence) -> Table:
    """Tokens per step (acceptance length) by slice, with the number of answers: a row per slice, a column for each
    variant that speculates."""
    by_variant = {v.name: lengths for v in decision.variants if (lengths := evidence.acceptance_lengths(v.name))}
    keys = sorted({key for lengths in by_variant.values() for key in lengths})
    body = [[key or _ALL, *(_steps_cell(lengths.get(key)) for lengths in by_variant.values())] for key in keys]
    return [clean(cell) for cell in ("slice", *by_variant)], [list(map(clean, row)) for row in body]


def _steps_cell(length: Interval | None) -> str:
    return MISSING if length is None else f"{length.estimate:.2f} ({counted(length.n, 'answer')})"


_ALL = "all"


def _slice_counts(evidence: Evidence, variant: str) -> dict[str, tuple[int, int]]:
    """Slice -> (right, answered)."""
    answers = evidence.rows(variant)
    rows = {**evidence.slices(variant), _ALL: list(answers)}
    return {tag: (sum(answers[row].correct for row in tagged), len(tagged)) for tag, tagged in rows.items()}


def _slice_cell(mine: tuple[int, int] | None, base: tuple[int, int] | None) -> str:
    if mine is None:
        return MISSING
    share = 100 * mine[0] / mine[1]
    change = "" if base is None else f", {share - 100 * base[0] / base[1]:+.0f}"
    return f"{share:.0f} % ({mine[0]} of {mine[1]}{change})"
