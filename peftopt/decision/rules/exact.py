"""Rules without chance: the size on disk, and what a policy is set to. Pure."""

from __future__ import annotations

import math

from peftopt.decision.rules.case import Case
from peftopt.metrics import format_value
from peftopt.records import Interval, Outcome, Verdict


def smaller(case: Case) -> Verdict:
    """On disk the model is smaller than its parent's by at least the limit."""
    ours, theirs = case.evidence.size(case.variant), case.evidence.size(case.parent)
    if not ours or not theirs:
        return Verdict("", "inconclusive", "its size was not measured", case.parent)
    ratio = ours / theirs
    text = f"{format_value('size', ours)} on disk against {format_value('size', theirs)}"
    outcome: Outcome = "accepted" if ratio <= 1 - case.limit else "rejected"
    return Verdict("", outcome, text, case.parent, Interval(ratio, ratio, ratio, 1), "x", 1 - case.limit)


def over(case: Case) -> Verdict:
    """Only inputs longer than the limit are ever cut: so says the policy, and so it was seen to do."""
    asked = case.step.params["over"]
    answers = case.evidence.rows(case.variant).values()
    cut = [answer.uncut_tokens for answer in answers if answer.uncut_tokens is not None]
    shortest = min(cut, default=math.inf)
    outcome: Outcome = "accepted" if asked >= case.limit and shortest > case.limit else "rejected"
    seen = f", the shortest that was cut had {shortest}" if cut else ", none was asked that is as long"
    reason = f"inputs over {asked:,.0f} tokens are cut{seen}"
    return Verdict("", outcome, reason, "", Interval(asked, asked, asked, len(cut)), "tokens", case.limit)


def by(case: Case) -> Verdict:
    """Outputs are shortened by `max_new_tokens` and by nothing else."""
    most = case.step.params["max_new_tokens"]
    return Verdict("", "accepted", f"answers end after {most} tokens at the latest", "", unit="tokens")
