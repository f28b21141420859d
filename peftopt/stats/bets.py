"""Bets on blocks: a race that may be judged at any launch. Pure."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from peftopt.records import Interval, Outcome
from peftopt.stats.blocks import Launches, blocks_by_launch, centre, launch_of_each
from peftopt.stats.outcomes import Race
from peftopt.stats.planning import blocks_needed
from peftopt.stats.samples import as_row, unknown

if TYPE_CHECKING:
    from peftopt.stats.samples import Array

BETS = (0.15, 0.3, 0.5, 0.7)
"""Shares of the wealth staked on a block; all wealths are averaged, so none has to be the right one."""

REACH = 1.5
"""Median absolute deviations off the limit (1.5: one sigma) at which a block counts fully in `bet`."""


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
    x = as_row(d)
    return _bet(x, past_scale(x), launch_of_each(launches, len(x)), float(limit), alpha, family, resolution)


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
        score = _scores(as_row([block]) - self.limit, np.array([known]))
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


def first_to_win(
    x: Array, scale: Array, groups: Sequence[int], limit: float, alpha: float, resolution: float
) -> tuple[Outcome, int]:
    """What the gamblers say, and the block at which the first of them has won; n + 1 for never."""
    below, above = (_first_win(x, scale, groups, limit + side * resolution, side, alpha) for side in (-1, 1))
    if below == above:
        return "inconclusive", len(x) + 1
    return ("accepted", below) if below < above else ("rejected", above)


def past_scale(x: Array) -> Array:
    """For each block, how far off the limit it counts fully."""
    import numpy as np

    return np.array([_reach(x[:blocks]) for blocks in range(len(x))])


def _bet(
    x: Array, scale: Array, groups: Sequence[int], limit: float, alpha: float, family: int, resolution: float
) -> Race:
    """What `bet` says of blocks, with the scale of each."""
    level = 1 - 2 * alpha
    outcome, won = first_to_win(x, scale, groups, limit, alpha, resolution)
    look = min(won, len(x))
    if not look:
        return Race("inconclusive", unknown(0, level), 0, None, "bets")
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
    interval = Interval(centre(x), low, high, look, level)
    needed = blocks_needed(x, interval.estimate, limit, family) if outcome == "inconclusive" else None
    return Race(outcome, interval, look, needed, "bets", launches=len(set(groups)))


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

    blocks = blocks_by_launch(groups)
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
