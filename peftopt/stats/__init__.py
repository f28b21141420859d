"""Samples -> intervals, and intervals -> outcomes: the rules of docs/verdicts.md as pure functions.

Bounds that the data cannot support are infinite, and an infinite bound clears no limit: too little data is
inconclusive by construction, never a pass. Samples that are not finite are refused with ValueError.
"""

from peftopt.stats.bets import Gamblers, bet
from peftopt.stats.blocks import hodges_lehmann, launches_matter, paired, resolution
from peftopt.stats.differences import difference, welch
from peftopt.stats.means import exceeds, mean, perplexity_ratio, ratio_of_means, slope
from peftopt.stats.outcomes import Race, judge
from peftopt.stats.planning import (
    ALPHA,
    LOOKS,
    MOST_BLOCKS,
    REQUIRE_ALPHA,
    looks,
    next_look,
    out_of_reach,
    planned_looks,
)
from peftopt.stats.quantiles import fewest_for, quantile, quantile_of_groups, share_of_groups
from peftopt.stats.races import race
from peftopt.stats.samples import median
from peftopt.stats.shares import excess, flips, kept, needed_n, proportion, upper_bound

__all__ = [
    "ALPHA",
    "LOOKS",
    "MOST_BLOCKS",
    "REQUIRE_ALPHA",
    "Gamblers",
    "Race",
    "bet",
    "difference",
    "exceeds",
    "excess",
    "fewest_for",
    "flips",
    "hodges_lehmann",
    "judge",
    "kept",
    "launches_matter",
    "looks",
    "mean",
    "median",
    "needed_n",
    "next_look",
    "out_of_reach",
    "paired",
    "perplexity_ratio",
    "planned_looks",
    "proportion",
    "quantile",
    "quantile_of_groups",
    "race",
    "ratio_of_means",
    "resolution",
    "share_of_groups",
    "slope",
    "upper_bound",
    "welch",
]
