"""The named rules: one half-row of the trade-off table, or one requirement, asked of one variant. Pure.

Every rule has three outcomes; inconclusive never passes. A rule of a technique is judged on what isolates it: the
variant against the same variant without it, a merge or a baked prompt against the unmerged adapter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from peftopt import stats
from peftopt.decision.evidence import FIELDS, CriticalError, Disagreement, Evidence, Rows, acceptance_length, exp
from peftopt.decision.figures import RATIOS, figure, figures, timed
from peftopt.decision.index import Field
from peftopt.measurements import SKIPPED
from peftopt.metrics import QUANTILES, TASK, counted, format_value, known, percent
from peftopt.records import TWIN, Interval, Metric, Outcome, Recipe, Rule, Step, Threshold, Variant, Verdict

NOT_TRIED = (SKIPPED, "missing library", "missing environment", "refused")
"""Failures that say nothing of the variant: it was not tried."""

LIKELIHOODS = ("perplexity", "kl", "top1")
"""Figures of the weights, which an engine that only generates cannot give."""

LOST = 0.1
"""What must be left of the adapter's shift from the base for it to count as applied at all."""

TAILS = ("p95", "p99")

SAME_MODEL = ("merge", "bake")
"""Techniques that give the same model without the adapter's cost: they are judged against the unmerged adapter."""

A_A = "measurement.a_a"
"""The rule that leaves a variant open where the baseline differs from itself."""

WHOLE = "variant"
"""The row of the trade-off table that every variant faces as a whole, whatever it is made of."""

ANY_CRITICAL = Rule(WHOLE, "critical_errors", 0.05)
"""That row for a table that does not have it: nobody ships a broken model because a table is old."""

PARTED = 0.1
"""The share of prompts that may leave the reference's answer earlier than the adapter's own second run does, beside
those that the limit on tokens allows: what a hundred prompts can show."""

FALSE_REJECT = 0.0025
"""The chance that one of the four tests of parity turns down a model that differs from the adapter no more than the
adapter's second run does."""

PLANNED = 0.9
"""The part of that chance which the planned numbers of tokens have together; all others share the rest."""

TOUCHED = 0.5
"""The share of a workload's requests that a policy must change for its latency to be judged there."""


# ---- one rule, one variant ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One rule asked of one variant's technique. `parent` is what it is compared with for speed and size."""

    evidence: Evidence
    variant: str
    step: Step
    limit: float
    parent: str
    family: int

    @property
    def baseline(self) -> str:
        """The name of the run's baseline."""
        return self.evidence.baseline


def _speed(case: Case, against: str, limit: float, goal: str) -> Verdict:
    """The sequential test of variant/against on the recipe's `minimize` metric; `limit` is a ratio."""
    evidence, recipe = case.evidence, case.evidence.plan.recipe
    workload = raced_on(evidence, case.variant, case.step)
    if workload is None:
        return Verdict("", "inconclusive", _NOWHERE[case.step.technique], against)
    metric = Metric(recipe.minimize.name, workload)
    field = evidence.field(metric)
    logs = list(evidence.series(case.variant, against, workload, field).values())
    result = _race(evidence, case.variant, against, metric, limit)
    n = result.interval.n
    if not n:
        return Verdict("", "inconclusive", f"{metric} was not measured against {against}", against, workload=workload)
    ratio = exp(result.interval)
    blocks = counted(n, "block")
    if result.launches < n:
        blocks += f" of {counted(result.launches, 'launch', 'launches')}"
    if result.test == "bets":
        blocks += ", by bets"
    bounded = math.isfinite(ratio.low) and math.isfinite(ratio.high) and ratio.low > 0
    span = f"{ratio.low:.2f} to {ratio.high:.2f}" if bounded else "no interval yet"
    seen = f"{metric} is {ratio.estimate:.2f}x {against}'s ({span}, {blocks})"
    open_ = result.outcome == "inconclusive"
    hopeless = open_ and len(logs) < evidence.budget
    hopeless = hopeless and stats.out_of_reach(logs, math.log(limit), evidence.budget, case.family)
    reasons = {
        "accepted": f"{seen}: {goal}",
        "rejected": f"{seen}: not {goal}",
        "inconclusive": f"{seen}: cannot tell yet whether {goal}"
        + f"{_unseen(case, against, workload, field, result)}{_troubles(evidence, workload)}"
        + f"; the {evidence.budget} blocks it may have can hardly suffice" * hopeless,
    }
    needed, each = result.blocks_needed, evidence.minutes_per_block(workload)
    return Verdict(
        rule="",
        outcome=result.outcome,
        reason=reasons[result.outcome],
        against=against,
        value=ratio,
        unit="x",
        limit=limit,
        clock=evidence.clock[0],
        blocks_needed=needed if open_ else None,
        workload=workload,
        minutes_needed=(needed - len(logs)) * each if open_ and needed and each else None,
        hopeless=hopeless,
    )


