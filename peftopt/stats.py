"""Samples -> intervals, and intervals -> outcomes: the rules of docs/verdicts.md as pure functions.

Bounds that the data cannot support are infinite, and an infinite bound clears no limit: too little data is
inconclusive by construction, never a pass. Samples that are not finite are refused with ValueError.
"""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from peftopt.records import Interval, Outcome

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

LOOKS = (10, 16, 24, 40, 60)
"""Numbers of blocks at which a race is judged, and at no others; see `looks` for the first."""

ALPHA = 0.02
"""Two-sided error of a whole race, however long it goes on."""

LOOK_SHARES, BETS_SHARE = (0.1, 0.1, 0.125, 0.175, 0.35), 0.15
"""Of ALPHA, what each look may err and what the bets may: little early, where only clear cases are decided, the most at
the last look, and some for the blocks that may be added after it."""

BETS = (0.15, 0.3, 0.5, 0.7)
"""Shares of the wealth staked on a block; all wealths are averaged, so none has to be the right one."""

REACH = 1.5
"""Median absolute deviations off the limit (1.5: one sigma) at which a block counts fully in `bet`."""

MOST_BLOCKS = 9_999
"""Where the planner stops counting: the limit lies at the estimate, and no number of blocks will tell."""

MOST_WALSH = 1_000
"""Blocks of which all Walsh averages are held at once: half a million."""

LAUNCHES_TO_COMPARE = 5
"""Launches from which it can be seen that they do not differ."""

LAUNCHES_SHOWN = 0.2
"""The chance that launches which do not differ seem to: high, since missing that they do makes verdicts wrong."""

COARSE = 0.1
"""The share of repeated times from which a clock counts as coarse."""

REQUIRE_ALPHA = 0.05
"""Two-sided error of one requirement (`require:`), over all the looks at it."""

Launches = Sequence[int] | None
"""For each block the number of the launch it belongs to, in order; None where each block is a launch of its own."""


@dataclass(frozen=True)
class Race:
    """What the blocks say of one limit.

    `look` is the number of blocks it was judged at (0: none yet); `interval` is theirs, on the log scale, and holds
    whether blocks or launches vary more. `blocks_needed` is the planner's total for an inconclusive race (where
    launches may differ, that of as many launches as it takes), None when decided or without data. `test` is what
    judged: a planned "look", or the "bets". `launches` is how many launches the blocks come from, `launches_needed` the
    planner's total where blocks alone would have decided.
    """

    outcome: Outcome
    interval: Interval
    look: int
    blocks_needed: int | None
    test: str = "look"
    launches: int = 0
    launches_needed: int | None = None


# ---- speed: paired blocks ----------------------------------------------------------------------


def hodges_lehmann(d: Iterable[float], level: float) -> Interval:
    """The centre of symmetric differences (any unit), with the exact Wilcoxon signed-rank interval.

    The bounds are Walsh averages (x_i + x_j) / 2, infinite when n is too small for `level`. Work: n^3.
    Source: Hodges and Lehmann 1963; Hollander, Wolfe and Chicken 2014, section 3.3.
    """
    import numpy as np

    x = _finite(d)
    if not len(x):
        return _unknown(0, level)
    averages = np.sort(_walsh(x))
    cut = _signed_rank_cut(len(x), (1 - level) / 2)
    low, high = (averages[cut - 1], averages[-cut]) if cut else (-math.inf, math.inf)
    return Interval(float(np.median(averages)), float(low), float(high), len(x), level)


def looks(family: int = 1) -> tuple[int, ...]:
    """LOOKS for so many variants. The first comes as soon as it can decide anything: n blocks that all point one way
    have a probability of 2 / 2^n, which must not exceed what the first look may err."""
    first = 1 + math.ceil(math.log2(family / (LOOK_SHARES[0] * ALPHA)))
    return (min(max(first, LOOKS[0]), LOOKS[1] - 1), *LOOKS[1:])


def next_look(blocks: int) -> int:
    """The planned look at so many blocks, or the first after them: between two of them a race is judged by bets alone,
    which decide later. Past the last, the blocks themselves."""
    return next((look for look in LOOKS if look >= blocks), blocks)


