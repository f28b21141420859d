"""Races: is a variant below a limit, judged at planned looks and by bets. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from peftopt.stats.bets import bet, first_to_win, past_scale
from peftopt.stats.blocks import Launches, centre, hodges_lehmann, launch_of_each, launches_matter, paired
from peftopt.stats.outcomes import Race, judge
from peftopt.stats.planning import (
    ALPHA,
    BETS_SHARE,
    LOOKS,
    MOST_BLOCKS,
    blocks_needed,
    launches_needed,
    level_at,
    looks,
)
from peftopt.stats.samples import as_row


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
    x = as_row(d)
    groups = launch_of_each(launches, len(x))
    if family < 1:
        raise ValueError(f"family must be 1 or more variants, found {family}")
    alpha = (1 if open_ended else BETS_SHARE) * ALPHA / 2 / family
    won = first_to_win(x, past_scale(x), groups, limit, alpha, resolution)[1]
    reached = [] if open_ended else [look for look in looks(family) if look <= len(x)]
    for look in reached:
        if won < look:
            break
        interval = paired(x[:look], level_at(look, family), groups[:look])
        if (outcome := judge(interval, limit, resolution)) != "inconclusive":
            return Race(outcome, interval, look, None, launches=len(set(groups[:look])))
    if open_ended or won <= len(x) or len(x) > LOOKS[-1]:
        return bet(x, limit, alpha, family, groups, resolution)
    look = reached[-1] if reached else 0
    seen, level = x[: look or len(x)], level_at(look or looks(family)[0], family)
    launched = groups[: len(seen)]
    interval, count = paired(seen, level, launched), len(set(launched))
    needed = blocks_needed(x, centre(x), limit, family)
    alone = judge(hodges_lehmann(seen, level), limit, resolution)
    more = launches_needed(seen, launched, limit, level) if count < len(seen) else 0
    if needed and launches_matter(seen, launched):  # as many launches as that have blocks too
        needed = max(needed, min(math.ceil(more * len(seen) / count), MOST_BLOCKS))
    more_launches = None if alone == "inconclusive" else more
    return Race("inconclusive", interval, look, needed, launches=count, launches_needed=more_launches)
