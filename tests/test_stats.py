"""What the statistics promise: known values, exact coverage where it can be enumerated, and symmetries."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peftopt import stats
from peftopt.records import Interval
from peftopt.stats import bets, planning, quantiles
from peftopt.stats.blocks import _centre_of_many, _signed_rank_cut, _walsh, centre

values = st.floats(-5, 5).map(lambda x: round(x, 3))
blocks = st.lists(values, max_size=70)
levels = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.98, 0.996])


def mirrored(interval: Interval) -> Interval:
    return Interval(-interval.estimate, -interval.high, -interval.low, interval.n, interval.level)


def near(found: Interval, wanted: Interval, scale: float = 1.0) -> bool:
    pairs = zip(
        (found.estimate, found.low, found.high),
        (wanted.estimate * scale, wanted.low * scale, wanted.high * scale),
        strict=True,
    )
    return all(a == pytest.approx(b, abs=1e-9, nan_ok=True) for a, b in pairs)


# ---- the Hodges-Lehmann interval ---------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 11))
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.996])
def test_coverage_over_all_sign_patterns(n: int, level: float) -> None:
    """Given the magnitudes, symmetry makes all 2^n signs equally likely: count how often 0 is covered."""
    magnitudes = np.random.default_rng(n).exponential(size=n) + 0.1
    patterns = itertools.product((-1, 1), repeat=n)
    found = [stats.hodges_lehmann(magnitudes * signs, level) for signs in patterns]
    missed_above = sum(i.high < 0 for i in found) / len(found)
    missed_below = sum(i.low > 0 for i in found) / len(found)
    assert missed_above == missed_below <= (1 - level) / 2
    finite = math.isfinite(found[0].low)
    assert finite == (0.5**n <= (1 - level) / 2)


@pytest.mark.parametrize("n", [6, 9, 12])
def test_excludes_exactly_what_the_wilcoxon_test_rejects(n: int) -> None:
    from scipy.stats import wilcoxon

    d = np.random.default_rng(n).normal(0.4, 1, n)
    interval = stats.hodges_lehmann(d, 0.9)
    for shift in np.linspace(-2, 3, 41):
        rejected = wilcoxon(d - shift, method="exact").pvalue <= 0.1
        assert rejected == (not interval.low <= shift <= interval.high)


def test_the_critical_values_of_the_tables() -> None:
    """Hollander, Wolfe and Chicken, table A.4; one more than the largest rejected W for each tail."""
    cuts = {(10, 0.025): 9, (20, 0.025): 53, (25, 0.005): 69, (5, 0.05): 1, (50, 0.025): 435}
    assert {key: _signed_rank_cut(*key) for key in cuts} == cuts


@given(blocks, levels, values)
def test_equivariant_under_shift_and_sign(d: list[float], level: float, shift: float) -> None:
    interval = stats.hodges_lehmann(d, level)
    moved = Interval(interval.estimate + shift, interval.low + shift, interval.high + shift, len(d), level)
    assert near(stats.hodges_lehmann([x + shift for x in d], level), moved)
    assert near(stats.hodges_lehmann([-x for x in d], level), mirrored(interval))


@given(st.lists(values, min_size=1, max_size=40))
def test_a_higher_level_is_wider_and_holds_the_estimate(d: list[float]) -> None:
    narrow, wide = stats.hodges_lehmann(d, 0.8), stats.hodges_lehmann(d, 0.99)
    assert wide.low <= narrow.low <= narrow.estimate <= narrow.high <= wide.high


def test_nothing_says_nothing() -> None:
    unknown = (math.isnan, lambda low: low == -math.inf, lambda high: high == math.inf)
    for interval in (
        stats.hodges_lehmann([], 0.95),
        stats.bet([], 0.0).interval,
        stats.race([], 0.0).interval,
        stats.quantile([], 0.5),
        stats.mean([]),
        stats.ratio_of_means([1.0, 2.0], [0.0, 0.0]),
    ):
        found = (interval.estimate, interval.low, interval.high)
        assert all(is_so(x) for is_so, x in zip(unknown, found, strict=True))
    assert math.isnan(stats.median([]))
    assert stats.race([], 0.0).blocks_needed is stats.bet([], 0.0).blocks_needed is None
    none = stats.bet([], 0.0)
    assert none.look == none.launches == none.interval.n == stats.race([], 0.0).launches == 0


# ---- races -------------------------------------------------------------------------------------


@given(st.integers(1, 32))
def test_the_first_look_comes_as_soon_as_it_can_decide_and_no_sooner(family: int) -> None:
    first, *rest = stats.looks(family)
    assert tuple(rest) == stats.LOOKS[1:] and stats.LOOKS[0] <= first < rest[0]
    one_way = [-0.5 - 0.001 * i for i in range(first)]
    assert stats.race(one_way, math.log(0.85), family).outcome == "accepted"
    assert stats.race(one_way[:-1], math.log(0.85), family).outcome == "inconclusive"


def test_a_clear_gain_is_accepted_at_the_first_look() -> None:
    gain = [-0.3 + 0.001 * i for i in range(10)]
    assert stats.race(gain[:9], math.log(0.85)).outcome == "inconclusive"
    found = stats.race(gain, math.log(0.85))
    assert (found.outcome, found.look, found.blocks_needed) == ("accepted", 10, None)
    assert found.interval.level == pytest.approx(1 - 0.02 * 0.1)


def test_a_larger_family_needs_more() -> None:
    """At 13 blocks no interval is finite at 1 - 0.002 / 12; at 14 it is."""
    gain = [-0.3 + 0.001 * i for i in range(16)]
    assert stats.race(gain, -0.1).look == 10
    assert stats.race(gain, -0.1, family=12).look == 14
    assert sum(planning.LOOK_SHARES) + planning.BETS_SHARE == pytest.approx(1)
    with pytest.raises(ValueError, match="family"):
        stats.race(gain, -0.1, family=0)


@settings(deadline=None)
@given(st.lists(values, max_size=80), values, st.integers(1, 5), st.booleans())
def test_what_decides_first_is_final_however_many_blocks_are_added(
    d: list[float], limit: float, family: int, open_ended: bool
) -> None:
    found = stats.race(d, limit, family, open_ended)
    for n in range(len(d) + 1):
        early = stats.race(d[:n], limit, family, open_ended)
        if early.outcome != "inconclusive":
            assert found == early and found.look == n
            break
    else:
        assert found.outcome == "inconclusive"
        assert found.blocks_needed is None or found.blocks_needed > found.interval.n


@settings(deadline=None)
@given(st.lists(values, max_size=70), values, st.floats(0, 3), st.booleans())
def test_a_laxer_limit_is_never_harder_to_meet(d: list[float], limit: float, more: float, open_ended: bool) -> None:
    order = ("rejected", "inconclusive", "accepted")
    strict, lax = (stats.race(d, x, 2, open_ended).outcome for x in (limit, limit + more))
    assert order.index(strict) <= order.index(lax)


@pytest.mark.parametrize(("needed", "granted"), [(11, 16), (16, 16), (25, 40), (60, 60), (61, 61), (300, 300)])
def test_blocks_are_granted_up_to_a_look_that_can_use_them(needed: int, granted: int) -> None:
    assert stats.next_look(needed) == granted


def test_a_race_goes_on_after_its_last_look_and_bets_decide_it() -> None:
    """sigma is three times the distance to the limit: sixty blocks leave it open."""
    d = np.random.default_rng(0).normal(-0.04, 0.12, 400)
    looked = stats.race(d[:60], 0.0)
    assert (looked.outcome, looked.test, looked.look) == ("inconclusive", "look", 60)
    found = stats.race(d, 0.0)
    assert (found.outcome, found.test) == ("accepted", "bets") and 60 < found.look < 400
    assert found.interval.level == pytest.approx(1 - 0.02 * planning.BETS_SHARE) and found.interval.high <= 0
    still = stats.race(d[: found.look - 1], 0.0)
    assert still.outcome == "inconclusive" and still.interval.n == found.look - 1


def test_adding_blocks_until_it_suits_spends_no_more_than_the_budget() -> None:
    """Exactly at the limit, 150 blocks: looks and bets together may accept 1 %, 2 of 200 races."""
    rng = np.random.default_rng(1)
    outcomes = [stats.race(rng.standard_t(3, 150), 0.0).outcome for _ in range(200)]
    assert outcomes.count("accepted") <= 5 and outcomes.count("rejected") <= 5


def test_a_race_beyond_its_budget_is_known_early_and_a_near_one_is_run() -> None:
    d = np.random.default_rng(2).normal(0, 0.1, 55)
    assert not stats.out_of_reach(d[:9], 0.0, 60)
    assert stats.out_of_reach(d, float(np.mean(d)), 60)
    assert not stats.out_of_reach(d, float(np.mean(d)) + 0.1, 60)
    assert not stats.out_of_reach(d, float(np.mean(d)), 10**6)


@given(st.lists(values, max_size=70), values)
@pytest.mark.parametrize("rule", [stats.race, stats.bet])
def test_the_mirror(rule: object, d: list[float], limit: float) -> None:
    assert callable(rule)
    opposite = {"accepted": "rejected", "rejected": "accepted", "inconclusive": "inconclusive"}
    found, mirror = rule(d, limit), rule([-x for x in d], -limit)
    assert (mirror.outcome, mirror.look) == (opposite[found.outcome], found.look)
    assert mirror.blocks_needed == found.blocks_needed
    assert near(mirror.interval, mirrored(found.interval))


@given(st.lists(values, min_size=1, max_size=70), values)
def test_an_outcome_is_what_its_interval_says(d: list[float], limit: float) -> None:
    found = stats.race(d, limit)
    if found.test == "look":
        assert found.outcome == ("inconclusive" if not found.look else stats.judge(found.interval, limit))
    found = stats.bet(d, limit)
    if found.outcome == "accepted":
        assert found.interval.high <= limit
    elif found.outcome == "rejected":
        assert found.interval.low >= limit
    else:
        assert found.interval.low - 1e-9 <= limit <= found.interval.high + 1e-9


def test_the_planner() -> None:
    """sigma / delta = 1 asks for 28 blocks; a limit at the estimate asks for the cap."""
    d = [1 / 1.4826, -1 / 1.4826] * 4
    assert stats.race(d, 1.0).blocks_needed == 28
    assert stats.race(d, 0.0).blocks_needed == stats.MOST_BLOCKS
    assert stats.race([0.5], 0.0).blocks_needed == 8
    assert stats.race([0.0] * 10, 0.0).blocks_needed == stats.MOST_BLOCKS
    assert 28 < (stats.race(d, 1.0, family=6).blocks_needed or 0) < 40, "a family shares the error"


def test_betting_stays_below_its_error_however_often_it_is_judged() -> None:
    """`bet` decides at the first win, so 100 blocks are 100 looks: 10 of 200 runs may err at 5 %."""
    rng = np.random.default_rng(0)
    outcomes = [stats.bet(rng.standard_t(2, 100), 0.0, alpha=0.05).outcome for _ in range(200)]
    assert outcomes.count("accepted") <= 15
    assert outcomes.count("rejected") <= 15


def wealth_and_ends(x: np.ndarray, launches: Sequence[int], limit: float, side: int) -> tuple[np.ndarray, list[int]]:
    return bets._log_wealth(x, bets.past_scale(x), launches, limit, side)


def scale_by_matrix(x: np.ndarray) -> np.ndarray:
    """The scale of every block at once, in memory that grows with the square of the blocks."""
    n = np.arange(1, len(x))
    past = np.tri(len(x), len(x), -1, dtype=bool)

    def medians(values: np.ndarray) -> np.ndarray:
        ordered = np.sort(np.where(past, values, np.inf), axis=1)
        return np.append([0.0], ordered[n, (n - 1) // 2] / 2 + ordered[n, n // 2] / 2)

    return bets.REACH * medians(np.abs(x - medians(np.broadcast_to(x, past.shape))[:, None]))


@given(st.lists(values | st.floats(-0.5, 0.5), min_size=1, max_size=60), st.floats(-0.6, 0.6))
def test_blocks_that_come_one_by_one_are_judged_as_all_at_once(d: list[float], limit: float) -> None:
    """At every number of blocks: as often as a trial looks."""
    assert (bets.past_scale(np.array(d)) == scale_by_matrix(np.array(d))).all()
    gamblers = stats.Gamblers(limit, 0.05)
    for n, block in enumerate(d, 1):
        gamblers.add(block)
        whole = stats.bet(d[:n], limit, 0.05)
        assert gamblers.outcome == whole.outcome
        assert len(gamblers) == whole.look or whole.outcome == "inconclusive"
    assert gamblers.race() == whole


@given(st.integers(1, 60), st.integers(0, 10**6))
def test_the_centre_of_many_blocks_is_that_of_their_walsh_averages(n: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_t(2, n).round(seed % 3)
    assert _centre_of_many(x) == pytest.approx(np.median(_walsh(x)), abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("side", [-1, 1])
def test_bets_are_fair(side: int) -> None:
    """Over all sign patterns of given magnitudes, wealth is 1 on average after every block."""
    magnitudes = np.random.default_rng(2).exponential(size=9)
    patterns = (magnitudes * signs for signs in itertools.product((-1, 1), repeat=9))
    wealth = [np.exp(wealth_and_ends(x, range(9), 0.0, side)[0]) for x in patterns]
    assert np.mean(wealth, axis=0) == pytest.approx(np.ones(9))


@pytest.mark.parametrize("side", [-1, 1])
def test_bets_are_fair_where_blocks_of_a_launch_share_its_fate(side: int) -> None:
    """Over all signs of whole launches, wealth is 1 on average after every launch."""
    magnitudes, launches = np.random.default_rng(2).exponential(size=12), np.repeat(range(6), 2)
    patterns = (magnitudes * np.repeat(signs, 2) for signs in itertools.product((-1, 1), repeat=6))
    wealth = [np.exp(wealth_and_ends(x, launches, 0.0, side)[0]) for x in patterns]
    assert np.mean(wealth, axis=0) == pytest.approx(np.ones(6))


def test_betting_decides_a_clear_gain_within_a_dozen_blocks() -> None:
    d = np.random.default_rng(1).normal(-0.3, 0.01, 60)
    found = stats.bet(d, math.log(0.85))
    assert found.outcome == "accepted"
    assert found.look <= 12
    assert stats.bet(d[: found.look], math.log(0.85)) == found
    assert stats.bet(d[: found.look - 1], math.log(0.85)).outcome == "inconclusive"


# ---- counts ------------------------------------------------------------------------------------


def test_the_claim_carries_its_n() -> None:
    assert (stats.needed_n(0.01), stats.needed_n(0.001)) == (299, 2995)
    assert stats.upper_bound(0, 299) < 0.01 < stats.upper_bound(0, 298)
    assert stats.upper_bound(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert stats.needed_n(0.01, family=12) == math.ceil(math.log(0.05 / 12) / math.log(0.99))
    assert (stats.upper_bound(0, 0), stats.upper_bound(4, 4)) == (1.0, 1.0)


@given(st.floats(1e-5, 0.9), st.integers(1, 50))
def test_needed_n_is_the_smallest(rate: float, family: int) -> None:
    n = stats.needed_n(rate, family)
    slack = 1e-9
    assert stats.upper_bound(0, n, 1 - 0.05 / family) <= rate + slack
    assert n == 1 or stats.upper_bound(0, n - 1, 1 - 0.05 / family) > rate - slack


@given(st.integers(0, 60), st.integers(0, 60))
def test_clopper_pearson(k: int, more: int) -> None:
    from scipy.stats import binomtest

    n = k + more
    found = stats.proportion(k, n)
    if not n:
        assert (found.low, found.high) == (0, 1)
        return
    exact = binomtest(k, n).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert near(stats.proportion(n - k, n), Interval(1 - k / n, 1 - found.high, 1 - found.low, n))


def test_p95_needs_72_requests_and_p99_368() -> None:
    for q, n in ((0.5, 6), (0.95, 72), (0.99, 368)):
        assert stats.fewest_for(q) == n
        assert stats.quantile(range(n), q).high == n - 1 and stats.quantile(range(n - 1), q).high == math.inf
    highs = {n: stats.quantile(range(n), 0.95).high for n in (1, 71, 72, 400)}
    assert highs[1] == highs[71] == math.inf
    assert highs[72] == 71
    assert highs[400] < 399


@given(st.integers(1, 150), st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.99]), levels)
@example(72, 0.95, 0.95)
@example(2, 0.5, 0.5)
def test_quantile_intervals_are_exact_and_tight(n: int, q: float, level: float) -> None:
    """The ranks (read off 1..n) hold at most the tail on each side, and one rank nearer would hold more."""
    from scipy.stats import binom

    interval, tail = stats.quantile(range(1, n + 1), q, level), (1 - level) / 2
    low = 0 if interval.low == -math.inf else int(interval.low)
    high = n + 1 if interval.high == math.inf else int(interval.high)
    assert low == 0 or binom.cdf(low - 1, n, q) <= tail + 1e-12
    assert binom.cdf(low, n, q) > tail - 1e-12
    assert high == n + 1 or binom.sf(high - 1, n, q) <= tail + 1e-12
    assert binom.sf(high - 2, n, q) > tail - 1e-12


def test_flips() -> None:
    assert stats.flips(0, 0) == stats.flips(0, 9) == 1.0
    assert stats.flips(5, 0) == pytest.approx(2**-5)
    assert stats.flips(8, 1) == pytest.approx(10 / 512)


# ---- means -------------------------------------------------------------------------------------


@given(st.lists(values, min_size=2, max_size=30))
def test_mean_is_the_t_interval(x: list[float]) -> None:
    from scipy.stats import t

    half = t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / math.sqrt(len(x))
    centre = float(np.mean(x))
    assert near(stats.mean(x), Interval(centre, centre - half, centre + half, len(x)))


def test_one_prompt_has_no_spread() -> None:
    assert stats.mean([0.7]) == Interval(0.7, -math.inf, math.inf, 1)
    assert stats.perplexity_ratio([2.0], [1.0], [1]) == Interval(math.e, 0, math.inf, 1)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50), st.integers(1, 90)), min_size=2, max_size=20))
def test_perplexity_ratio(rows: list[tuple[float, float, int]]) -> None:
    variant, reference, tokens = (list(column) for column in zip(*rows, strict=True))
    found = stats.perplexity_ratio(variant, reference, tokens)
    assert found.estimate == pytest.approx(math.exp((sum(variant) - sum(reference)) / sum(tokens)))
    assert 0 <= found.low <= found.estimate <= found.high
    mirror = stats.perplexity_ratio(reference, variant, tokens)
    assert mirror.estimate * found.estimate == pytest.approx(1)


def test_clusters_widen_the_interval() -> None:
    """Ten equal prompts say no more than ten, however many tokens each has."""
    rng = np.random.default_rng(0)
    per_token = rng.normal(0, 1, 10)
    by_prompt = stats.ratio_of_means(per_token * 100, [100] * 10)
    assert near(by_prompt, stats.mean(per_token))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    calls = (
        lambda x: stats.hodges_lehmann(x, 0.95),
        lambda x: stats.race(x, 0.0),
        lambda x: stats.bet(x, 0.0),
        lambda x: stats.quantile(x, 0.5),
        stats.mean,
        lambda x: stats.perplexity_ratio(x, [1.0, 2.0], [3, 4]),
    )
    for call in calls:
        with pytest.raises(ValueError, match="finite"):
            call([1.0, bad])


def test_nonsense_is_refused() -> None:
    for call in (
        lambda: stats.upper_bound(3, 2),
        lambda: stats.proportion(-1, 2),
        lambda: stats.flips(-1, 0),
        lambda: stats.quantile([1.0], 1.0),
        lambda: stats.needed_n(0),
        lambda: stats.ratio_of_means([1.0], [1.0, 2.0]),
        lambda: stats.perplexity_ratio([1.0], [1.0, 2.0], [1]),
    ):
        with pytest.raises(ValueError):
            call()


def test_importing_imports_no_numpy() -> None:
    code = "import sys; import peftopt.stats, peftopt.recipe.thresholds; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=30)
@given(st.lists(st.floats(-1e300, 1e300), max_size=30), st.floats(-1e300, 1e300))
def test_extreme_values_break_nothing(d: list[float], limit: float) -> None:
    for found in (stats.race(d, limit), stats.bet(d, limit)):
        assert not d or not math.isnan(found.interval.low + found.interval.estimate * 0)


# ---- what small faults would change ------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.9, 0.98])
def test_an_interval_says_its_level_and_its_n(level: float) -> None:
    x = [0.1, 0.4, -0.2, 0.3, 0.7]
    for found, n in (
        (stats.hodges_lehmann(x, level), 5),
        (stats.hodges_lehmann([], level), 0),
        (stats.quantile(x, 0.5, level), 5),
        (stats.quantile([], 0.5, level), 0),
        (stats.proportion(1, 7, level), 7),
        (stats.mean(x, level), 5),
        (stats.mean([0.5], level), 1),
        (stats.ratio_of_means(x, [0.0] * 5, level), 5),
        (stats.perplexity_ratio(x, [0.0] * 5, [2.0] * 5, level), 5),
    ):
        assert (found.n, found.level) == (n, level)


def test_the_default_level_is_95_percent() -> None:
    x = [float(i) for i in range(100)]
    assert stats.quantile(x, 0.5) == stats.quantile(x, 0.5, 0.95)
    assert stats.proportion(3, 40) == stats.proportion(3, 40, 0.95)
    assert stats.mean(x) == stats.mean(x, 0.95)
    assert stats.ratio_of_means(x, [2.0] * 100) == stats.ratio_of_means(x, [2.0] * 100, 0.95)
    assert stats.perplexity_ratio(x, [1.0] * 100, [90.0] * 100) == stats.perplexity_ratio(
        x, [1.0] * 100, [90.0] * 100, 0.95
    )
    assert stats.upper_bound(2, 40) == stats.upper_bound(2, 40, 0.95)
    assert stats.needed_n(0.01) == stats.needed_n(0.01, 1, 0.95)
    assert stats.fewest_for(0.95) == stats.fewest_for(0.95, 0.95)
    gain = [-0.3 + 0.001 * i for i in range(40)]
    assert stats.bet(gain, 0.0) == stats.bet(gain, 0.0, 0.01), "but for bets, which err 1 % a side"


def test_quantiles_of_samples_in_any_order_and_with_ties() -> None:
    """Nine of twenty are 1, eleven are 2: ranks 6 and 15 bound the median at 95 %."""
    found = stats.quantile([2.0, 1.0] * 9 + [2.0, 2.0], 0.5)
    assert (found.estimate, found.low, found.high) == (2.0, 1.0, 2.0)
    assert stats.quantile(range(20, 0, -1), 0.5) == Interval(10.5, 6.0, 15.0, 20)


@pytest.mark.parametrize("q", [-0.1, 0.0, 1.0, 1.1])
def test_a_quantile_lies_between_0_and_1(q: float) -> None:
    for call in (lambda: stats.quantile([1.0, 2.0], q), lambda: stats.fewest_for(q)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            call()


@pytest.mark.parametrize("q", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("level", [0.8, 0.99])
def test_the_fewest_samples_are_those_from_which_both_bounds_are_finite_or_the_nearer_one_is(
    q: float, level: float
) -> None:
    n = stats.fewest_for(q, level)
    enough, fewer = stats.quantile(range(n), q, level), stats.quantile(range(n - 1), q, level)
    assert math.isfinite(enough.low) and math.isfinite(enough.high)
    assert not (math.isfinite(fewer.low) and math.isfinite(fewer.high))


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 30), (1, 1), (1, 30), (29, 30), (30, 30)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_upper_bound_leaves_so_few_events_exactly_the_rest_of_the_confidence(
    k: int, n: int, confidence: float
) -> None:
    from scipy.stats import binom

    found = stats.upper_bound(k, n, confidence)
    if k == n:
        assert found == 1.0
    else:
        assert binom.cdf(k, n, found) == pytest.approx(1 - confidence)


def test_prompts_that_are_needed_at_another_confidence() -> None:
    """ln 0.01 / ln 0.9 = 43.7, and half that error takes 50.3."""
    assert (stats.needed_n(0.1, confidence=0.99), stats.needed_n(0.1, 2, 0.99)) == (44, 51)
    assert stats.needed_n(0.5, 1, 0.5) == 1
    for rate, family in ((1.0, 1), (-0.1, 1), (0.1, 0)):
        with pytest.raises(ValueError, match="family"):
            stats.needed_n(rate, family)


@given(st.integers(0, 30), st.integers(0, 30))
def test_flips_are_the_one_sided_binomial_test(worse: int, better: int) -> None:
    from scipy.stats import binom

    assert stats.flips(worse, better) == pytest.approx(float(binom.sf(worse - 1, worse + better, 0.5)))


def test_flips_below_zero_are_refused_on_either_side() -> None:
    for counts in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="0 or more"):
            stats.flips(*counts)


def test_ratio_of_means_by_hand() -> None:
    """9 / 6; residuals (-0.5, 1, -0.5), so the error is sqrt(3 / 2) sqrt(1.5) / 6 and t(0.95; 2) = 2.92."""
    found = stats.ratio_of_means([1.0, 4.0, 4.0], [1.0, 2.0, 3.0], 0.9)
    half = 2.9199856 * 1.5 / 6
    assert near(found, Interval(1.5, 1.5 - half, 1.5 + half, 3, 0.9)) or (found.estimate, found.low) == pytest.approx(
        (1.5, 1.5 - half), rel=1e-6
    )
    assert stats.ratio_of_means([3.0, 1.0], [0.0, 2.0]).estimate == 2.0, "a prompt without tokens is no error"
    with pytest.raises(ValueError, match="0 or more"):
        stats.ratio_of_means([1.0, 1.0], [2.0, -1.0])


def test_perplexity_of_what_was_not_scored_alike() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        stats.perplexity_ratio([1.0, 2.0], [1.0], [1.0, 1.0])
    huge = stats.perplexity_ratio([710.0, 710.0], [0.0, 0.0], [1.0, 1.0])
    assert huge.estimate == huge.high == math.inf
    assert stats.perplexity_ratio([708.5] * 2, [0.0] * 2, [1.0] * 2).estimate == pytest.approx(math.exp(708.5))


def test_a_limit_that_is_only_touched_decides_nothing() -> None:
    touching = Interval(0.5, 0.25, 0.75, 9, 0.95)
    assert stats.judge(touching, 0.75) == stats.judge(touching, 0.25) == "inconclusive"
    assert (stats.judge(touching, 0.76), stats.judge(touching, 0.24)) == ("accepted", "rejected")
    assert stats.judge(touching, 1.0, 0.25) == stats.judge(touching, 0.0, 0.25) == "inconclusive"
    assert (stats.judge(touching, 1.01, 0.25), stats.judge(touching, -0.01, 0.25)) == ("accepted", "rejected")


def test_each_look_has_its_share_of_the_error_and_every_variant_its_part() -> None:
    """Blocks that lie on both sides of the limit leave the race open at any look, so its interval shows its level."""
    for blocks, share in zip(stats.LOOKS, (0.1, 0.1, 0.125, 0.175, 0.35), strict=True):
        for family in (1, 3):
            d = [0.1 * (-1) ** i for i in range(blocks)]
            found = stats.race(d, 0.0, family)
            first = stats.looks(family)[0]
            if blocks < first:
                assert (found.look, found.outcome) == (0, "inconclusive")
                continue
            assert (found.outcome, found.test, found.launches) == ("inconclusive", "look", blocks)
            assert found.look == (first if blocks == stats.LOOKS[0] else blocks)
            assert found.interval.level == pytest.approx(1 - 0.02 * share / family)


def test_bets_have_all_of_the_error_where_no_look_shares_it() -> None:
    d = np.random.default_rng(3).normal(-0.3, 0.02, 40)
    looked, open_ended = stats.race(d, -0.1, 2), stats.race(d, -0.1, 2, open_ended=True)
    assert (looked.test, open_ended.test) == ("look", "bets")
    assert open_ended.interval.level == pytest.approx(1 - 0.02 / 2)
    assert open_ended.look == open_ended.launches == open_ended.interval.n
    assert open_ended.blocks_needed is None
    bet = stats.bet(d, -0.1, 0.005)
    assert (bet.look, bet.interval.high) == (open_ended.look, open_ended.interval.high)


def wealth_of(*scores: float) -> list[float]:
    """Logs of what four gamblers hold on average after each score."""
    shares = (0.15, 0.3, 0.5, 0.7)
    held = [[math.prod(1 - share * s for s in scores[: n + 1]) for share in shares] for n in range(len(scores))]
    return [math.log(np.mean(each)) for each in held]


def test_the_wealth_of_bets_by_hand() -> None:
    """Scores are gaps over the scale, cut at 1; a scale of 0 stakes on the sign. The four wealths are averaged.

    Before the third block two lie 0.1 off their median, before the fourth the median deviation is 0.2: times 1.5.
    """
    x = np.array([-0.2, -0.4, 0.06, 0.15])
    assert bets.past_scale(x) == pytest.approx([0, 0, 0.15, 0.3])
    wealth, ends = wealth_and_ends(x, range(4), 0.0, -1)
    assert wealth == pytest.approx(wealth_of(-1, -1, 0.4, 0.5)) and ends == [1, 2, 3, 4]
    mirrored, _ = wealth_and_ends(-x, range(4), 0.0, 1)
    assert mirrored == pytest.approx(wealth)
    moved, _ = wealth_and_ends(x + 2, range(4), 2.0, -1)
    assert moved == pytest.approx(wealth)


def test_a_launch_is_one_bet_on_the_mean_of_its_blocks_scores() -> None:
    """Scaled by what was known before the launch; one that may still be going on is no bet yet."""
    x, launches = np.array([-0.2, 0.1, -0.4, 0.3, -0.1]), [0, 0, 1, 1, 2]
    known = bets.past_scale(x)[2]
    wealth, ends = wealth_and_ends(x, launches, 0.0, -1)
    second = np.clip(np.array([-0.4, 0.3]) / known, -1, 1).mean()
    assert wealth == pytest.approx(wealth_of(0.0, second)) and ends == [2, 4]
    assert wealth_and_ends(x[:1], [0], 0.0, -1)[1] == [1], "the only launch there is counts"
    assert wealth_and_ends(x, [0, 1, 0, 1, 1], 0.0, -1)[1] == [3, 5], "in the order in which they end"


def test_the_scale_of_a_bet_is_that_of_the_blocks_before_it() -> None:
    """1.5 medians of the distances to the running median; none before the first, and the future plays no part."""
    x = np.array([0.0, 2.0, 4.0, 10.0, -50.0])
    found = bets.past_scale(x)
    assert found[0] == found[1] == 0.0
    before = found.tolist()
    for n in range(1, 6):
        assert bets.past_scale(x[:n]).tolist() == before[:n]
    again = bets.past_scale(np.append(x[:4], 1e6)).tolist()
    assert again == before


def test_looks_are_as_documented() -> None:
    """The docs name the numbers: 10, 16, 24, 40 and 60 blocks for one variant, the last block before 16 for many."""
    assert stats.looks() == stats.looks(1) == (10, 16, 24, 40, 60)
    assert [stats.looks(family)[0] for family in (2, 4, 8, 10_000)] == [11, 12, 13, 15]


def test_a_race_stops_out_of_reach_from_the_first_look_on_and_past_twice_its_budget() -> None:
    d = [0.1 * (-1) ** i + 0.001 * i for i in range(10)]
    assert stats.out_of_reach(d, 0.0, 10) and not stats.out_of_reach(d[:9], 0.0, 10)


@pytest.mark.parametrize(("nats", "finite"), [(708.9, True), (709.9, False), (1e6, False)])
def test_a_perplexity_beyond_all_numbers_is_infinite_and_breaks_nothing(nats: float, finite: bool) -> None:
    """The largest double is e^709.78."""
    found = stats.perplexity_ratio([nats, nats], [0.0, 0.0], [1.0, 1.0])
    assert math.isfinite(found.estimate) == finite and found.estimate > 1e307
    assert stats.perplexity_ratio([-nats, -nats], [0.0, 0.0], [1.0, 1.0]).estimate < 1e-307


def test_before_its_first_look_a_race_shows_the_interval_of_that_look() -> None:
    """What is shown early is not narrower than what will judge."""
    d = [0.1 * (-1) ** i for i in range(9)]
    for family in (1, 3):
        found = stats.race(d, 0.0, family)
        assert (found.look, found.interval.n) == (0, 9)
        assert found.interval.level == pytest.approx(1 - 0.02 * 0.1 / family)


@settings(max_examples=30)
@given(st.lists(values, min_size=11, max_size=15), values)
def test_between_looks_a_race_shows_what_was_judged_at_the_last(d: list[float], limit: float) -> None:
    found = stats.race(d, limit)
    assert found.look == found.interval.n == found.launches or found.test == "bets"


def test_equal_blocks_are_bounded_on_both_sides() -> None:
    """A clock that always says the same leaves nothing open beyond it."""
    for sign, outcome in ((-1, "accepted"), (1, "rejected")):
        found = stats.race([sign * 0.3] * 40, 0.0, open_ended=True)
        assert found.outcome == outcome
        assert (found.interval.low, found.interval.high) == pytest.approx((sign * 0.3, sign * 0.3))


def test_bets_may_decide_between_two_looks_and_a_later_look_changes_nothing() -> None:
    """The race ends with the block at which they win: no server runs on for a verdict that there is."""
    races = (np.random.default_rng(seed).standard_t(2, 60) / 10 - 0.08 for seed in range(400))
    d = next(d for d in races if stats.race(d[:23], 0.0).test == "bets" and stats.race(d, 0.0).outcome == "accepted")
    found = stats.race(d[:23], 0.0)
    assert 16 < found.look <= 23 and found.outcome == "accepted"
    assert stats.race(d[: found.look], 0.0) == stats.race(d, 0.0) == found


@pytest.mark.parametrize("failed", [-math.log(1e3), math.log(1e3)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_failed_turn_takes_no_bound_from_what_bets_show(sign: int, failed: float) -> None:
    d = [sign * (0.3 + 0.001 * (n % 7)) for n in range(60)]
    d[5] = failed
    found = stats.race(d, 0.0, open_ended=True)
    assert found.outcome == ("accepted" if sign < 0 else "rejected")
    assert math.isfinite(found.interval.low) and math.isfinite(found.interval.high)
    assert found.interval.low <= sign * 0.303 <= found.interval.high


def test_bets_bound_on_both_sides_however_far_blocks_lie_apart() -> None:
    """Blocks that differ by a factor of 50 from one to the next."""
    for sign in (-1, 1):
        found = stats.race([sign * (6 + 2 * (-1) ** n) for n in range(60)], 0.0, open_ended=True)
        assert found.outcome == ("accepted" if sign < 0 else "rejected")
        assert math.isfinite(found.interval.low) and math.isfinite(found.interval.high)


# ---- shares of groups ----------------------------------------------------------------------------

counts = st.lists(
    st.integers(1, 30).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=2, max_size=20
)


@given(counts)
def test_groups_that_share_their_fate_say_no_more_than_their_samples(groups: list[tuple[int, int]]) -> None:
    k, n = sum(k for k, _ in groups), sum(n for _, n in groups)
    found, alone = stats.share_of_groups(groups), stats.proportion(k, n)
    assert math.isclose(found.estimate, k / n) and found.n == n
    assert 0 <= found.low <= alone.low + 1e-9 and alone.high - 1e-9 <= found.high <= 1


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_the_centre_of_blocks_that_are_all_alike_is_their_value(value: float) -> None:
    assert _centre_of_many(np.full(5, value)) == pytest.approx(value)


def test_one_group_has_no_interval_and_none_no_share() -> None:
    assert stats.share_of_groups([(1, 10)]).estimate == 0.1
    assert stats.share_of_groups([(1, 10)]).high == math.inf
    assert math.isnan(stats.share_of_groups([]).estimate)


@given(counts)
def test_a_share_and_its_complement_have_mirrored_bounds(groups: list[tuple[int, int]]) -> None:
    share, rest = stats.share_of_groups(groups), stats.share_of_groups([(n - k, n) for k, n in groups])
    assert (1 - rest.low, 1 - rest.high) == pytest.approx((share.high, share.low))


def test_the_bounds_of_a_share_are_exact_for_what_its_groups_are_worth() -> None:
    from scipy.stats import beta

    alike, apart = [(5, 10)] * 20, [(0, 10), (10, 10)] * 10
    k, worth = [np.array([k for k, _ in groups]) for groups in (alike, apart)], []
    for shares, groups in zip(k, (alike, apart), strict=True):
        n = quantiles._effective(shares, np.array([10] * 20), 0.9)
        interval = stats.share_of_groups(groups, 0.9)
        assert interval.low == pytest.approx(beta.ppf(0.05, n / 2, n / 2 + 1))
        assert interval.high == pytest.approx(beta.ppf(0.95, n / 2 + 1, n / 2))
        worth.append(n)
    assert worth[0] > 100 > 20 > worth[1], "all or nothing in a group is one sample"


def test_two_groups_have_an_interval() -> None:
    interval = stats.share_of_groups([(1, 10), (2, 10), (0, 0)])
    assert interval.low < 0.15 < interval.high < 1 and interval.n == 20


@pytest.mark.parametrize(
    ("block", "limit", "outcome"),
    [(-1.0, 0.0, "accepted"), (1.0, 0.0, "rejected"), (1.0, 2.0, "accepted"), (-1.0, -2.0, "rejected")],
)
def test_clear_blocks_one_by_one_decide_as_all_at_once(block: float, limit: float, outcome: str) -> None:
    """At the error that is usual, and no more are bet on after that."""
    gamblers, blocks = stats.Gamblers(limit), [block * size for size in np.linspace(0.9, 1.1, 60)]
    for each in blocks:
        gamblers.add(each)
    whole = stats.bet(blocks, limit)
    assert gamblers.outcome == whole.outcome == outcome
    assert len(gamblers) == whole.look < 60
    assert gamblers.race() == whole


def test_few_blocks_one_by_one_say_how_many_are_needed_as_all_at_once() -> None:
    blocks = [0.5, 0.4, 0.6, 0.45, 0.7]
    gamblers = stats.Gamblers(0.6)
    for block in blocks:
        gamblers.add(block)
    race = gamblers.race()
    assert race == stats.bet(blocks, 0.6) and race.outcome == "inconclusive"
    assert race.blocks_needed and race.blocks_needed < stats.bet(blocks, 0.6, family=2).blocks_needed


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 1_001])
def test_the_centre_is_the_median_of_walsh_averages_for_few_blocks_and_many(n: int) -> None:
    x = np.random.default_rng(n).standard_normal(n)
    i, j = np.triu_indices(n)
    expected = pytest.approx(np.median((x[i] + x[j]) / 2), abs=1e-12, rel=1e-12)
    assert centre(x) == expected
    assert _centre_of_many(x) == expected


# ---- two runs, known by their intervals ----------------------------------------------------------

intervals = st.tuples(values, st.floats(0, 5), st.floats(0, 5), st.integers(2, 60), levels).map(
    lambda each: Interval(each[0], each[0] - each[1], each[0] + each[2], each[3], each[4])
)


@given(intervals, intervals, levels)
def test_a_difference_is_that_of_the_exchanged_samples_with_its_sign_turned(
    ours: Interval, theirs: Interval, level: float
) -> None:
    assert near(stats.welch(ours, theirs, level), mirrored(stats.welch(theirs, ours, level)))


@given(intervals, levels)
def test_a_sample_never_differs_from_itself(interval: Interval, level: float) -> None:
    difference = stats.welch(interval, interval, level)
    assert difference.estimate == 0 and difference.low <= 0 <= difference.high


@given(st.lists(values, min_size=2, max_size=20, unique=True), levels)
def test_the_difference_from_an_exact_value_is_the_interval_of_the_mean_at_any_level(
    samples: list[float], level: float
) -> None:
    exactly = Interval(1.0, 1.0, 1.0, 1)
    wanted = stats.mean(samples, level)
    assert near(stats.welch(stats.mean(samples), exactly, level), stats.mean([x - 1 for x in samples], level))
    assert stats.welch(wanted, exactly, level).n == len(samples)


def test_what_cannot_be_told_differs_from_nothing() -> None:
    known = Interval(1.0, 0.9, 1.1, 9)
    unknown = [
        Interval(5.0, -math.inf, math.inf, 1),
        Interval(5.0, 4.9, 5.1, 3, level=math.nan),
        Interval(5.0, 5.0, 5.0, 4),  # launches that happen to agree
        Interval(math.nan, -math.inf, math.inf, 0),
    ]
    for each in unknown:
        assert stats.welch(each, known).low == -math.inf and stats.welch(each, known).high == math.inf


@pytest.mark.parametrize("level", [0.95, 0.998])
@pytest.mark.parametrize(("many", "few", "spread"), [(6, 6, 1.0), (16, 6, 1.0), (30, 3, 0.2)])
def test_equal_means_seem_to_differ_no_more_often_than_the_level_says(
    many: int, few: int, spread: float, level: float
) -> None:
    noise = np.random.default_rng(many)
    wrong = 0
    for _ in range(400):
        ours, theirs = noise.normal(0, spread, many), noise.normal(0, 1, few)
        difference = stats.welch(stats.mean(ours), stats.mean(theirs), level)
        wrong += not difference.low <= 0 <= difference.high
    assert wrong <= 400 * (1 - level) + 3 * math.sqrt(400 * (1 - level)) + 1


@given(intervals, intervals)
def test_a_difference_at_one_level_is_the_exchanged_one_with_its_sign_turned(ours: Interval, theirs: Interval) -> None:
    theirs = replace(theirs, level=ours.level)
    found = stats.difference(ours, theirs)
    assert near(found, mirrored(stats.difference(theirs, ours)))
    assert found.n == min(ours.n, theirs.n) and found.level == ours.level


def test_the_bounds_of_a_difference_are_those_of_the_facing_sides() -> None:
    """3 down and 4 up face each other: 5 apart; the other sides 8 and 6: 10."""
    found = stats.difference(Interval(10, 7, 18, 9, 0.9), Interval(4, -2, 8, 5, 0.9))
    assert (found.estimate, found.low, found.high, found.n) == (6, 6 - 5, 6 + 10, 5)


@pytest.mark.parametrize("unknown", [Interval(math.nan, -math.inf, math.inf, 0), Interval(math.inf, 1, math.inf, 2)])
def test_a_difference_from_what_is_not_known_is_not_known(unknown: Interval) -> None:
    found = stats.difference(unknown, Interval(1.0, 0.9, 1.1, 9))
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_two_levels_have_no_difference() -> None:
    with pytest.raises(ValueError, match="one level"):
        stats.difference(Interval(1, 0, 2, 9, 0.9), Interval(1, 0, 2, 9, 0.95))
