"""Statistics of what shares a fate, by hand and by SciPy: launches, clusters, coarse clocks, differences of shares."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt import stats
from peftopt.records import Interval
from peftopt.stats import bets, planning, quantiles

INFINITE = (-math.inf, math.inf)


def bounds(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def launches_of(*sizes: int) -> list[int]:
    return [n for n, size in enumerate(sizes) for _ in range(size)]


# ---- pairs in launches ---------------------------------------------------------------------------

APART = [0.0, 0.01, 0.02, 1.0, 1.01, 1.02, 2.0, 2.01, 2.02]
"""Three launches that differ by a hundred times what their blocks do."""


def test_blocks_that_are_launches_of_their_own_have_the_exact_interval() -> None:
    d = [0.3, -0.1, 0.2, 0.5, 0.4, 0.1, 0.25, 0.35]
    exact = stats.hodges_lehmann(d, 0.9)
    assert stats.paired(d, 0.9) == stats.paired(d, 0.9, range(8)) == exact
    assert stats.paired([], 0.9).n == 0


def test_few_launches_are_bounded_by_students_t_over_their_centres() -> None:
    found = stats.paired(APART, 0.95, launches_of(3, 3, 3))
    half = 4.302652729911275 / math.sqrt(3)
    assert bounds(found) == pytest.approx((1.01 - half, 1.01 + half))
    assert (found.estimate, found.n, found.level) == (stats.hodges_lehmann(APART, 0.95).estimate, 9, 0.95)


def test_many_launches_that_differ_are_bounded_by_the_exact_interval_over_their_centres() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, 12)
    d = np.repeat(centres, 4) + np.tile([-0.01, 0.0, 0.0, 0.01], 12)
    over = stats.hodges_lehmann(centres, 0.95)
    alone = stats.hodges_lehmann(d, 0.95)
    found = stats.paired(d, 0.95, launches_of(*[4] * 12))
    assert over.low < alone.low and over.high > alone.high
    assert bounds(found) == pytest.approx(bounds(over))


def test_launches_that_do_not_differ_cost_nothing() -> None:
    d = [(-1) ** n * (0.1 + n / 1000) for n in range(24)]
    groups = launches_of(*[4] * 6)
    assert not stats.launches_matter(d, groups)
    assert stats.paired(d, 0.95, groups) == stats.hodges_lehmann(d, 0.95)


def test_five_launches_that_do_not_differ_cost_nothing_though_five_centres_would_say_less() -> None:
    groups = launches_of(*[4] * 5)
    alike = (d for d in (np.random.default_rng(seed).normal(0, 1, 20) for seed in range(99)))
    d = next(d for d in alike if not stats.launches_matter(d, groups))
    centres = [float(np.mean(d[at : at + 4])) for at in range(0, 20, 4)]
    alone, over = stats.hodges_lehmann(d, 0.95), stats.mean(centres, 0.95)
    assert over.high - over.low > alone.high - alone.low and stats.paired(d, 0.95, groups) == alone


def test_an_interval_is_never_narrower_than_that_of_blocks() -> None:
    """Two launches whose centres agree by chance, of blocks that do not."""
    d = [-1.0, -0.6, -0.3, 0.3, 0.6, 1.0] * 2
    found, alone = stats.paired(d, 0.95, launches_of(6, 6)), stats.hodges_lehmann(d, 0.95)
    assert bounds(found) == bounds(alone)


def test_one_launch_has_no_interval() -> None:
    assert bounds(stats.paired(APART, 0.5, [7] * 9)) == INFINITE
    found = stats.race([-1.0] * 60, 0.0, launches=[0] * 60)
    assert (found.outcome, found.launches) == ("inconclusive", 1)


@pytest.mark.parametrize("numbers", [[0] * 8, [0] * 10])
def test_every_block_has_its_launch(numbers: list[int]) -> None:
    for call in (
        lambda: stats.paired(APART, 0.9, numbers),
        lambda: stats.race(APART, 0.0, launches=numbers),
        lambda: stats.bet(APART, 0.0, launches=numbers),
    ):
        with pytest.raises(ValueError, match="launch numbers"):
            call()


@pytest.mark.parametrize("launches", [2, 3, 4])
def test_fewer_than_five_launches_may_always_differ(launches: int) -> None:
    d = [0.1 * (-1) ** n for n in range(4 * launches)]
    assert stats.launches_matter(d, launches_of(*[4] * launches))


def test_launches_matter_by_ranks_at_a_fifth() -> None:
    """The F test over ranks, by SciPy, at 20 %: on either side of it."""
    from scipy.stats import f_oneway, rankdata

    seen = set()
    for seed in range(40):
        d = np.random.default_rng(seed).normal(0, 1, 20) ** 3
        ranks = rankdata(d).reshape(5, 4)
        p = f_oneway(*ranks).pvalue
        assert stats.launches_matter(d, launches_of(*[4] * 5)) == (p < 0.2), p
        seen.add(bool(p < 0.2))
    assert seen == {True, False}
    assert stats.launches_matter([0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0], launches_of(*[2] * 5))
    assert not stats.launches_matter([0.1, 0.5, 0.3, 0.2, 0.7], range(5)), "nothing to compare blocks of a launch by"
    assert stats.launches_matter([0.1, 0.1, 0.5, 0.3, 0.2, 0.7], launches_of(2, 1, 1, 1, 1)), "one pair, and it agrees"


def test_what_launches_leave_open_is_said() -> None:
    """Half the time in two launches that are 0.1 apart: blocks alone would decide, and t in four launches would too.

    At the third look t is 20 with two degrees of freedom and 9 with three: 20 x 0.07 > 0.7 x sqrt(3), 9 x 0.07 is not.
    """
    groups = launches_of(15, 15)
    d = [-0.7 + 0.05 * (-1) ** group + 0.02 * (-1) ** n for n, group in enumerate(groups)]
    found = stats.race(d, 0.0, launches=groups)
    assert (found.outcome, found.look, found.launches) == ("inconclusive", 24, 2)
    assert found.launches_needed == 4
    assert stats.race(d[:15], 0.0, launches=groups[:15]).launches_needed == 3, "one launch: as blocks vary"
    open_ = stats.race([x + 0.7 for x in d], 0.0, launches=groups)
    assert (open_.outcome, open_.launches_needed) == ("inconclusive", None), "more blocks are what it takes"


def test_the_planner_of_launches_stops_somewhere() -> None:
    rng = np.random.default_rng(3)
    near = planning.launches_needed(np.repeat(rng.normal(0, 1, 4), 5), launches_of(*[5] * 4), 1e-4, 0.95)
    assert near == 200
    exact = planning.launches_needed(np.array([0.0, 2.0]), [0, 1], 4.0, 0.95)
    # spread sqrt(2), 3 off: t(0.975; 2) sqrt(2 / 3) = 3.51, and t(0.975; 3) sqrt(2 / 4) = 2.25
    assert exact == 4
    assert planning.launches_needed(np.array([0.0, 0.001]), [0, 1], 4.0, 0.95) == 3, "one more at least"


def test_bets_wait_for_whole_launches() -> None:
    d = [-0.5 - 0.001 * n for n in range(60)]
    found = stats.race(d, 0.0, open_ended=True, launches=launches_of(*[2] * 30))
    assert found.outcome == "accepted" and found.look % 2 == 0
    assert found.launches == found.look // 2 and found.interval.n == found.look
    early = stats.race(d[: found.look - 1], 0.0, open_ended=True, launches=launches_of(*[2] * 30)[: found.look - 1])
    assert early.outcome == "inconclusive"


# ---- coarse clocks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "step"),
    [
        ([], 0),
        ([5.0], 0),
        ([5.0] * 9, 0),
        ([1.0, 2.0, 3.0, 4.0], 0),
        ([10.0, 10.0, 20.0, 40.0], 10 / 15),
        ([10.0, 12.0, 20.0, 20.0], 2 / 16),
        ([*map(float, range(100, 109)), 100.0], 1 / 103.5),
        ([*map(float, range(100, 110)), 100.0], 0),
        ([50.0, 50.0 + 1e-9, 60.0, 70.0], 10 / 55),
    ],
)
def test_the_step_of_a_clock_by_hand(times: list[float], step: float) -> None:
    """A tenth of the times must repeat another; the least gap counts, relative to the median."""
    assert stats.resolution(times) == pytest.approx(step)
    assert stats.resolution(times[::-1]) == pytest.approx(step)


@pytest.mark.parametrize(("resolution", "outcome"), [(0.0, "accepted"), (0.15, "accepted"), (0.21, "inconclusive")])
def test_a_race_must_clear_its_limit_by_the_clocks_step(resolution: float, outcome: str) -> None:
    d = [-0.2 - 0.0001 * n for n in range(60)]
    for open_ended in (False, True):
        found = stats.race(d, 0.0, open_ended=open_ended, resolution=resolution)
        assert found.outcome == outcome
        mirror = stats.race([-x for x in d], 0.0, open_ended=open_ended, resolution=resolution)
        assert (mirror.outcome == "rejected") == (outcome == "accepted")
    if outcome == "accepted":
        assert found.test == "bets" and found.interval.high <= -resolution


def test_bets_too_must_clear_the_limit_by_the_clocks_step_and_not_fall_short_of_it() -> None:
    """Between -0.2 and 0, and a clock that may have moved each by 0.15."""
    d = [-0.1 + 0.1 * (-1) ** n for n in range(60)]
    assert stats.race(d, 0.1, open_ended=True).outcome == "accepted"
    assert stats.race(d, 0.0, open_ended=True, resolution=0.15).outcome == "inconclusive"
    assert stats.race(d, -0.2, open_ended=True, resolution=0.15).outcome == "inconclusive"


# ---- looks at a requirement ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "most", "looks"),
    [
        (60, 60, [(10, 0.1), (16, 0.1), (24, 0.125), (40, 0.175), (60, 0.35)]),
        (59, 60, [(10, 0.1), (16, 0.1), (24, 0.125), (40, 0.175)]),
        (9, 60, []),
        (80, 40, [(10, 0.1), (16, 0.1), (24, 0.125), (40, 0.525), (80, 0.075)]),
        (319, 40, [(10, 0.1), (16, 0.1), (24, 0.125), (40, 0.525), (80, 0.075), (160, 0.0375)]),
        (5, 5, [(5, 0.85)]),
        (16, 16, [(10, 0.1), (16, 0.75)]),
        (100, 100, [(10, 0.05), (16, 0.05), (24, 0.0625), (40, 0.0875), (60, 0.175), (100, 0.425)]),
        (61, 61, [(10, 0.05), (16, 0.05), (24, 0.0625), (40, 0.0875), (60, 0.175), (61, 0.425)]),
    ],
)
def test_planned_looks_by_hand(blocks: int, most: int, looks: list[tuple[int, float]]) -> None:
    found = stats.planned_looks(blocks, most)
    assert [look for look, _ in found] == [look for look, _ in looks]
    assert [share for _, share in found] == pytest.approx([share for _, share in looks])


@given(st.integers(1, 500), st.integers(1, 200))
def test_looks_never_spend_more_than_there_is_and_none_changes_as_blocks_are_added(blocks: int, most: int) -> None:
    found = stats.planned_looks(blocks, most)
    assert sum(share for _, share in found) <= 1 + 1e-9
    assert all(look <= blocks for look, _ in found)
    more = stats.planned_looks(10**6, most)
    assert more[: len(found)] == found and 0.99 < sum(share for _, share in more) <= 1 + 1e-9


# ---- differences of shares -----------------------------------------------------------------------


@pytest.mark.parametrize(("worse", "better", "n"), [(0, 0, 10), (3, 1, 20), (0, 5, 9), (7, 0, 7), (0, 9, 9)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_an_excess_is_bounded_by_two_exact_intervals_that_share_the_error(
    worse: int, better: int, n: int, level: float
) -> None:
    """Four fifths of the error go to the variant's own failures."""
    from scipy.stats import binomtest

    ours = binomtest(worse, n).proportion_ci(1 - 0.8 * (1 - level), "exact")
    theirs = binomtest(better, n).proportion_ci(1 - 0.2 * (1 - level), "exact")
    found = stats.excess(worse, better, n, level)
    assert found.estimate == pytest.approx((worse - better) / n)
    assert bounds(found) == pytest.approx((ours.low - theirs.high, ours.high - theirs.low))
    assert (found.n, found.level) == (n, level)
    assert stats.excess(worse, better, n) == stats.excess(worse, better, n, 0.95)