def _race(evidence: Evidence, variant: str, against: str, metric: Metric, limit: float) -> stats.Race:
    """The sequential test of variant/against on a metric; `limit` is a ratio."""
    recipe, workload, field = evidence.plan.recipe, metric.workload, evidence.field(metric)
    series = evidence.series(variant, against, workload, field)
    return stats.race(
        series.values(),
        math.log(limit),
        family(recipe),
        recipe.measure.max_blocks > stats.LOOKS[-1],
        evidence.launches_of(variant, against, workload, series),
        evidence.resolution((variant, against), workload, field),
    )


def judged_speed(evidence: Evidence, variant: Variant) -> Interval | None:
    """The ratio to the baseline's time on what the recipe minimizes, as it is judged: by the variant's own rule that
    compares the two, else as a race against 1x would be; of the baseline its second copy's, at the level of the A/A
    arm. None where no times of whole requests are minimized, or none were measured."""
    recipe, metric = evidence.plan.recipe, evidence.plan.recipe.minimize
    if metric.name.partition(".")[0] not in FIELDS or evidence.field(metric) not in RATIOS.values():
        return None
    if variant.name == recipe.baseline:
        twin, level = recipe.baseline + TWIN, 1 - stats.ALPHA / len(stats.LOOKS)
        return evidence.ratio(twin, recipe.baseline, metric.workload, evidence.field(metric), level)
    result = _race(evidence, variant.name, recipe.baseline, metric, next(_own_limits(evidence, variant), 1.0))
    return exp(result.interval) if result.interval.n else None


def _own_limits(evidence: Evidence, variant: Variant) -> Iterator[float]:
    """The limits, as ratios, by which the variant itself is raced against the baseline on the minimized workload."""
    recipe = evidence.plan.recipe
    for step in variant.techniques:
        if raced_on(evidence, variant.name, step) != recipe.minimize.workload:
            continue
        for rule in (r for r in recipe.rules if r.technique == rule_name(step) and r.limit is not None):
            if rule.name == "gain" and _gains_as(recipe, variant.name, step) == (variant.name, recipe.baseline):
                yield 1 - (rule.limit or 0.0)
            elif rule.name == "not_slower" and parent_of(recipe, variant, step) == recipe.baseline:
                yield 1 + (rule.limit or 0.0)


def _unseen(case: Case, against: str, workload: str, field: Field, result: stats.Race) -> str:
    """What keeps these blocks from deciding although they are clear, and what to do about it."""
    evidence = case.evidence
    reasons = ""
    if needed := result.launches_needed:
        reasons += (
            f"; {counted(result.launches, 'launch', 'launches')} cannot show what differs between launches, "
            f"about {needed} would: lower measure.relaunch"
        )
    resolution = evidence.resolution((case.variant, against), workload, field)
    if resolution > math.log1p(0.01):
        reasons += f"; the clock's steps are {percent(math.expm1(resolution))} of what it times: use longer requests"
    loads = [evidence.loads(v, workload) for v in (case.variant, against)]
    if max(loads) > result.interval.n and min(loads):
        reasons += f"; of {max(loads)} loads {result.interval.n} are pairs: let the loads of both alternate"
    return reasons


def raced_on(evidence: Evidence, variant: str, step: Step) -> str | None:
    """The workload on which a technique's latency is judged: the recipe's `minimize`, but a policy where it matters."""
    recipe = evidence.plan.recipe
    if step.technique == "shorten":
        return next((w.name for w in recipe.workloads.values() if w.lengths == "natural"), None)
    if step.technique == "truncate":
        shares = {w: evidence.touched_share(variant, w) for w in recipe.workloads}
        most = max(shares, key=lambda w: shares[w])
        return most if shares[most] >= TOUCHED else None
    return recipe.minimize.workload


