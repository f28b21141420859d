"""At how many blocks a race is judged, what each look may err, and how many more it takes. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from peftopt.stats.blocks import centre, hodges_lehmann, launch_centres
from peftopt.stats.samples import as_row

if TYPE_CHECKING:
    from peftopt.stats.samples import Array

LOOKS = (10, 16, 24, 40, 60)
"""Numbers of blocks at which a race is judged, and at no others; see `looks` for the first."""

ALPHA = 0.02
"""Two-sided error of a whole race, however long it goes on."""

LOOK_SHARES, BETS_SHARE = (0.1, 0.1, 0.125, 0.175, 0.35), 0.15
"""Of ALPHA, what each look may err and what the bets may: little early, where only clear cases are decided, the most at
the last look, and some for the blocks that may be added after it."""

REQUIRE_ALPHA = 0.05
"""Two-sided error of one requirement (`require:`), over all the looks at it."""

MOST_BLOCKS = 9_999
"""Where the planner stops counting: the limit lies at the estimate, and no number of blocks will tell."""


def looks(family: int = 1) -> tuple[int, ...]:
    """LOOKS for so many variants. The first comes as soon as it can decide anything: n blocks that all point one way
    have a probability of 2 / 2^n, which must not exceed what the first look may err."""
    first = 1 + math.ceil(math.log2(family / (LOOK_SHARES[0] * ALPHA)))
    return (min(max(first, LOOKS[0]), LOOKS[1] - 1), *LOOKS[1:])


def next_look(blocks: int) -> int:
    """The planned look at so many blocks, or the first after them: between two of them a race is judged by bets alone,
    which decide later. Past the last, the blocks themselves."""
    return next((look for look in LOOKS if look >= blocks), blocks)


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


def level_at(look: int, family: int) -> float:
    """The level of the interval at a planned look."""
    share = LOOK_SHARES[looks(family).index(look)]
    return 1 - share * ALPHA / family


def out_of_reach(d: Iterable[float], limit: float, most: int, family: int = 1) -> bool:
    """Whether `most` blocks would hardly decide the race, even if the truth lay at the far end of its 99 % interval and
    half of what the planner then asks for were enough.

    A race that its budget cannot decide is better not run to the end. Stopping makes no wrong verdict, only none.
    """
    x = as_row(d)
    if len(x) < LOOKS[0]:
        return False
    interval = hodges_lehmann(x, 0.99)
    needed = (blocks_needed(x, end, limit, family) for end in (interval.low, interval.high))
    return all(n is not None and n > 2 * most for n in needed)


def blocks_needed(x: Array, estimate: float, limit: float, family: int) -> int | None:
    """The planner: about 20 (sigma / delta)^2 + 8 in all, sigma robust, delta the distance to the limit; the 20 grows
    with the family as the error that is left to one of its variants shrinks."""
    if not len(x):
        return None
    sigma, delta = 1.4826 * _deviation(x), abs(estimate - limit)
    factor = 20 * math.log(ALPHA / len(LOOKS) / family) / math.log(ALPHA / len(LOOKS))
    total = factor * (sigma / delta) ** 2 + 8 if delta > sigma / 1_000 else math.inf
    return max(len(x) + 1, math.ceil(min(total, MOST_BLOCKS)))


def launches_needed(x: Array, groups: Sequence[int], limit: float, level: float) -> int:
    """The fewest launches whose t interval would clear the limit, if they vary as those seen do, or as blocks where
    one launch is all there is."""
    import numpy as np
    from scipy.special import stdtrit

    centres = launch_centres(x, groups)
    spread = float(np.std(centres if len(centres) > 1 else x, ddof=1))
    delta = abs(centre(x) - limit)
    return next(
        (n for n in range(len(centres) + 1, 200) if stdtrit(n - 1, (1 + level) / 2) * spread < delta * math.sqrt(n)),
        200,
    )


def _deviation(x: Array) -> float:
    """The median absolute deviation from the median."""
    import numpy as np

    return float(np.median(np.abs(x - np.median(x))))
