"""The decision in one sentence that needs no statistics. Pure: from the decision record to words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from peftopt.decision.rules.table import protects
from peftopt.metrics import HIGHER, counted, described, format_value
from peftopt.records import Decision, Interval, VariantDecision
from peftopt.report.table import speed_of
from peftopt.report.words import clean

TIMES = 1.5
"""A gain is given in times from this factor on, below in per cent."""
ALIKE = 0.95
"""Below this share of equal answers, a sentence also says how many answers got worse and better."""
MOST_NAMED = 3
"""Most variants that a sentence names; more are only counted."""

_NUMBERS = ("three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {2: "twice", **{n: f"{word} times" for n, word in enumerate(_NUMBERS, 3)}}


def headline(decision: Decision) -> str:
    """What to do, and its effect: "Ship compiled: 3.8 times as fast as today's adapter, the same answers on 99 %
    of prompts, 278 MB on disk."."""
    candidates = [variant for variant in decision.variants if variant.name != decision.baseline]
    if decision.outcome == "accepted":
        return clean(_ship(decision))
    if decision.outcome == "inconclusive":
        return clean(_undecided(decision, candidates))
    if decision.outcome == "rejected":
        return clean(_turned_down(decision, candidates))
    return clean(f"Keep today's {decision.baseline}: no other variant could be judged.")


def named(decision: Decision, name: str | None) -> VariantDecision | None:
    """The variant of that name, None if the decision has none."""
    return next((variant for variant in decision.variants if variant.name == name), None)


# ---- ship --------------------------------------------------------------------------------------


def _ship(decision: Decision) -> str:
    chosen = named(decision, decision.chosen)
    if chosen is None:
        return f"Ship {decision.chosen}."
    parts = [_gain(decision, chosen), same_answers(chosen), _on_disk(chosen)]
    gains = ", ".join(part for part in parts if part)
    return f"Ship {chosen.name}: {gains}." if gains else f"Ship {chosen.name}."


def _gain(decision: Decision, chosen: VariantDecision) -> str:
    """The gain in the minimized metric, against the baseline."""
    metric, _, workload = decision.minimize.partition("@")
    today = f"today's {decision.baseline}"
    if metric.startswith("latency."):
        return _speed(speed_of(decision, chosen, workload), today)
    spec = described(metric)
    before = named(decision, decision.baseline)
    ratio = quotient(chosen.figures.get(decision.minimize), before.figures.get(decision.minimize) if before else None)
    if spec is None or ratio is None:
        return ""
    if spec.better == HIGHER and ratio >= TIMES:
        return f"{_times(ratio)} the {spec.title} of {today}"
    return f"{_per_cent(ratio)} {spec.title} than {today}"


def _speed(ratio: Interval | None, today: str) -> str:
    """A ratio of times in words. Claims no difference that the interval does not show."""
    if ratio is None or not _positive(ratio.estimate):
        return ""
    if ratio.low <= 1 <= ratio.high:
        return f"no difference in speed shown to {today}"
    if ratio.estimate <= 1 / TIMES:
        return f"{_times(1 / ratio.estimate)} as fast as {today}"
    return f"{_per_cent(ratio.estimate)} time per request than {today}"


def same_answers(variant: VariantDecision) -> str:
    """On how many prompts the answers equal the baseline's. If many differ, also how many got worse; "" if unknown."""
    same = variant.figures.get("greedy_match")
    if same is None or not math.isfinite(same.estimate):
        return ""
    if same.estimate >= 1:
        return f"the same answers on all {same.n} prompts" if same.n > 1 else "the same answer"
    share = f"the same answers on {math.floor(100 * same.estimate)} % of prompts"
    return share if same.estimate >= ALIKE else ", ".join(filter(None, [share, worse_and_better(variant)]))


def worse_and_better(variant: VariantDecision) -> str:
    """ "2 answers of 200 got worse, 1 better": right answers lost and won; "" if unknown."""
    worse = variant.figures.get("flips_worse")
    better = variant.figures.get("flips_better")
    if worse is None or better is None or not math.isfinite(worse.estimate + better.estimate):
        return ""
    lost, won = round(worse.estimate), round(better.estimate)
    if not lost and not won:
        return "none got worse or better"
    return f"{lost} of {worse.n} got worse, {won} better"