_NOWHERE = {
    "shorten": "no workload lets answers stop by themselves: add one with lengths: natural",
    "truncate": "no workload has mostly prompts that are long enough to be cut: add one with a slice of long prompts",
}


def _troubles(evidence: Evidence, workload: str) -> str:
    """What disturbed the blocks of an undecided race, where it was more than a few of them."""
    disturbed, blocks = evidence.disturbed(workload), evidence.blocks(evidence.baseline, workload)
    if 4 * len(disturbed) < blocks or not disturbed:
        return ""
    reasons = Counter(reason for found in disturbed.values() for reason in found)
    return f"; {len(disturbed)} of {blocks} blocks were disturbed ({reasons.most_common(1)[0][0]})"


def gain(case: Case) -> Verdict:
    """Latency drops by more than the limit. A merge, or a baked prompt, is judged as a whole variant against the
    unmerged adapter, since that is what is given up for it, but by itself where a quantizer in the variant may cost
    speed, being a memory win; any other technique against the same variant without it. What proposes tokens also says
    how many a step gave, what reuses prefixes how much of the prompts, and both on which other workloads they cost
    time."""
    goal = f"{percent(case.limit)} faster or better" if case.limit else "faster"
    judged, against = _gains_as(case.evidence.plan.recipe, case.variant, case.step)
    found = _speed(replace(case, variant=judged), against, 1 - case.limit, goal)
    if case.step.technique in ("speculate", "prefix"):
        says = _proposing if case.step.technique == "speculate" else _reusing
        found = replace(found, reason=f"{found.reason}{says(case, found.workload)}{_losing(case, found.workload)}")
    return found if judged == case.variant else replace(found, reason=f"{judged}: {found.reason}")


def _gains_as(recipe: Recipe, variant: str, step: Step) -> tuple[str, str]:
    """(the variant whose gain is a technique's, the one it is compared with)."""
    if step.technique not in SAME_MODEL:
        return variant, parent_of(recipe, recipe.variants[variant], step)
    slower = any(_may_be_slower(recipe, each) for each in recipe.variants[variant].techniques)
    alone = _alone(recipe, variant, step) if slower else None
    return alone or variant, recipe.baseline


def _proposing(case: Case, raced: str) -> str:
    """How many tokens a step gave on the workload of the race."""
    steps = [request for request in case.evidence.requests(case.variant, raced) if request.steps]
    return f"; {acceptance_length(steps).estimate:.2f} tokens a step" if steps else ""


def _reusing(case: Case, raced: str) -> str:
    """How much of the prompts on the workload of the race was there already."""
    share = case.evidence.reused(case.variant, raced)
    return f"; {percent(share.estimate)} of prompt tokens were reused" if share else ""


def _losing(case: Case, raced: str) -> str:
    """The other workloads on which it is slower for sure."""
    evidence, metric = case.evidence, case.evidence.plan.recipe.minimize
    said = ""
    for workload in evidence.plan.recipe.workloads:
        field = evidence.field(Metric(metric.name, workload))
        ratio = evidence.ratio(case.variant, case.parent, workload, field) if workload != raced else None
        if ratio and ratio.low > 1:
            said += f"; it loses on {workload}: {ratio.estimate:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
    return said


def _may_be_slower(recipe: Recipe, step: Step) -> bool:
    """Whether the recipe takes the step as a memory win: it asks that it be smaller, not that it be as fast."""
    limits = {rule.name: rule.limit for rule in recipe.rules if rule.technique == rule_name(step)}
    return limits.get("smaller") is not None and limits.get("not_slower") is None


def not_slower(case: Case) -> Verdict:
    """The slow-down against the variant without the technique is provably below the limit."""
    return _speed(case, case.parent, 1 + case.limit, f"less than {percent(case.limit)} slower")


def smaller(case: Case) -> Verdict:
    """On disk the model is smaller than its parent's by at least the limit."""
    ours, theirs = case.evidence.size(case.variant), case.evidence.size(case.parent)
    if not ours or not theirs:
        return Verdict("", "inconclusive", "its size was not measured", case.parent)
    ratio = ours / theirs
    text = f"{format_value('size', ours)} on disk against {format_value('size', theirs)}"
    outcome: Outcome = "accepted" if ratio <= 1 - case.limit else "rejected"
    return Verdict("", outcome, text, case.parent, Interval(ratio, ratio, ratio, 1), "x", 1 - case.limit)


