"""The rule that a variant is still the same model: its predictions, and where its answers part. Pure."""

from __future__ import annotations

import math
from dataclasses import replace

from peftopt import stats
from peftopt.decision.evidence import Disagreement
from peftopt.decision.rules.case import Case, judged_on, not_alone
from peftopt.decision.rules.limits import MOST_TIMES, prompts_needed
from peftopt.metrics import counted, percent
from peftopt.records import Interval, Outcome, Verdict

PARTED = 0.1
"""The share of prompts that may leave the reference's answer earlier than the adapter's own second run does, beside
those that the limit on tokens allows: what a hundred prompts can show."""

FALSE_REJECT = 0.0025
"""The chance that one of the four tests of parity turns down a model that differs from the adapter no more than the
adapter's second run does. It is of one model, however many may be chosen: a family shares the error of accepting, which
upper bounds have."""

PLANNED = 0.9
"""The part of that chance which the planned numbers of tokens have together; all others share the rest."""


def parity(case: Case) -> Verdict:
    """It is still the same model. Where the engine scores: beyond the adapter's own second run, at the same positions,
    few tokens have another most likely one. In every engine: answers do not part from the reference's earlier than
    those of the second run do, but for what the limit on tokens allows. Both hold in every slice of the prompts."""
    evidence = case.evidence
    variant, against = judged_on(case)
    if variant is None:
        return not_alone(case)
    found = evidence.disagreement(variant, against)
    if not found.partings:
        return Verdict("", "inconclusive", f"its answers were not compared with two runs of {case.baseline}'s", against)
    predictions = _predictions(found, case.limit, case.family)
    sound = predictions is not None and predictions.outcome == "accepted"
    parts = [predictions, _answers(found, case.limit, case.family, sound)]
    slices = evidence.slices(variant)
    for tag, rows in slices.items():
        within = evidence.disagreement(variant, against, rows)
        if not within.partings:  # while a run goes on: the adapter's second run has not come to this slice yet
            continue
        for part in (
            _predictions(within, case.limit, 1, len(slices)),
            _answers(within, case.limit, 1, sound, len(slices)),
        ):
            if part and part.outcome == "rejected":
                parts.append(replace(part, reason=f"in slice {tag} {part.reason}"))
    judged = [part for part in parts if part]
    rejected = (part for part in judged if part.outcome == "rejected")
    worst = next(rejected, max((p for p in judged if p.outcome == "inconclusive"), key=_estimate, default=judged[0]))
    whose = "" if variant == case.variant else f"{variant}: "
    reason = f"{whose}{worst.reason} ({len(found.partings)} prompts)"
    return replace(worst, reason=reason, against=against, limit=case.limit)


def _predictions(found: Disagreement, limit: float, family: int, slices: int = 1) -> Verdict | None:
    """The share of scored tokens whose most likely one changes, in excess of the second run's; prompts are clusters."""
    if not found.scored:
        return None
    excess, tokens = zip(*found.scored, strict=True)
    value = stats.ratio_of_means(excess, tokens, 1 - 0.1 / family)  # 5 % on the side that is judged
    sure = stats.ratio_of_means(excess, tokens, 1 - 2 * FALSE_REJECT / slices)
    worse = [x for x in excess if x > 0]
    # few prompts that differ have no spread to speak of: what the count of them leaves open is more
    count = stats.upper_bound(len(worse), len(excess), 1 - 0.05 / family) * len(excess)
    most = count * max(1.0, sum(worse) / max(len(worse), 1)) / max(sum(tokens), 1)
    value = replace(value, low=sure.low, high=max(value.high, most))
    outcome: Outcome = "rejected" if value.low > limit else "accepted" if value.high <= limit else "inconclusive"
    reason = f"{percent(max(value.estimate, 0), 2)} of tokens differ from the reference's beyond its own second run"
    reason = f"{reason}, at most {percent(value.high, 2)}"
    if outcome == "inconclusive" and value.estimate > limit:
        again = (stats.ratio_of_means(k * excess, k * tokens, sure.level).low > limit for k in range(2, MOST_TIMES + 1))
        reason = f"{reason}; {prompts_needed(again, len(excess))}"
    return Verdict("", outcome, reason, value=value, unit="share")