def race(
    d: Iterable[float],
    limit: float,
    family: int = 1,
    open_ended: bool = False,
    launches: Launches = None,
    resolution: float = 0.0,
) -> Race:
    """Is the variant below `limit`? `d` is log(variant / reference) per block, in order; `limit` a log ratio.

    Judged at the planned looks, each with an interval, and by bets, which may be judged at any launch; whatever
    decides first is final. Each has its share of ALPHA from the start, so blocks may be added to an inconclusive race
    as often as one likes: all looks and bets at all variants of the `family` together err ALPHA at most (Bonferroni).
    `open_ended`: a race that was planned to go on past the looks is judged by bets alone, which then have all of ALPHA.

    Blocks of one launch share its fate: an interval spans launches where they may differ (see `paired`), and bets are
    placed on whole launches. `resolution` is how far a coarse clock may have moved a log ratio: the interval must clear
    the limit by as much. Raises ValueError for a family of none, and log ratios that are not finite.
    """
    x = _finite(d)
    groups = _groups(launches, len(x))
    if family < 1:
        raise ValueError(f"family must be 1 or more variants, found {family}")
    alpha = (1 if open_ended else BETS_SHARE) * ALPHA / 2 / family
    won = _bets(x, _past_scale(x), groups, limit, alpha, resolution)[1]
    reached = [] if open_ended else [look for look in looks(family) if look <= len(x)]
    for look in reached:
        if won < look:
            break
        interval = paired(x[:look], _level(look, family), groups[:look])
        if (outcome := judge(interval, limit, resolution)) != "inconclusive":
            return Race(outcome, interval, look, None, launches=len(set(groups[:look])))
    if open_ended or won <= len(x) or len(x) > LOOKS[-1]:
        return bet(x, limit, alpha, family, groups, resolution)
    look = reached[-1] if reached else 0
    seen, level = x[: look or len(x)], _level(look or looks(family)[0], family)
    launched = groups[: len(seen)]
    interval, count = paired(seen, level, launched), len(set(launched))
    needed = _blocks_needed(x, _centre(x), limit, family)
    alone = judge(hodges_lehmann(seen, level), limit, resolution)
    more = _launches_needed(seen, launched, limit, level) if count < len(seen) else 0
    if needed and launches_matter(seen, launched):  # as many launches as that have blocks too
        needed = max(needed, min(math.ceil(more * len(seen) / count), MOST_BLOCKS))
    more_launches = None if alone == "inconclusive" else more
    return Race("inconclusive", interval, look, needed, launches=count, launches_needed=more_launches)


def paired(d: Iterable[float], level: float, launches: Launches = None) -> Interval:
    """The centre of log ratios of blocks, with an interval that holds where launches vary too.

    That is the exact Wilcoxon interval over blocks. Where launches seem to differ, or are too few to show that they do
    not, it also spans one over the centres of launches: the exact one where there are enough of them for `level`, else
    Student's t. One launch has no interval: what differs between launches was not seen.
    Source: Kalibera and Jones 2013 (repeat at the level at which the variance arises).
    """
    x = _finite(d)
    groups = _groups(launches, len(x))
    over_blocks = hodges_lehmann(x, level)
    if len(set(groups)) == len(x) or not launches_matter(x, groups):
        return over_blocks
    centres = _centres(x, groups)
    over_launches = hodges_lehmann(centres, level)
    if not math.isfinite(over_launches.low):
        over_launches = mean(centres, level)
    low, high = min(over_blocks.low, over_launches.low), max(over_blocks.high, over_launches.high)
    return replace(over_blocks, low=low, high=high)


def launches_matter(d: Iterable[float], launches: Sequence[int]) -> bool:
    """Whether blocks of one launch may be more alike than others: there are fewer than LAUNCHES_TO_COMPARE, or an
    analysis of variance over the ranks of blocks says so, at a level at which it rarely misses what would spoil a
    verdict."""
    import numpy as np
    from scipy.stats import rankdata

    x = _finite(d)
    blocks = [np.array(found) for found in _blocks_of(launches)]
    if len(blocks) < LAUNCHES_TO_COMPARE:
        return True
    ranks = rankdata(x)
    groups, rest = len(blocks) - 1, len(x) - len(blocks)
    if rest < 1:
        return False
    between = sum(len(found) * (ranks[found].mean() - ranks.mean()) ** 2 for found in blocks)
    within = sum(np.square(ranks[found] - ranks[found].mean()).sum() for found in blocks)
    return not within or exceeds(between / groups / (within / rest), groups, rest, 1 - LAUNCHES_SHOWN)


def resolution(times: Iterable[float]) -> float:
    """The step of the clock that took these times, relative to their median; 0 where it tells them apart.

    A clock counts as coarse when a tenth of its readings repeat others. Its step is the least gap between two of them.
    """
    import numpy as np

    x = np.sort(_finite(times))
    gaps = np.diff(x)
    fine = gaps[gaps > 1e-9 * x[1:]] if len(x) else gaps
    if not len(fine) or len(gaps) - len(fine) < COARSE * len(x):
        return 0.0
    return float(fine.min() / np.median(x))