def _on_disk(variant: VariantDecision) -> str:
    size = variant.figures.get("size")
    return f"{format_value('size', size.estimate)} on disk" if size and _positive(size.estimate) else ""


def quotient(ours: Interval | None, theirs: Interval | None) -> float | None:
    """Ours over theirs; None if either is unknown or not above 0."""
    if ours is None or theirs is None or not (_positive(ours.estimate) and _positive(theirs.estimate)):
        return None
    ratio = ours.estimate / theirs.estimate
    return ratio if _positive(ratio) else None


def _times(factor: float) -> str:
    """ "3.8 times", "four times", "12 times"."""
    if factor >= 9.95:
        return f"{factor:,.0f} times"
    text = f"{factor:.1f}"
    return _WORDS[round(factor)] if text.endswith(".0") else f"{text} times"


def _per_cent(ratio: float) -> str:
    """ "32 % less" or "20 % more"."""
    change = 100 * abs(1 - ratio)
    digits = 1 if change < 5 else 0
    return f"{change:.{digits}f} % {'less' if ratio < 1 else 'more'}"


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


# ---- keep --------------------------------------------------------------------------------------


def _undecided(decision: Decision, candidates: Sequence[VariantDecision]) -> str:
    """Which variants are open, and how long more measurements take to decide one."""
    still_open = [variant for variant in candidates if variant.outcome == "inconclusive"]
    names = _names([variant.name for variant in still_open], "or")
    sentence = f"Keep today's {decision.baseline} for now: whether {names} may replace it is not settled"
    minutes = [(wait, variant.name) for variant in still_open if (wait := _minutes(variant)) is not None]
    then = f" Next: {decision.next_step}" if decision.next_step else ""
    if not minutes:
        return f"{sentence}.{then}"
    wait, name = min(minutes)
    return f"{sentence}. About {counted(max(round(wait), 1), 'minute')} more of measuring would settle {name}.{then}"


def _minutes(variant: VariantDecision) -> float | None:
    """Minutes until the variant is decided; None if more blocks cannot decide it, or if that is not known."""
    waits = []
    for verdict in variant.verdicts:
        if verdict.outcome != "inconclusive":
            continue
        if verdict.hopeless or verdict.minutes_needed is None or not math.isfinite(verdict.minutes_needed):
            return None
        waits.append(verdict.minutes_needed)
    return max(waits, default=None)


def _turned_down(decision: Decision, candidates: Sequence[VariantDecision]) -> str:
    """The harms that the rules which rejected each variant protect from."""
    harms: dict[str, list[str]] = defaultdict(list)
    for variant in candidates:
        if variant.outcome == "rejected":
            harms[_harm(variant)].append(variant.name)
    parts = [f"{_names(names, 'and')} {harm}" for harm, names in list(harms.items())[:MOST_NAMED]]
    rest = sum(map(len, list(harms.values())[MOST_NAMED:]))
    more = [f"{rest} more were turned down"] if rest else []
    reasons = "; ".join([*parts, *more])
    return f"Keep today's {decision.baseline}: {reasons or 'no variant may replace it'}."


def _harm(variant: VariantDecision) -> str:
    """ "would miss size <= 0.7x" for a requirement, else the harm that the rule protects from."""
    prefix, _, requirement = variant.decided_by.partition("require: ")
    if requirement and not prefix:
        return f"would miss {requirement}"
    deciding = next((verdict for verdict in variant.verdicts if verdict.rule == variant.decided_by), None)
    harm = (deciding.protects if deciding else "") or protects(variant.decided_by)
    return f"would risk {harm}" if harm else f"was turned down by {variant.decided_by or 'a rule'}"


def _names(names: Sequence[str], link: str) -> str:
    """ "merged, int8 or gptq4"; more than three are counted."""
    if len(names) > MOST_NAMED:
        return f"any of {len(names)} variants" if link == "or" else f"{len(names)} variants"
    if len(names) < 2:
        return "".join(names) or "any variant"
    return f"{', '.join(names[:-1])} {link} {names[-1]}"