def _answers(found: Disagreement, limit: float, family: int, sound: bool, slices: int = 1) -> Verdict:
    """How many answers part from the reference's within so many tokens, in excess of the second run's.

    A model at the limit leaves the reference in `limit` of all tokens, so in 1 - (1 - limit)^k of answers within k
    tokens. What surely exceeds that is rejected, from the start or among answers that are left after half of the
    tokens. What surely stays below it, or below PARTED, is accepted; where predictions are `sound`, what seems to.
    """
    doubled = [2**n for n in range(found.longest.bit_length() + 1)]
    planned = [(0, end) for k in doubled for end in (k, k + k // 2)] + [(k // 2, k) for k in doubled[1:]]
    errs = 2 * FALSE_REJECT / slices
    seen = {(0, int(ours)) for ours, _ in found.partings if math.isfinite(ours)}
    enough = stats.excess(0, 0, len(found.partings), 1 - 0.1 / family).high <= PARTED  # else nothing shows anything
    verdicts: list[tuple[float, Verdict]] = []
    beyond: dict[str, tuple[tuple[int, int, int], float, float]] = {}
    for start, end in [*planned, *sorted(seen)]:
        part = found.within(start, end)
        if not part.n:
            continue
        counts = part.worse, part.better, part.n
        allowed = -math.expm1((end - start) * math.log1p(-limit)) if limit < 1 else 1.0
        allowed *= 1 - part.again / part.n
        value = stats.excess(*counts, 1 - 0.1 / family)  # 5 % on the side that is judged
        share = PLANNED / len(planned) if (start, end) in planned else (1 - PLANNED) / max(found.longest, 1)
        sure = stats.excess(*counts, 1 - errs * share)
        few = 2 * part.n < len(found.partings)
        clear = few or (value.estimate if sound and enough else value.high) <= max(allowed, PARTED)
        judged = replace(value, low=sure.low)
        outcome: Outcome = "rejected" if judged.low > allowed else "accepted" if clear else "inconclusive"
        when = f"tokens {start + 1} to {end}" if start else f"the first {counted(end, 'token')}"
        reason = (
            f"within {when} {part.worse} of {part.n} answers part from the reference's, and {part.better} in its own "
            "second run alone"
        )
        of_tokens = _of_tokens(judged, end - start, 1 - part.again / part.n)
        verdicts.append((value.high, Verdict("", outcome, reason, value=of_tokens, unit="share")))
        if outcome == "inconclusive" and value.estimate > allowed:
            beyond[reason] = (counts, allowed, sure.level)
    most = max(verdicts, key=lambda each: each[0])[1]
    rejected = (v for _, v in verdicts if v.outcome == "rejected")
    still_open = [v for _, v in verdicts if v.outcome == "inconclusive"]
    worst = next(rejected, max(still_open, key=_estimate, default=most))
    if worst.reason not in beyond:
        return worst
    (worse, better, n), allowed, level = beyond[worst.reason]
    multiples = range(2, MOST_TIMES + 1)
    again = (stats.excess(k * worse, k * better, k * n, level).low > allowed for k in multiples)
    return replace(worst, reason=f"{worst.reason}; {prompts_needed(again, len(found.partings))}")


def _estimate(verdict: Verdict) -> float:
    return verdict.value.estimate if verdict.value else 0.0


def _of_tokens(parted: Interval, tokens: int, left: float) -> Interval:
    """The share of tokens, at each of which the model may leave the reference, that makes such a share of answers part
    within so many: what the limit is on. `left` is the share of answers that have not parted in the second run."""

    def each(share: float) -> float:
        if left <= 0 or share >= left:
            return 1.0
        return -math.expm1(math.log1p(-share / left) / tokens)

    return replace(parted, estimate=each(parted.estimate), low=each(parted.low), high=each(parted.high))