def planned_looks(blocks: int, most: int) -> list[tuple[int, float]]:
    """The looks at a requirement that so many blocks reach, each with the share of its error; the first that decides
    is final, and more blocks spend nothing twice.

    Looks are those of LOOKS below `most`, which the recipe plans for, and `most` itself, which has all that is left
    but BETS_SHARE; blocks that are granted later are judged at doubled numbers, each with half the share of the last.
    """
    part = 0.5 if most > LOOKS[-1] else 1.0
    found = [(look, part * share) for look, share in zip(LOOKS, LOOK_SHARES, strict=True) if look < most]
    found.append((most, 1 - BETS_SHARE - sum(share for _, share in found)))
    look, share = 2 * most, BETS_SHARE / 2
    while look <= blocks:
        found.append((look, share))
        look, share = 2 * look, share / 2
    return [each for each in found if each[0] <= blocks]


def out_of_reach(d: Iterable[float], limit: float, most: int, family: int = 1) -> bool:
    """Whether `most` blocks would hardly decide the race, even if the truth lay at the far end of its 99 % interval and
    half of what the planner then asks for were enough.

    A race that its budget cannot decide is better not run to the end. Stopping makes no wrong verdict, only none.
    """
    x = _finite(d)
    if len(x) < LOOKS[0]:
        return False
    interval = hodges_lehmann(x, 0.99)
    needed = (_blocks_needed(x, end, limit, family) for end in (interval.low, interval.high))
    return all(n is not None and n > 2 * most for n in needed)


def judge(interval: Interval, limit: float, resolution: float = 0.0) -> Outcome:
    """Accepted when the whole interval lies below the limit, by more than the clock's `resolution`; rejected when it
    lies above, inconclusive otherwise."""
    if interval.high < limit - resolution:
        return "accepted"
    return "rejected" if interval.low > limit + resolution else "inconclusive"


def bet(
    d: Iterable[float],
    limit: float,
    alpha: float = 0.01,
    family: int = 1,
    launches: Launches = None,
    resolution: float = 0.0,
) -> Race:
    """`race` for runs that stop or resume at any launch: errs `alpha` a side at most, however often judged.

    A gambler stakes on the blocks of each next launch falling below the limit, and a second one on above. If the truth
    is not below, the first gains nothing on average: the chance that its wealth ever passes 1 / alpha is alpha
    at most (Ville). Scores are bounded, scaled by blocks of past launches only, and averaged over the launch, whose
    blocks share its fate. The interval, at 1 - 2 alpha, holds every limit at which neither has won. `look` is the block
    that decided; `family` only tells the planner.
    Source: Waudby-Smith and Ramdas 2023, "Estimating means of bounded random variables by betting".
    """
    x = _finite(d)
    return _bet(x, _past_scale(x), _groups(launches, len(x)), float(limit), alpha, family, resolution)


class Gamblers:
    """`bet` on blocks that come one by one, each a launch of its own, and are judged after every one of them: a block
    costs a pass over those before it, in place of a pass for each. `outcome`: what `bet` says of all blocks so far."""

    def __init__(self, limit: float, alpha: float = 0.01) -> None:
        import numpy as np

        self.limit, self.alpha = float(limit), alpha
        self.outcome: Outcome = "inconclusive"
        self._blocks, self._scale = array("d"), array("d")
        self._held = {side: np.zeros(len(BETS)) for side in (-1, 1)}

    def __len__(self) -> int:
        """How many blocks were bet on: none after the one that decided."""
        return len(self._blocks)

    def add(self, block: float) -> None:
        """The next block. Raises ValueError for one that is not finite."""
        import numpy as np

        if self.outcome != "inconclusive":
            return
        known = _reach(np.array(self._blocks))
        score = _scores(_finite([block]) - self.limit, np.array([known]))
        self._blocks.append(block)
        self._scale.append(known)
        sides: tuple[tuple[Outcome, int], ...] = (("accepted", -1), ("rejected", 1))
        for outcome, side in sides:
            self._held[side] += _gains(score, side)[:, 0]
            if _mixed(self._held[side]) > -math.log(self.alpha):
                self.outcome = outcome

    def race(self) -> Race:
        """All that `bet` says of the blocks so far."""
        import numpy as np

        x, scale = np.array(self._blocks), np.array(self._scale)
        return _bet(x, scale, range(len(x)), self.limit, self.alpha, 1, 0.0)


# ---- tails and rates: counts -------------------------------------------------------------------


def quantile(samples: Iterable[float], q: float, level: float = 0.95) -> Interval:
    """The q-quantile (unit of the samples) with its exact, equal-tailed interval from order statistics.

    A bound that no order statistic reaches is infinite: P95 at 95 % has an upper bound from n = 72 on.
    Source: David and Nagaraja 2003, "Order Statistics", section 7.1.
    """
    import numpy as np

    x = np.sort(_finite(samples))
    return _quantile_of(x, len(x), q, level)


