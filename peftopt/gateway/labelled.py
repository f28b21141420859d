"""The operator's labelled prompts: does the new version lose right answers, does it make critical errors? Pure.

The new version is asked each prompt once and the live one twice, as offline: the second run shows what the live version
loses by itself. The offline rules judge the answers when all have been asked. A clear rejection comes earlier.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from peftopt.decision.evidence import Evidence
from peftopt.decision.rules import answers
from peftopt.decision.rules.case import Case
from peftopt.gateway import bets
from peftopt.gateway.bets import Tally
from peftopt.measurements import Answer, Measured
from peftopt.records import Measure, Metric, Outcome, Plan, Quality, Recipe, Step, Variant, Verdict

LIVE, NEW = "live", "new"

Run = tuple[str, int]
"""Whose answer it is, and which run of it: the live version has two."""

RUNS: tuple[Run, ...] = ((LIVE, 1), (LIVE, 2), (NEW, 1))

_ENGINE = Step("served", "engine", "canary")
_RECIPE = Recipe(
    name="trial",
    path="",
    base="",
    adapter="",
    variants={LIVE: Variant(LIVE, (), replace(_ENGINE, technique="")), NEW: Variant(NEW, (), _ENGINE)},
    baseline=LIVE,
    workloads={},
    quality=Quality(""),
    calibration=None,
    rules=(),
    require=(),
    minimize=Metric("latency.p50"),
    measure=Measure(),
)
_PLAN = Plan(_RECIPE, (), {LIVE: "", NEW: ""})
"""The offline half's own plan of two variants that are served: the live one is the baseline."""


@dataclass
class Labelled:
    """Answers so far, of `total` prompts."""

    total: int = 0
    answers: dict[Run, dict[str, Answer]] = field(default_factory=dict)

    def add(self, run: Run, answer: Answer) -> None:
        """One more answer."""
        self.answers.setdefault(run, {})[answer.row] = answer

    def left(self, rows: Iterable[str]) -> list[str]:
        """The prompts without all their answers."""
        return [row for row in rows if any(row not in self.answers.get(run, {}) for run in RUNS)]

    @property
    def asked(self) -> int:
        """Prompts with all their answers."""
        return len(set.intersection(*(set(self.answers.get(run, {})) for run in RUNS)))

    def verdicts(self, critical: float, lost: float, alpha: float) -> list[Verdict]:
        """The verdicts of the offline rules: `critical`, the share of prompts with critical errors that must be
        excluded; `lost`, the share of right answers that may be lost. Before all are asked, they can only reject."""
        evidence = Evidence(_PLAN, [Measured(each, whose, "", launch) for whose, launch, each in self._whole()])
        errors = answers.critical_errors(Case(evidence, NEW, _ENGINE, critical, LIVE, 1))
        kept = answers.lost(Case(evidence, NEW, _ENGINE, lost, LIVE, 1))
        if self.asked < self.total:
            worse, better, right = evidence.lost(NEW)
            clear = bets.judge(Tally(worse, better, right), lost, alpha) == "rejected"
            errors, kept = self._early(errors, errors.outcome == "rejected"), self._early(kept, clear)
        return [replace(errors, rule="canary.critical_prompts"), replace(kept, rule="canary.accuracy")]

    def _early(self, verdict: Verdict, clear: bool) -> Verdict:
        outcome: Outcome = "rejected" if clear else "inconclusive"
        said = f"{verdict.reason} ({self.asked} of {self.total} prompts asked)"
        return replace(verdict, outcome=outcome, reason=said)

    def _whole(self) -> Iterable[tuple[str, int, Answer]]:
        """The answers to prompts that have all of them."""
        shared = set.intersection(*(set(self.answers.get(run, {})) for run in RUNS))
        return [(*run, answer) for run in RUNS for row, answer in self.answers.get(run, {}).items() if row in shared]


def doubtful(new: Answer, live: Iterable[Answer]) -> bool:
    """Whether both versions should be asked again: the new one makes a critical error, or gets a critical prompt wrong,
    and the live one did not in any of its runs. One run may have been chance."""
    runs = list(live)
    known = set().union(*(run.flags for run in runs))
    wrong = new.critical and not new.correct and all(run.correct for run in runs)
    return bool(set(new.flags) - known) or wrong
