"""Rules that count answers: critical errors, right answers that are lost, answers that are cut off. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from peftopt import stats
from peftopt.decision.evidence import CriticalError
from peftopt.decision.rules.case import Case, judged_on, not_alone
from peftopt.decision.rules.limits import against_limit, right_answers_needed
from peftopt.metrics import counted, percent
from peftopt.records import Interval, Outcome, Verdict


def critical_errors(case: Case) -> Verdict:
    """The step makes no critical error that neither the adapter, in either run, nor the variant without the step makes;
    in enough prompts to bound their rate below the limit. One is enough to reject."""
    variant, parent = judged_on(case)
    if variant is None:
        return not_alone(case)
    return critical_errors_of(case, variant, parent)


def critical_errors_of(case: Case, variant: str, parent: str) -> Verdict:
    """The critical errors of `variant` that neither the adapter nor `parent` makes, judged by the case's limit."""
    evidence, baseline = case.evidence, case.baseline
    errors, n = evidence.critical_errors(variant, parent)
    if not n:
        return Verdict("", "inconclusive", "no answers were checked", parent)
    counted_, once = [e for e in errors if e.counts], [e for e in errors if e.asked_once]
    bound = stats.upper_bound(len(counted_), n, 1 - 0.05 / case.family)
    needed = stats.needed_n(case.limit, case.family)
    makers = baseline if parent == baseline else f"{baseline} or {parent}"
    if counted_:
        outcome: Outcome = "rejected"
        reason = f"{counted(len(counted_), 'critical error')} in {n} prompts that {makers} does not make, "
        reason += f"first {_named(counted_)}"
    elif once:
        outcome = "inconclusive"
        reason = f"{counted(len(once), 'critical error')} in prompts that {baseline} was asked only once, first "
        reason += f"{_named(once)}: it may make them too"
    elif n >= needed:
        outcome, reason = "accepted", f"0 critical errors in {n} prompts: below {percent(bound, 2)} at 95 %"
    else:
        outcome = "inconclusive"
        reason = f"0 critical errors in {n} prompts; a claim of {percent(case.limit, 1)} needs {needed}"
    if ties := [e.row for e in errors if e.near_tie]:
        reason += f"; {', '.join(ties[:3])} flipped at a near tie, which {baseline}'s own noise decides"
    if variant != case.variant:
        reason = f"{variant}: {reason}"
    value = Interval(len(counted_) / n, 0.0, bound, n)
    return Verdict("", outcome, reason, parent, value, "share", case.limit)


def _named(errors: Sequence[CriticalError]) -> str:
    return f"{errors[0].row}: {errors[0].flag}"


def lost(case: Case) -> Verdict:
    """Few right answers are lost: of all prompts, or for a policy that cuts them of those that it cut."""
    return _cut_answers_lost(case) if case.step.technique == "truncate" else _answers_lost(case)


def _answers_lost(case: Case) -> Verdict:
    """Of the adapter's right answers few are wrong now, beyond those that its own second run loses."""
    variant, against = judged_on(case)
    if variant is None:
        return not_alone(case)
    if not case.evidence.rows(variant):
        return Verdict("", "inconclusive", "no answers were checked", against)
    worse, better, right = case.evidence.lost(variant)
    if not right:
        return Verdict("", "not judged", f"{case.baseline} was not right twice in any prompt", against)
    level = 1 - 0.1 / case.family  # 5 % on the side that is judged
    value = stats.excess(worse, better, right, level)
    reason = f"{worse} of {right} right answers are lost, and {better} in {case.baseline}'s second run alone"
    reason = f"{variant}: {reason}" if variant != case.variant else reason
    outcome = against_limit(value, "<=", case.limit)
    if outcome == "inconclusive" and value.estimate <= case.limit:
        reason += f"; {right_answers_needed(worse, better, right, level, case.limit)}"
    return Verdict("", outcome, reason, against, value, "share", case.limit)


def _cut_answers_lost(case: Case) -> Verdict:
    touched = case.evidence.touched(case.variant)
    known = case.evidence.rows(case.baseline)
    right = [row for row in touched if row in known and known[row].correct]
    worse, _ = case.evidence.flips(case.variant, touched)
    reason = f"{worse} of the {len(right)} right answers to prompts that it cut are lost"
    return _at_most(case, worse, len(right), reason, "no prompt that it cuts was asked, or none had a right answer")


def cut(case: Case) -> Verdict:
    """Few answers are cut off that would have ended by themselves."""
    rows, n = case.evidence.cut(case.variant)
    return _at_most(case, len(rows), n, f"{len(rows)} of {n} answers are cut off", "no answers were checked")


def _at_most(case: Case, k: int, n: int, reason: str, nothing: str) -> Verdict:
    """A count k of n, judged by exact bounds that hold over the family together."""
    if not n:
        return Verdict("", "inconclusive", nothing, case.baseline)
    value = stats.proportion(k, n, 1 - 0.1 / case.family)  # 5 % on the side that is judged
    return Verdict("", against_limit(value, "<=", case.limit), reason, case.baseline, value, "share", case.limit)