def quantile_of_groups(groups: Iterable[Iterable[float]], q: float, level: float = 0.95) -> Interval:
    """`quantile` of samples whose groups (launches, or blocks) share their fate; inf stands for a failed request.

    Samples of one group say less than as many independent ones. The design effect at the quantile, from the spread of
    the groups' shares below it, says how much less; with few groups that is itself uncertain, so the effective number
    of samples is also cut by a ratio of t quantiles. One group has no interval.
    Source: Woodruff 1952 (inverting the share); Korn and Graubard 1998 (effective number of samples).
    """
    import numpy as np

    parts = [np.array(list(group), dtype=float) for group in groups]
    parts = [part for part in parts if len(part)]
    x = np.sort(np.concatenate(parts)) if parts else np.array([])
    if np.isnan(x).any():
        raise ValueError("samples must be numbers")
    if len(parts) < 2:
        return replace(_quantile_of(x, len(x), q, level), low=-math.inf, high=math.inf)
    n = len(x)
    centre = x[min(math.ceil(q * n), n) - 1]
    below = np.array([(part <= centre).sum() for part in parts])
    sizes = np.array([len(part) for part in parts])
    return _quantile_of(x, math.floor(_effective(below, sizes, level)), q, level)


def share_of_groups(counts: Iterable[tuple[int, int]], level: float = 0.95) -> Interval:
    """The share k / n over groups (k, n) that share their fate, with the exact interval of as many independent samples
    as they are worth: see `quantile_of_groups`. One group has no interval. Source: Korn and Graubard 1998."""
    import numpy as np

    groups = [(k, n) for k, n in counts if n]
    k, n = sum(k for k, _ in groups), sum(n for _, n in groups)
    if len(groups) < 2:
        return replace(_unknown(n, level), estimate=k / n if n else math.nan)
    effective = _effective(np.array([k for k, _ in groups]), np.array([n for _, n in groups]), level)
    low = 1 - upper_bound((1 - k / n) * effective, effective, (1 + level) / 2)
    return Interval(k / n, low, upper_bound(k / n * effective, effective, (1 + level) / 2), n, level)


def fewest_for(q: float, level: float = 0.95) -> int:
    """The fewest samples from which the q-quantile has a finite interval: 72 for P95 at 95 %, 368 for P99."""
    if not 0 < q < 1:
        raise ValueError(f"q must lie between 0 and 1, found {q}")
    return math.ceil(math.log((1 - level) / 2) / math.log(max(q, 1 - q)))


def proportion(k: int, n: int, level: float = 0.95) -> Interval:
    """The share k / n with its exact two-sided interval. Source: Clopper and Pearson 1934."""
    tail = (1 - level) / 2
    low = 1 - upper_bound(n - k, n, 1 - tail)
    return Interval(k / n if n else math.nan, low, upper_bound(k, n, 1 - tail), n, level)


def upper_bound(k: float, n: float, confidence: float = 0.95) -> float:
    """The highest rate that k events in n trials leave open, one-sided and exact; 1 - 0.05^(1/n) for k = 0.

    Source: Clopper and Pearson 1934; Eypasch et al. 1995 for k = 0.
    """
    from scipy.special import betaincinv

    if not 0 <= k <= n:
        raise ValueError(f"k must lie between 0 and n, found {k} of {n}")
    if k == 0 and n:
        return -math.expm1(math.log1p(-confidence) / n)
    return float(betaincinv(k + 1, n - k, confidence)) if k < n else 1.0


def needed_n(rate: float, family: int = 1, confidence: float = 0.95) -> int:
    """The fewest prompts that bound the rate below `rate` when none fails, for `family` variants together.

    299 for 1 %, 2,995 for 0.1 %. Source: Eypasch et al. 1995; Bonferroni over the family.
    """
    if not 0 < rate < 1 or family < 1:
        raise ValueError(f"needs a rate between 0 and 1 and a family of 1 or more, found {rate} and {family}")
    return math.ceil(math.log((1 - confidence) / family) / math.log1p(-rate))


def flips(worse: int, better: int) -> float:
    """One-sided exact p-value that the variant is worse: prompts now wrong that were right, and the reverse.

    Source: McNemar 1947, the exact form; Dutta et al. 2024, arXiv 2407.09141, on flips against accuracy.
    """
    from scipy.special import bdtrc

    if min(worse, better) < 0:
        raise ValueError(f"counts must be 0 or more, found {worse} and {better}")
    return float(bdtrc(worse - 1, worse + better, 0.5)) if worse else 1.0


MOSTLY = 0.8
"""Of the error of an interval for a difference, what the larger part has: the variant's own failures."""