def critical_errors(case: Case) -> Verdict:
    """The step makes no critical error that neither the adapter, in either run, nor the variant without the step makes;
    in enough prompts to bound their rate below the limit. One is enough to reject."""
    variant, parent = _judged(case)
    if variant is None:
        return _not_alone(case)
    return _critical(case, variant, parent)


def _critical(case: Case, variant: str, parent: str) -> Verdict:
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


def _not_alone(case: Case) -> Verdict:
    reason = f"no variant of the recipe is the {case.step.technique} alone"
    return Verdict("", "not judged", reason, case.baseline)


def _judged(case: Case) -> tuple[str | None, str]:
    """(the variant on which a technique's answers are judged, the one it is compared with). A merge, or a baked prompt,
    is judged on the variant that is nothing but that, if the recipe has it, not by what else was done to it."""
    if case.step.technique not in SAME_MODEL:
        return case.variant, case.parent
    return _alone(case.evidence.plan.recipe, case.variant, case.step), case.baseline


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


MOST_TIMES = 10
"""More than so many times the prompts that were asked are not proposed."""


def lost(case: Case) -> Verdict:
    """Few right answers are lost: of all prompts, or for a policy that cuts them of those that it cut."""
    return _cut_answers_lost(case) if case.step.technique == "truncate" else _answers_lost(case)


def _answers_lost(case: Case) -> Verdict:
    """Of the adapter's right answers few are wrong now, beyond those that its own second run loses."""
    variant, against = _judged(case)
    if variant is None:
        return _not_alone(case)
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
        reason += f"; {_right_answers_needed(worse, better, right, level, case.limit)}"
    return Verdict("", outcome, reason, against, value, "share", case.limit)


def _right_answers_needed(worse: int, better: int, right: int, level: float, limit: float) -> str:
    """How many right answers would tell, were those to come lost at the same rate."""
    for n in range(right + 1, MOST_TIMES * right + 1):
        lost, lost_again = math.ceil(worse * n / right), better * n // right
        if stats.excess(lost, lost_again, n, level).high <= limit:
            return f"at this rate {n} right answers would tell"
    return f"at this rate not even {MOST_TIMES} times as many would tell"


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


def by(case: Case) -> Verdict:
    """Outputs are shortened by `max_new_tokens` and by nothing else."""
    most = case.step.params["max_new_tokens"]
    return Verdict("", "accepted", f"answers end after {most} tokens at the latest", "", unit="tokens")


def parity(case: Case) -> Verdict:
    """It is still the same model. Where the engine scores: beyond the adapter's own second run, at the same positions,
    few tokens have another most likely one. In every engine: answers do not part from the reference's earlier than
    those of the second run do, but for what the limit on tokens allows. Both hold in every slice of the prompts."""
    evidence = case.evidence
    variant, against = _judged(case)
    if variant is None:
        return _not_alone(case)
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
    # the bounds that judge: one that is above the limit turns the model down, and takes more than one that is below it
    value = replace(value, low=min(value.low, sure.low), high=max(value.high, most))
    outcome: Outcome = "rejected" if value.low > limit else "accepted" if value.high <= limit else "inconclusive"
    reason = f"{percent(max(value.estimate, 0), 2)} of tokens differ from the reference's beyond its own second run"
    reason = f"{reason}, at most {percent(value.high, 2)}"
    if outcome == "inconclusive" and value.estimate > limit:
        again = (stats.ratio_of_means(k * excess, k * tokens, sure.level).low > limit for k in range(2, MOST_TIMES + 1))
        reason = f"{reason}; {_prompts_needed(again, len(excess))}"
    return Verdict("", outcome, reason, value=value, unit="share")