def test_an_excess_of_nothing_is_unknown() -> None:
    found = stats.excess(0, 0, 0)
    assert math.isnan(found.estimate) and bounds(found) == (-1, 1)


@pytest.mark.parametrize("counts", [(0, 20, 0, 5), (3, 20, 2, 5), (20, 20, 5, 5), (1, 9, 0, 0)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_what_is_kept_of_right_answers_by_hand(counts: tuple[int, int, int, int], level: float) -> None:
    from scipy.stats import binomtest

    lost, right, won, wrong = counts
    down = binomtest(lost, right).proportion_ci(1 - 0.8 * (1 - level), "exact")
    up = binomtest(won, wrong).proportion_ci(1 - 0.2 * (1 - level), "exact") if wrong else None
    gain = wrong / right
    low, high = 1 - down.high + gain * (up.low if up else 0), 1 - down.low + gain * (up.high if up else 0)
    found = stats.kept(lost, right, won, wrong, level)
    assert found.estimate == pytest.approx((right - lost + won) / right)
    assert bounds(found) == pytest.approx((low, high))
    assert (found.n, found.level) == (right + wrong, level)
    assert stats.kept(lost, right, won, wrong) == stats.kept(lost, right, won, wrong, 0.95)


def test_nothing_is_kept_of_nothing() -> None:
    found = stats.kept(0, 0, 3, 9, 0.9)
    assert math.isnan(found.estimate) and bounds(found) == INFINITE and (found.n, found.level) == (0, 0.9)


# ---- quantiles of what shares a fate ---------------------------------------------------------------


def test_groups_that_say_no_less_than_their_samples_have_almost_the_exact_interval() -> None:
    """Twenty groups of ten, alike: only the ratio of t quantiles costs something."""
    from scipy.stats import t

    x = np.random.default_rng(0).permutation(200).astype(float)
    groups = x.reshape(20, 10)
    for q in (0.5, 0.9):
        found = stats.quantile_of_groups(groups, q)
        cut = math.floor(200 * (t.ppf(0.975, 199) / t.ppf(0.975, 19)) ** 2)
        wanted = quantiles._quantile_of(np.sort(x), cut, q, 0.95)
        assert cut < 200 and found.estimate == pytest.approx(np.quantile(x, q))
        below = [(group <= np.sort(x)[math.ceil(q * 200) - 1]).sum() for group in groups]
        if np.var(below, ddof=1) <= 10 * q * (1 - q):
            assert found == wanted
        else:
            assert found.low <= wanted.low and found.high >= wanted.high
    assert (found.n, found.level) == (200, 0.95)


def test_groups_that_are_each_one_number_say_what_so_many_numbers_say() -> None:
    """Twelve launches of 50 equal times: the design effect is about 50, and the bounds those of some twelve."""
    groups = [[float(n)] * 50 for n in range(1, 13)]
    found = stats.quantile_of_groups(groups, 0.5, 0.9)
    assert found.n == 600 and found.low <= 3 and found.high >= 10
    assert found.low >= 1 and found.high <= 12
    exact = stats.quantile(range(1, 13), 0.5, 0.9)
    assert found.low <= exact.low and found.high >= exact.high
    many = stats.quantile_of_groups([[float(n)] for n in range(1, 61)], 0.5, 0.9)
    assert many.low >= stats.quantile(range(1, 61), 0.5, 0.9).low - 2


def test_the_effective_number_of_samples_by_hand() -> None:
    """Groups (1 2 3 4), (1 2 3 9), (8 9 9 9): six of twelve lie at or below the sixth, 3; by group 3, 3, 0.

    Off their expected 2 by 1, 1 and -2: 3 / 2 x 6 = 9, over 12 / 4 = 3, is an effect of 3. So twelve samples are four,
    times the ratio of t quantiles of 11 and 2 degrees of freedom, squared: 1.05, hence 1.
    """
    groups = [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 9.0], [8.0, 9.0, 9.0, 9.0]]
    few = (2.200985160082949 / 4.302652729911275) ** 2
    assert math.floor(12 / 3 * few) == 1
    found = stats.quantile_of_groups(groups, 0.5)
    assert bounds(found) == INFINITE and (found.estimate, found.n) == (3.5, 12)
    low = stats.quantile_of_groups(groups, 0.5, 0.01)
    assert low == quantiles._quantile_of(
        np.sort(np.concatenate(groups)), math.floor(4 * ratio_of_t(0.505, 11, 2)), 0.5, 0.01
    )


def test_an_odd_number_of_samples_is_cut_at_the_one_in_the_middle() -> None:
    """Groups (1 2 3), (4 6 7), (5 8 9): five of nine lie at or below the fifth, 5; by group 3, 1, 1.

    Off their expected 5 / 3 by 4 / 3 and twice 2 / 3: 3 / 2 x 8 / 3 = 4, over 9 x 5 / 9 x 4 / 9, is an effect of 1.8.
    """
    groups = [[1.0, 2.0, 3.0], [4.0, 6.0, 7.0], [5.0, 8.0, 9.0]]
    effective = math.floor(9 / 1.8 * ratio_of_t(0.505, 8, 2))
    found = stats.quantile_of_groups(groups, 0.5, 0.01)
    assert effective == 4 and found == quantiles._quantile_of(np.arange(1.0, 10.0), effective, 0.5, 0.01)


def ratio_of_t(p: float, rest: int, groups: int) -> float:
    from scipy.stats import t

    return float(t.ppf(p, rest) / t.ppf(p, groups)) ** 2


@pytest.mark.parametrize("groups", [[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0], []], [[], [], [1.0]]])
def test_one_group_has_a_quantile_and_no_interval(groups: list[list[float]]) -> None:
    found = stats.quantile_of_groups(groups, 0.5, 0.5)
    assert bounds(found) == INFINITE and found.estimate == np.median(np.concatenate(groups))
    assert (found.n, found.level) == (sum(map(len, groups)), 0.5)