def excess(worse: int, better: int, n: int, level: float = 0.95) -> Interval:
    """The share of `n` pairs in which only the variant failed, less the share in which only the reference did.

    Bounds are those of two exact intervals that share the error, so they hold for any n, also where none failed.
    Source: Clopper and Pearson 1934; Bonferroni over the two.
    """
    ours, theirs = proportion(worse, n, 1 - MOSTLY * (1 - level)), proportion(better, n, 1 - (1 - MOSTLY) * (1 - level))
    estimate = (worse - better) / n if n else math.nan
    return Interval(estimate, ours.low - theirs.high, ours.high - theirs.low, n, level)


def kept(lost: int, right: int, won: int, wrong: int, level: float = 0.95) -> Interval:
    """A share of right answers as a ratio to the reference's: of its `right` ones `lost` are wrong now, of its `wrong`
    ones `won` are right now. Exact given what the reference got right: two intervals that share the error."""
    if not right:
        return _unknown(0, level)
    down, up = proportion(lost, right, 1 - MOSTLY * (1 - level)), proportion(won, wrong, 1 - (1 - MOSTLY) * (1 - level))
    gain = wrong / right
    low, high = 1 - down.high + gain * up.low, 1 - down.low + gain * up.high
    return Interval((right - lost + won) / right, low, high, right + wrong, level)


# ---- two runs: what their intervals show ---------------------------------------------------------


def difference(ours: Interval, theirs: Interval) -> Interval:
    """The difference, ours - theirs, of two independent estimates (any unit), at their intervals' level, which is one.

    Bounds lie as far off as the root of the summed squares of how far those of the two do, each on its own side, so
    neither has to be symmetric or as wide as the other. Where an interval at the level is not to be had, `welch` finds
    it from one at another. For means of normal samples the interval holds at least its
    level whatever their variances and sizes are. Raises ValueError for two levels.
    Source: Zou and Donner 2008 (recovering variances from limits); Banerjee 1961 (the level).
    """
    if ours.level != theirs.level:
        raise ValueError(f"both intervals must have one level, found {ours.level} and {theirs.level}")
    estimate = ours.estimate - theirs.estimate
    down = math.hypot(ours.estimate - ours.low, theirs.high - theirs.estimate)
    up = math.hypot(ours.high - ours.estimate, theirs.estimate - theirs.low)
    low, high = (estimate - down, estimate + up) if math.isfinite(estimate) else (-math.inf, math.inf)
    return Interval(estimate, low, high, min(ours.n, theirs.n), ours.level)


def welch(ours: Interval, theirs: Interval, level: float = 0.95) -> Interval:
    """`ours` less `theirs` at any `level`, of two independent samples that are known by their intervals alone; of
    ratios give logs.

    A side of an interval shows a standard error by Student's t with n - 1 degrees of freedom; a bound takes those of
    the two sides that face each other. Infinite where a side is, and where it shows no error though n is more than 1:
    samples that happen to agree. One exact value (n = 1) has none. `n` stands for the degrees of freedom of the
    difference, so that it can be compared again.
    Source: Welch 1947 (degrees of freedom); Zou and Donner 2008 (facing sides).
    """
    estimate = ours.estimate - theirs.estimate
    if math.isnan(estimate):
        return _unknown(0, level)
    down, down_freedom = _reach_of(ours, ours.low, theirs, theirs.high, level)
    up, up_freedom = _reach_of(ours, ours.high, theirs, theirs.low, level)
    return Interval(estimate, estimate - down, estimate + up, 1 + min(down_freedom, up_freedom), level)


def _reach_of(ours: Interval, ours_to: float, theirs: Interval, theirs_to: float, level: float) -> tuple[float, int]:
    """How far off the difference its bound lies, and the degrees of freedom of that: 0 and 0 of two exact values."""
    from scipy.special import stdtrit

    errors = ((_error(ours, ours_to), ours.n - 1), (_error(theirs, theirs_to), theirs.n - 1))
    total = math.hypot(*(error for error, _ in errors))
    if not total or not math.isfinite(total):
        return total, 0
    parts = sum((error / total) ** 4 / n for error, n in errors if error)
    freedom = max(1, math.floor(1 / parts + 1e-9))
    return float(stdtrit(freedom, (1 + level) / 2)) * total, freedom


def _error(interval: Interval, bound: float) -> float:
    """The standard error that a side of an interval shows; 0 of one exact value, infinite where it cannot be told."""
    from scipy.special import stdtrit

    if interval.low == interval.high:
        return 0.0 if interval.n == 1 else math.inf
    if interval.n < 2 or math.isnan(bound) or math.isnan(interval.level):
        return math.inf
    return float(abs(bound - interval.estimate) / stdtrit(interval.n - 1, (1 + interval.level) / 2))


# ---- quality: means over prompts ---------------------------------------------------------------