def _prompts_needed(turned_down: Iterable[bool], asked: int) -> str:
    """How many prompts would turn a model down, were others to differ as these do: of two times as many as were asked,
    three times, …, whether they would."""
    times = next((k for k, enough in enumerate(turned_down, 2) if enough), None)
    if times is None:
        return f"not even {MOST_TIMES} times as many prompts that differ as these do would turn it down"
    return f"too few prompts to turn it down: {times * asked} that differ as these do would"


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
        outcome: Outcome = "rejected" if sure.low > allowed else "accepted" if clear else "inconclusive"
        when = f"tokens {start + 1} to {end}" if start else f"the first {counted(end, 'token')}"
        reason = (
            f"within {when} {part.worse} of {part.n} answers part from the reference's, and {part.better} in its own "
            "second run alone"
        )
        judged = replace(value, low=min(value.low, sure.low))
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
    return replace(worst, reason=f"{worst.reason}; {_prompts_needed(again, len(found.partings))}")


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


RULES = {
    "gain": gain,
    "parity": parity,
    "critical_errors": critical_errors,
    "lost": lost,
    "not_slower": not_slower,
    "smaller": smaller,
    "over": over,
    "by": by,
    "cut": cut,
}

PROTECTS = {
    "artifact.runs": "a variant that cannot be served",
    "artifact.intact": "damaged weights, and a model in which the adapter is not at work",
    A_A: "a machine on which even a copy of the baseline looks faster or slower than itself",
    "gain": "giving something up for a gain that is noise",
    "parity": "a model that is no longer the adapter you evaluated",
    "critical_errors": "answers that break your service: empty, endless, unreadable, or wrong where it must be right",
    "lost": "a quiet loss of right answers",
    "not_slower": "a smaller model that is slower",
    "smaller": "a slower model that saves nothing",
    "over": "cutting inputs that would have fitted",
    "by": "shortening answers in a way that clients cannot see",
    "cut": "answers that end in the middle",
    "require": "missing what you promised your users",
}
"""What each rule keeps from being shipped: by name, by the half after the dot, or by "require"."""


def protects(rule: str) -> str:
    """What a verdict of this rule protects against, for the report; "" for a rule of another version."""
    half = "require" if rule.startswith("require: ") else rule.rpartition(".")[2]
    return PROTECTS.get(rule) or PROTECTS.get(half, "")


def rule_name(step: Step) -> str:
    """The word before the dot: the plug-in's name for quantizers ("int8"), else the technique ("merge")."""
    return step.plugin if step.technique == "quantize" else step.technique


def parent_of(recipe: Recipe, variant: Variant, step: Step) -> str:
    """The variant that is this one without the technique, as like it as the recipe has; else the baseline."""
    candidates = [v for v in recipe.variants.values() if v.name != variant.name]
    plain = recipe.variants[recipe.baseline].engine
    rest = tuple(s for s in variant.steps if s != step)
    engine = plain if step == variant.engine else variant.engine
    policies = tuple(s for s in variant.policies if s != step)
    prefix = variant.steps[: variant.steps.index(step)] if step in variant.steps else variant.steps
    chains = ((rest, engine, policies), (rest, engine, ()), (rest, plain, ()), (prefix, plain, ()))
    for chain in chains:
        for candidate in candidates:
            if (candidate.steps, candidate.engine, candidate.policies) == chain:
                return candidate.name
    return recipe.baseline


def _alone(recipe: Recipe, variant: str, step: Step) -> str | None:
    """The variant that is this one's chain up to and including the step, without other techniques before it, on the
    baseline's engine."""
    chain = recipe.variants[variant].steps
    wanted = (*(s for s in chain[: chain.index(step)] if not s.technique), step)
    plain = recipe.variants[recipe.baseline].engine
    whole = (wanted, plain, ())
    return next((v.name for v in recipe.variants.values() if (v.steps, v.engine, v.policies) == whole), None)


def table_verdicts(evidence: Evidence, variant: Variant) -> list[Verdict]:
    """Every rule of the trade-off table that applies to the variant, technique by technique."""
    recipe = evidence.plan.recipe
    verdicts = []
    for step in variant.techniques:
        for rule in (r for r in recipe.rules if r.technique == rule_name(step) and r.name in RULES):
            name = f"{rule.technique}.{rule.name}"
            if rule.limit is None:
                continue
            case = Case(evidence, variant.name, step, rule.limit, parent_of(recipe, variant, step), family(recipe))
            verdicts.append(replace(RULES[rule.name](case), rule=name))
    return verdicts


def family(recipe: Recipe) -> int:
    """How many variants may be chosen: the error rates hold over all of them together, whatever their rules are
    called. They stay those that were run, also when the run is judged again for some of them."""
    return max(len(recipe.variants) - 1, 1)