def test_few_groups_cost_the_square_of_what_students_t_says_of_so_few() -> None:
    """Three launches that say the same: 60 samples are as good as 19."""
    effective = math.floor(60 * ratio_of_t(0.95, 59, 2))
    found = stats.quantile_of_groups([range(n, 60, 3) for n in range(3)], 0.5, 0.9)
    assert effective == 19 and found == quantiles._quantile_of(np.arange(60.0), 19, 0.5, 0.9)


def test_two_groups_have_an_interval() -> None:
    found = stats.quantile_of_groups([range(20), range(20)], 0.5, 0.5)
    assert 0 < found.low < found.estimate < found.high < 19


def test_equal_samples_say_no_less_for_being_equal() -> None:
    assert bounds(stats.quantile_of_groups([[5.0, 5.0], [5.0, 5.0]], 0.5, 0.5)) == (5.0, 5.0)


def test_no_samples_have_no_quantile() -> None:
    for groups in ([], [[], []]):
        found = stats.quantile_of_groups(groups, 0.5)
        assert math.isnan(found.estimate) and found.n == 0 and bounds(found) == INFINITE


def test_failed_requests_took_forever() -> None:
    groups = [[1.0, 2.0, math.inf]] * 30
    median, tail = stats.quantile_of_groups(groups, 0.5), stats.quantile_of_groups(groups, 0.95)
    assert (median.estimate, median.high) == (2.0, math.inf) or median.high == 2.0
    assert tail.estimate == math.inf == tail.high
    assert stats.quantile_of_groups([[math.inf], [math.inf]], 0.5).estimate == math.inf
    with pytest.raises(ValueError, match="numbers"):
        stats.quantile_of_groups([[1.0, math.nan], [1.0]], 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.quantile_of_groups([[1.0], [1.0]], 1.0)


def test_quantiles_of_clusters_cover_what_they_say() -> None:
    """The median of launches that differ as much as requests do, 12 x 5: at 90 % it may be missed in 10 %."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(300):
        groups = rng.normal(0, 1, (12, 1)) + rng.normal(0, 1, (12, 5))
        found = stats.quantile_of_groups(groups, 0.5, 0.9)
        missed += not found.low <= 0 <= found.high
    assert missed <= 45  # 30 are expected at most, and 15 more are three sigma


# ---- what races and planners tell ----------------------------------------------------------------


def test_a_race_that_is_decided_tells_its_launches() -> None:
    d = [-0.5 - 0.001 * n for n in range(24)]
    assert stats.race(d, 0.0, launches=launches_of(*[2] * 12)).launches == 5
    assert stats.race(d, 0.0).launches == 10


def test_a_rejecting_bet_is_bounded_beyond_the_clocks_step() -> None:
    d = [0.2 + 0.0001 * n for n in range(60)]
    found = stats.bet(d, 0.0, resolution=0.15)
    assert found.outcome == "rejected" and found.interval.low >= 0.15


def test_where_launches_differ_the_planner_counts_the_blocks_of_as_many_as_it_takes() -> None:
    """Seen by a newcomer: nine blocks near 0.63x and one of 1.01x, which is a launch of its own."""
    d = np.log([0.67, 0.58, 0.62, 0.62, 0.6, 0.76, 0.59, 0.67, 0.69, 1.01])
    found = stats.race(d, math.log(0.85), launches=[0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    alone = stats.race(d, math.log(0.85))
    assert found.outcome == alone.outcome == "inconclusive" and found.blocks_needed and alone.blocks_needed
    assert alone.blocks_needed < 15 < found.blocks_needed < 60


def test_the_planner_of_blocks_rounds_up_and_asks_for_one_more_at_least() -> None:
    d = [1 / 1.4826, -1 / 1.4826] * 4
    assert stats.race(d, 0.9).blocks_needed == math.ceil(20 / 0.81 + 8) == 33
    assert stats.bet(d, 0.9).blocks_needed == 33, "for one variant"
    assert stats.race([-1.0] * 20, 0.0, launches=[0] * 20).blocks_needed == 32, "a second launch, of as many blocks"
    assert planning.blocks_needed(np.array([-1.0] * 20), -1.0, 0.0, 1) == 21


def test_a_race_is_in_reach_while_either_end_of_its_interval_is_far_from_the_limit() -> None:
    d = np.random.default_rng(2).normal(0, 0.1, 55)
    ends = stats.hodges_lehmann(d, 0.99)
    assert stats.out_of_reach(d, (ends.low + ends.high) / 2, 20)
    few = planning.blocks_needed(np.array(d), ends.high, ends.low, 1)
    assert few is not None and few <= 2 * 40
    assert not stats.out_of_reach(d, ends.low, 40) and not stats.out_of_reach(d, ends.high, 40)


def test_the_median_beside_failed_requests_is_one_that_was_answered() -> None:
    assert stats.quantile_of_groups([[1.0, 2.0, 3.0, math.inf]] * 2, 0.5).estimate == 2.0
    assert stats.quantile_of_groups([[1.0, 2.0], [3.0, math.inf]], 0.5).estimate == 2.0
    assert stats.quantile_of_groups([[1.0], [2.0, math.inf]], 0.5).estimate == 2.0


def test_a_slope_by_hand() -> None:
    """Deviations (-1, 0, 1) and values (3, 4, 9): (-3 + 9) / 2."""
    assert stats.slope([1.0, 2.0, 3.0], [3.0, 4.0, 9.0]) == pytest.approx(3)


def test_launches_are_bets_in_the_order_in_which_they_ended() -> None:
    """One launch went on while another came and went: its bet is placed when its last block is known."""
    x = np.array([-0.2, 0.1, -0.4, 0.3])
    assert bets._log_wealth(x, bets.past_scale(x), [0, 1, 1, 0], 0.0, -1)[1] == [3, 4]


def test_launches_are_said_to_differ_where_chance_does_it_once_in_a_hundred_times() -> None:
    from scipy.stats import f

    for share, exceeds in ((0.985, False), (0.995, True)):
        assert stats.exceeds(float(f.ppf(share, 4, 20)), 4, 20) == exceeds