def mean(samples: Iterable[float], level: float = 0.95) -> Interval:
    """The mean (unit of the samples) over independent prompts with its t interval, infinite below n = 2."""
    x = _finite(samples)
    return ratio_of_means(x, [1.0] * len(x), level)


def ratio_of_means(num: Iterable[float], den: Iterable[float], level: float = 0.95) -> Interval:
    """sum(num) / sum(den) over prompts, each prompt one cluster, by the delta method with a t quantile.

    `num` in any unit, `den` >= 0 (a count of tokens); ValueError for others, and where they differ in length.
    Source: Miller 2024, arXiv 2411.00640, section 2.2.
    """
    import numpy as np
    from scipy.special import stdtrit

    a, b = _finite(num), _finite(den)
    n = len(a)
    if n != len(b) or (b < 0).any():
        raise ValueError("num and den must be as long as each other, and den 0 or more")
    if not b.sum() > 0:
        return _unknown(n, level)
    ratio = float(a.sum() / b.sum())
    if n < 2:
        return Interval(ratio, -math.inf, math.inf, n, level)
    error = math.sqrt(n / (n - 1)) * float(np.linalg.norm(a - ratio * b) / b.sum())
    half = float(stdtrit(n - 1, (1 + level) / 2)) * error
    return Interval(ratio, ratio - half, ratio + half, n, level)


def perplexity_ratio(
    nll_variant: Iterable[float], nll_reference: Iterable[float], tokens: Iterable[float], level: float = 0.95
) -> Interval:
    """Perplexity of the variant over the reference's, from each prompt's summed nll (nats) and its tokens. Raises
    ValueError where the three differ in length."""
    variant, reference = _finite(nll_variant), _finite(nll_reference)
    if len(variant) != len(reference):
        raise ValueError("the variant and the reference must score the same prompts")
    gap = ratio_of_means(variant - reference, tokens, level)
    return Interval(_exp(gap.estimate), _exp(gap.low), _exp(gap.high), gap.n, level)


def exceeds(ratio: float, groups: int, rest: int, level: float = 0.99) -> bool:
    """Whether a ratio of mean squares is more than chance: the F test with `groups` and `rest` degrees of freedom."""
    from scipy.special import fdtr

    return bool(fdtr(groups, rest, ratio) > level)


def slope(x: Iterable[float], y: Iterable[float]) -> float:
    """The slope of the least-squares line of y (any unit) over x, which must not be all the same."""
    import numpy as np

    a, b = _finite(x), _finite(y)
    centred = a - a.mean()
    return float(centred @ b / np.square(centred).sum())


def median(xs: Iterable[float]) -> float:
    """The median (unit of the samples); nan of nothing."""
    x = list(xs)
    return float(statistics.median(x)) if x else math.nan


# ---- parts -------------------------------------------------------------------------------------


def _finite(samples: Iterable[float]) -> Array:
    import numpy as np

    x = np.array(samples if isinstance(samples, np.ndarray) else list(samples), dtype=float)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise ValueError("samples must be a row of finite numbers")
    return x


def _effective(below: Array, sizes: Array, level: float) -> float:
    """How many independent samples two or more groups are worth, of which so many are `below` something."""
    import numpy as np
    from scipy.special import stdtrit

    n, groups, tail = int(sizes.sum()), len(sizes), (1 + level) / 2
    share = below.sum() / n
    between = groups / (groups - 1) * np.square(below - share * sizes).sum()
    alone = n * share * (1 - share)
    effect = max(between / alone, 1.0) if alone else 1.0
    few = (stdtrit(n - 1, tail) / stdtrit(groups - 1, tail)) ** 2
    return float(n / effect * few)