def whole(evidence: Evidence, variant: Variant) -> list[Verdict]:
    """The row that every variant faces as a whole, against the adapter: all its critical errors, whoever made them."""
    recipe = evidence.plan.recipe
    rule = next((r for r in recipe.rules if r.technique == WHOLE), ANY_CRITICAL)
    if rule.limit is None or recipe.quality is None or not evidence.rows(evidence.baseline):
        return []
    case = Case(evidence, variant.name, variant.engine, rule.limit, evidence.baseline, family(recipe))
    return [replace(_critical(case, variant.name, evidence.baseline), rule=f"{WHOLE}.{rule.name}")]


# ---- requirements: a whole variant against the SLA ----------------------------------------------


def requirement(evidence: Evidence, variant: str, threshold: Threshold) -> Verdict:
    """Judge one line of `require:`. A variant passes when it meets all of them, so only the number of variants, and of
    looks at growing blocks, share the error: 2.5 % a side for a requirement."""
    rule, metric = f"require: {threshold.text}", threshold.metric
    recipe = evidence.plan.recipe
    if metric.name == "critical_errors" and variant != evidence.baseline:
        whole_variant = recipe.variants[variant].engine
        case = Case(evidence, variant, whole_variant, threshold.limit, evidence.baseline, family(recipe))
        return replace(_critical(case, variant, evidence.baseline), rule=rule)
    if metric.workload:
        return _timed_requirement(evidence, variant, threshold)
    measured, whose = variant, ""
    if metric.name in LIKELIHOODS and (twin := _scored_twin(evidence, variant)):
        measured, whose = twin, f" of {twin}, the same weights on an engine that scores,"
    level = 1 - stats.REQUIRE_ALPHA / family(recipe)
    value = (relative if threshold.relative else figure)(evidence, measured, metric, level)
    if value is None:
        return Verdict(rule, "inconclusive", f"{metric} was not measured")
    reason = f"{metric}{whose} is {_show(threshold, value)} (n={value.n})"
    if value.n == 1 and not math.isfinite(value.high):
        reason += ": one launch has no interval"
    against = evidence.baseline if threshold.relative else ""
    outcome = against_limit(value, threshold.op, threshold.limit)
    return Verdict(rule, outcome, reason, against, value, _unit(threshold), threshold.limit)