def _quantile_of(ordered: Array, effective: int, q: float, level: float) -> Interval:
    """The q-quantile of ordered samples, with the bounds that so many independent ones would give."""
    import numpy as np
    from scipy.special import bdtr

    if not 0 < q < 1:
        raise ValueError(f"q must lie between 0 and 1, found {q}")
    n = len(ordered)
    if not n:
        return _unknown(0, level)
    at_most = bdtr(np.arange(effective), effective, q)  # P(k or fewer of the samples lie below the quantile)
    lower = int(np.searchsorted(at_most, (1 - level) / 2, side="right"))
    upper = int(np.searchsorted(at_most, 1 - (1 - level) / 2, side="left")) + 1
    low = float(ordered[lower * n // effective - 1]) if lower else -math.inf
    high = float(ordered[-(-upper * n // effective) - 1]) if upper <= effective else math.inf
    finite = ordered[np.isfinite(ordered)]
    middle = np.quantile(ordered, q) if len(finite) == n else ordered[math.ceil(q * n) - 1]
    return Interval(float(middle), low, high, n, level)


def _unknown(n: int, level: float) -> Interval:
    return Interval(math.nan, -math.inf, math.inf, n, level)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else x * math.inf


def _walsh(x: Array) -> Array:
    import numpy as np

    i, j = np.triu_indices(len(x))
    averages: Array = x[i] / 2 + x[j] / 2
    return averages


def _centre(x: Array) -> float:
    """The Hodges-Lehmann estimate; nan of nothing."""
    import numpy as np

    if len(x) > MOST_WALSH:
        return _centre_of_many(x)
    return float(np.median(_walsh(x))) if len(x) else math.nan


def _centre_of_many(x: Array) -> float:
    """The same where the Walsh averages are too many to hold: those below a value are counted, by bisection."""
    import numpy as np

    halves = np.sort(x) / 2
    total = len(x) * (len(x) + 1) // 2

    def at_most(value: float) -> int:
        ordered_pairs = np.searchsorted(halves, value - halves, side="right").sum()
        of_one_block = np.searchsorted(2 * halves, value, side="right")
        return int(ordered_pairs + of_one_block) // 2

    def ranked(rank: int) -> float:
        low, high = 2 * halves[0], 2 * halves[-1]
        for _ in range(60):
            middle = low / 2 + high / 2
            low, high = (low, middle) if at_most(middle) >= rank else (middle, high)
        return float(high)

    return ranked((total + 1) // 2) / 2 + ranked(total // 2 + 1) / 2


@lru_cache(maxsize=1024)
def _signed_rank_cut(n: int, tail: float) -> int:
    """How many Walsh averages lie outside the interval on each side: the most k with P(W <= k - 1) <= tail.

    W, the signed-rank statistic, sums each rank 1..n with probability 1/2.
    """
    import numpy as np

    probability = np.zeros(n * (n + 1) // 4 + 1)  # the lower half
    probability[0] = 1.0
    for rank in range(1, n + 1):
        half = probability / 2
        half[rank:] += probability[:-rank] / 2
        probability = half
    return int(np.searchsorted(np.cumsum(probability), tail, side="right"))


def _level(look: int, family: int) -> float:
    """The level of the interval at a planned look."""
    share = LOOK_SHARES[looks(family).index(look)]
    return 1 - share * ALPHA / family


def _groups(launches: Launches, blocks: int) -> Sequence[int]:
    """The launch of each block."""
    groups = range(blocks) if launches is None else launches
    if len(groups) != blocks:
        raise ValueError(f"{blocks} blocks need as many launch numbers, found {len(groups)}")
    return groups


def _blocks_of(launches: Sequence[int]) -> list[list[int]]:
    """The blocks of each launch, in the order in which launches ended."""
    at: dict[int, list[int]] = {}
    for block, group in enumerate(launches):
        at.setdefault(group, []).append(block)
    return sorted(at.values(), key=lambda blocks: blocks[-1])


def _centres(x: Array, groups: Sequence[int]) -> Array:
    """The centre of each launch's blocks."""
    import numpy as np

    return np.array([_centre(x[blocks]) for blocks in _blocks_of(groups)])


def _launches_needed(x: Array, groups: Sequence[int], limit: float, level: float) -> int:
    """The fewest launches whose t interval would clear the limit, if they vary as those seen do, or as blocks where
    one launch is all there is."""
    import numpy as np
    from scipy.special import stdtrit

    centres = _centres(x, groups)
    spread = float(np.std(centres if len(centres) > 1 else x, ddof=1))
    delta = abs(_centre(x) - limit)
    return next(
        (n for n in range(len(centres) + 1, 200) if stdtrit(n - 1, (1 + level) / 2) * spread < delta * math.sqrt(n)),
        200,
    )


def _deviation(x: Array) -> float:
    """The median absolute deviation from the median."""
    import numpy as np

    return float(np.median(np.abs(x - np.median(x))))


def _past_scale(x: Array) -> Array:
    """For each block, how far off the limit it counts fully."""
    import numpy as np

    return np.array([_reach(x[:blocks]) for blocks in range(len(x))])


def _reach(past: Array) -> float:
    """How far off the limit the block after these counts fully: known before the block, so bets are fair."""
    import numpy as np

    return REACH * _middle(np.abs(past - _middle(past))) if len(past) else 0.0


def _middle(x: Array) -> float:
    """The median, in a pass over the values; the halves are added, since a sum may be too large."""
    import numpy as np

    low, high = (len(x) - 1) // 2, len(x) // 2
    ordered = np.partition(x, (low, high))
    return float(ordered[low] / 2 + ordered[high] / 2)


def _bet(
    x: Array, scale: Array, groups: Sequence[int], limit: float, alpha: float, family: int, resolution: float
) -> Race:
    """What `bet` says of blocks, with the scale of each."""
    level = 1 - 2 * alpha
    outcome, won = _bets(x, scale, groups, limit, alpha, resolution)
    look = min(won, len(x))
    if not look:
        return Race("inconclusive", _unknown(0, level), 0, None, "bets")
    x, scale, groups = x[:look], scale[:look], groups[:look]
    margin = float(scale.max()) + 1
    floor, ceiling = float(x.min()) - margin, float(x.max()) + margin

    def edge(side: int, won: float, lost: float) -> float:
        """The limit nearest to `lost` at which this gambler wins, by bisection: wealth is monotone in it."""
        if _first_win(x, scale, groups, won, side, alpha) > look:
            return -side * math.inf
        for _ in range(40):
            middle = (won + lost) / 2
            wins = _first_win(x, scale, groups, middle, side, alpha) <= look
            won, lost = (middle, lost) if wins else (won, middle)
        return won

    high = edge(-1, limit - resolution if outcome == "accepted" else ceiling, floor)
    low = edge(1, limit + resolution if outcome == "rejected" else floor, ceiling)
    interval = Interval(_centre(x), low, high, look, level)
    needed = _blocks_needed(x, interval.estimate, limit, family) if outcome == "inconclusive" else None
    return Race(outcome, interval, look, needed, "bets", launches=len(set(groups)))


def _bets(
    x: Array, scale: Array, groups: Sequence[int], limit: float, alpha: float, resolution: float
) -> tuple[Outcome, int]:
    """What the gamblers say, and the block at which the first of them has won; n + 1 for never."""
    below, above = (_first_win(x, scale, groups, limit + side * resolution, side, alpha) for side in (-1, 1))
    if below == above:
        return "inconclusive", len(x) + 1
    return ("accepted", below) if below < above else ("rejected", above)


def _first_win(x: Array, scale: Array, groups: Sequence[int], limit: float, side: int, alpha: float) -> int:
    """The block at which the gambler on `side` (-1 below, 1 above) first holds 1 / alpha; n + 1 for never."""
    import numpy as np

    wealth, ends = _log_wealth(x, scale, groups, limit, side)
    won = wealth > -math.log(alpha)
    return ends[int(np.argmax(won))] if won.any() else len(x) + 1


def _log_wealth(x: Array, scale: Array, groups: Sequence[int], limit: float, side: int) -> tuple[Array, list[int]]:
    """(what the gambler holds after each launch, from a stake of 1; how many blocks there were by then). A last launch
    that has fewer blocks than others had may still be going on, and is not counted."""
    import numpy as np

    blocks = _blocks_of(groups)
    if blocks and len(blocks[-1]) < max(map(len, blocks)):
        blocks.pop()
    sizes = [len(found) for found in blocks]
    known = np.repeat(scale[[found[0] for found in blocks]], sizes)  # what was known before the launch
    gap = x[[block for found in blocks for block in found]] - limit
    scores = _scores(gap, known)
    starts = np.cumsum([0, *sizes[:-1]]) if sizes else np.array([], dtype=int)
    means = np.add.reduceat(scores, starts) / sizes if sizes else scores
    each: Array = np.cumsum(_gains(means, side), axis=1)
    return _mixed(each), [found[-1] + 1 for found in blocks]


def _scores(gap: Array, known: Array) -> Array:
    """How far blocks lie off the limit, as shares of what counts fully; a block without a past counts by its sign."""
    import numpy as np

    return np.where(known > 0, np.clip(gap, -known, known) / np.where(known > 0, known, 1), np.sign(gap))


def _gains(means: Array, side: int) -> Array:
    """What each bet gains or loses by each launch (bets x launches), logs."""
    import numpy as np

    gains: Array = np.log1p(side * np.outer(BETS, means))
    return gains


def _mixed(each: Array) -> Array:
    """What a gambler holds whose stake is shared between all bets, log."""
    import numpy as np

    mixed: Array = np.logaddexp.reduce(each, axis=0) - math.log(len(BETS))
    return mixed


def _blocks_needed(x: Array, estimate: float, limit: float, family: int) -> int | None:
    """The planner: about 20 (sigma / delta)^2 + 8 in all, sigma robust, delta the distance to the limit; the 20 grows
    with the family as the error that is left to one of its variants shrinks."""
    if not len(x):
        return None
    sigma, delta = 1.4826 * _deviation(x), abs(estimate - limit)
    factor = 20 * math.log(ALPHA / len(LOOKS) / family) / math.log(ALPHA / len(LOOKS))
    total = factor * (sigma / delta) ** 2 + 8 if delta > sigma / 1_000 else math.inf
    return max(len(x) + 1, math.ceil(min(total, MOST_BLOCKS)))