def _timed_requirement(evidence: Evidence, variant: str, threshold: Threshold) -> Verdict:
    """A requirement on times, judged at planned numbers of blocks."""
    rule, metric, recipe = f"require: {threshold.text}", threshold.metric, evidence.plan.recipe
    blocks, most = evidence.blocks(variant, metric.workload), recipe.measure.max_blocks
    against = evidence.baseline if threshold.relative else ""
    common = Verdict(
        rule, "inconclusive", "", against, None, _unit(threshold), threshold.limit, "wall", workload=metric.workload
    )
    if not blocks:
        return replace(common, reason=f"{metric} was not measured", workload="")
    for look, share in stats.planned_looks(blocks, most) or [(blocks, 0.0)]:
        level = required_level(recipe, share or 1.0)
        found = (timed_ratio if threshold.relative else timed)(evidence, variant, metric, level, look)
        if found is None:
            return replace(common, reason=f"{metric} was not measured", workload="")
        value = found
        n = counted(value.n, "block" if threshold.relative else "request")
        launches = evidence.launch_count(variant, metric.workload, look)
        reason = f"{metric} is {_show(threshold, value)} ({n} of {counted(launches, 'launch', 'launches')})"
        outcome = against_limit(value, threshold.op, threshold.limit) if share else "inconclusive"
        if outcome != "inconclusive":
            return replace(common, outcome=outcome, reason=reason, value=value)
    if not threshold.relative and value.n < (fewest := fewest_requests(metric, recipe)):
        tail = metric.name.rpartition(".")[2].upper()
        reason = f"too few requests for {tail}: {value.n} of {fewest}"
        if recipe.timed_requests(metric.workload) * evidence.budget < fewest:
            key = f"workloads.{metric.workload}" if recipe.workloads[metric.workload].loaded else "measure"
            reason += f"; {key}.requests: {-(-fewest // evidence.budget)} would give them in {evidence.budget} blocks"
        needed = max(-(-fewest // recipe.timed_requests(metric.workload)), most)
    elif launches < 2:
        reason += "; one launch has no interval: lower measure.relaunch"
        needed = 2 * recipe.measure.relaunch
    else:
        needed = _blocks_for(value, threshold.limit, look)
    needed = min(max(needed, blocks + 1), stats.MOST_BLOCKS)
    each = evidence.minutes_per_block(metric.workload)
    minutes = (needed - blocks) * each if each else None
    return replace(common, reason=reason, value=value, blocks_needed=needed, minutes_needed=minutes)


def required_level(recipe: Recipe, share: float = 1.0) -> float:
    """The level of a requirement's interval at a look that has this share of its error."""
    return 1 - stats.REQUIRE_ALPHA * share / family(recipe)


def _blocks_for(value: Interval, limit: float, blocks: int) -> int:
    """About how many blocks would clear the limit, as intervals shrink with the root of their number."""
    side = value.high - value.estimate if value.estimate < limit else value.estimate - value.low
    gap = abs(value.estimate - limit)
    if not math.isfinite(side) or gap <= 0:
        return 2 * blocks
    return math.ceil(min(blocks * (side / gap) ** 2, stats.MOST_BLOCKS))


def _unit(threshold: Threshold) -> str:
    return "x" if threshold.relative else known(threshold.metric).unit


def fewest_requests(metric: Metric, recipe: Recipe) -> int:
    """Requests below which the metric has no two-sided interval at the recipe's last look: 72 for a P95 of independent
    requests at 95 %, more for several variants."""
    name = metric.name.rpartition(".")[2]
    if name not in TAILS:
        return 0
    most = recipe.measure.max_blocks
    _, share = stats.planned_looks(most, most)[-1]
    return stats.fewest_for(QUANTILES[name], required_level(recipe, share))


def _scored_twin(evidence: Evidence, variant: str) -> str | None:
    """Another variant with the same weights that has likelihoods, for one whose engine only generates."""
    if "perplexity" in figures(evidence, variant):
        return None
    models = evidence.plan.models
    twins = (name for name, model in models.items() if model == models[variant] and name != variant)
    return next((name for name in twins if "perplexity" in figures(evidence, name)), None)


def timed_ratio(evidence: Evidence, variant: str, metric: Metric, level: float, blocks: int) -> Interval | None:
    """A timed metric as a ratio to the baseline's, over the first `blocks`: paired by block where it can be."""
    if variant == evidence.baseline:
        return Interval(1.0, 1.0, 1.0, blocks)
    if metric.name.endswith(TAILS):
        return _tail_ratio(evidence, variant, metric, level, blocks)
    field = evidence.wall_field(metric)
    series = dict(list(evidence.series(variant, evidence.baseline, metric.workload, field).items())[:blocks])
    if not series:
        return None
    launches = evidence.launches_of(variant, evidence.baseline, metric.workload, series)
    sign = -1 if metric.name == "throughput" else 1
    return exp(stats.paired([sign * x for x in series.values()], level, launches))


def relative(evidence: Evidence, variant: str, metric: Metric, level: float = 0.95) -> Interval | None:
    """A metric of a whole variant as a ratio to the baseline's: paired by prompt where it can be."""
    if metric.name in ("perplexity", "length"):  # ratios by nature
        return figure(evidence, variant, metric, level)
    quality = evidence.plan.recipe.quality
    if metric.name == "validity" and not (quality and quality.tells_valid):
        return None
    if metric.name in ("accuracy", "validity"):
        ours, theirs = (_kept_as(metric.name, evidence.rows(name)) for name in (variant, evidence.baseline))
        return score_ratio(ours, theirs, level)
    if metric.name.startswith(TASK):
        mine, reference = (evidence.tasks[v].get(metric.name, {}) for v in (variant, evidence.baseline))
        return score_ratio(mine, reference, level)
    both = (1 + level) / 2
    own, base = (figure(evidence, v, metric, both) for v in (variant, evidence.baseline))
    if own is None or base is None or not base.estimate:
        return None
    low, high = max(own.low, 0.0) / base.high, own.high / base.low if base.low > 0 else math.inf
    return Interval(own.estimate / base.estimate, low, high, min(own.n, base.n), level)


def _kept_as(metric: str, answers: Rows) -> dict[str, float]:
    """1 for each answer that is right, or of the "validity" valid; 0 for the others."""
    return {row: float(a.valid if metric == "validity" else a.correct) for row, a in answers.items()}


def score_ratio(ours: Mapping[str, float], theirs: Mapping[str, float], level: float) -> Interval | None:
    """Mean score over the baseline's on the same rows: exact for rows that are right or wrong, and for rows that all
    kept their score; else by the delta method."""
    shared = sorted(ours.keys() & theirs.keys())
    if not any(theirs[row] for row in shared):
        return None
    mine, reference = [ours[row] for row in shared], [theirs[row] for row in shared]
    if mine != reference and not {*mine, *reference} <= {0.0, 1.0}:
        return stats.ratio_of_means(mine, reference, level)
    pairs = Counter((bool(a), bool(b)) for a, b in zip(mine, reference, strict=True))
    lost, won = pairs[False, True], pairs[True, False]
    return stats.kept(lost, lost + pairs[True, True], won, won + pairs[False, False], level)


def _tail_ratio(evidence: Evidence, variant: str, metric: Metric, level: float, blocks: int) -> Interval | None:
    """A block holds too few requests for its tail to be paired: the bounds are those of two intervals that share the
    error."""
    both = (1 + level) / 2
    own, base = (timed(evidence, v, metric, both, blocks) for v in (variant, evidence.baseline))
    if own is None or base is None:
        return None
    low = own.low / base.high if own.low > 0 else 0.0
    high = own.high / base.low if base.low > 0 else math.inf
    return Interval(own.estimate / base.estimate, low, high, min(own.n, base.n), level)


def against_limit(value: Interval, op: str, limit: float) -> Outcome:
    """Accept when the whole interval meets the limit, reject when the whole interval misses it."""
    passes = {
        "<=": lambda x: x <= limit,
        "<": lambda x: x < limit,
        ">=": lambda x: x >= limit,
        ">": lambda x: x > limit,
    }[op]
    low, high = passes(value.low), passes(value.high)
    return "accepted" if low and high else "inconclusive" if low or high else "rejected"


def _show(threshold: Threshold, value: Interval) -> str:
    def one(x: float) -> str:
        if not math.isfinite(x):
            return "unknown"
        return f"{x:.3g}x" if threshold.relative else format_value(threshold.metric.name, x)

    return f"{one(value.estimate)} ({one(value.low)} to {one(value.high)})"


# ---- all of a variant ----------------------------------------------------------------------------


def verdicts(evidence: Evidence, variant: Variant) -> tuple[Verdict, ...]:
    """All that is said of one variant: that it runs and is whole, the table's rules, the requirements."""
    if failure := evidence.failures.get(variant.name):
        outcome: Outcome = "not judged" if failure.reason in NOT_TRIED else "rejected"
        reason = f"{failure.stage} failed, {failure.reason}: {failure.detail}"
        reason = failure.sentence if failure.reason == SKIPPED else reason
        return (Verdict("artifact.runs", outcome, reason),)
    require = evidence.plan.recipe.require
    if variant.name == evidence.baseline:  # which is not measured against itself
        own = [t for t in require if not t.relative and not known(t.metric).compared]
        return tuple(requirement(evidence, variant.name, t) for t in own)
    found = [_intact(evidence, variant), *table_verdicts(evidence, variant), *whole(evidence, variant)]
    return (*found, *(requirement(evidence, variant.name, t) for t in require))


def _intact(evidence: Evidence, variant: Variant) -> Verdict:
    """Tier 0: nothing wrong with the files of any artifact in the chain."""
    builds = {b.id: b for b in evidence.plan.builds}
    wrong: list[str] = []
    at, checked = evidence.plan.models[variant.name], 0
    while at:
        if at in evidence.builds:
            checked += 1
            wrong += evidence.builds[at].tier0
        at = builds[at].parent
    kept = evidence.survival(variant.name)
    if kept and kept.high < LOST:
        wrong.append(f"the adapter is not at work: {percent(kept.estimate)} of its shift from the base is left")
    if wrong:
        return Verdict("artifact.intact", "rejected", "; ".join(wrong[:3]))
    if not checked and variant.steps:
        return Verdict("artifact.intact", "inconclusive", "its artifact was not built")
    if not checked:
        return Verdict("artifact.intact", "accepted", "nothing was built for it")
    return Verdict("artifact.intact", "accepted", "all weights are finite and the files match their hash")
