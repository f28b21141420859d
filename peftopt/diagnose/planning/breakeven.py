"""Break-evens in the number of adapters, skew and reloads, each with all else as planned. Pure.

At each point of an axis the rule of `plan` chooses in every draw. A break-even is the last point, or the first, at
which it chooses the option that merges. Its interval is over the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from peftopt.diagnose.planning import options as ways
from peftopt.diagnose.planning import plan
from peftopt.diagnose.planning.options import Option
from peftopt.diagnose.planning.plan import Outcome
from peftopt.diagnose.planning.simulation import Due
from peftopt.diagnose.planning.speeds import Drawn, Speeds
from peftopt.diagnose.planning.traffic import PERIODS_S, Traffic
from peftopt.records import Interval

Axis = Literal["adapters", "zipf", "reloads"]

DRAWS = 24

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of adapters that are looked at."""

SKEWS = tuple(step / 4 for step in range(11))
"""Exponents that are looked at: 0 to 2.5."""

RELOADS = tuple(10 ** (power / 4) for power in range(-8, 25))
"""New versions of each adapter a day that are looked at: 0.01 to a million."""


@dataclass(frozen=True)
class Breakeven:
    """`value` is in adapters, as an exponent, or in new versions of each adapter a day. It is infinite if merging is
    chosen (or, for skew, is not chosen) at every point, and 0 if it is chosen at none. `most`: the last point. `why` it
    could not be computed, if `value` is None."""

    axis: Axis
    value: Interval | None
    most: float = math.inf
    why: str = ""


def breakevens(speeds: Speeds, evaluated: plan.Evaluated, draws: int = DRAWS, seed: int = 0) -> tuple[Breakeven, ...]:
    """All three."""
    drawn = plan.draws_of(speeds, draws, seed)
    axes = _Axes(speeds, evaluated, drawn, seed)
    return axes.adapters(), axes.zipf(), axes.reloads()


@dataclass(frozen=True)
class _Axes:
    speeds: Speeds
    evaluated: plan.Evaluated
    drawn: Sequence[Drawn]
    seed: int

    @property
    def traffic(self) -> Traffic:
        return self.evaluated.traffic

    def adapters(self) -> Breakeven:
        """Up to how many adapters all merged is chosen over all apart."""
        space = self.evaluated.space
        points = [n for n in STEPS if n <= space.copies]
        if not points:
            return Breakeven("adapters", None, why="not one merged engine fits")

        def pays(number: int, adapters: float) -> bool:
            traffic = replace(self.traffic, adapters=int(adapters), names=())
            merged = Option(traffic.adapters, traffic.adapters, 0)
            return self._chosen(number, traffic, [merged, Option(traffic.adapters, 0, 1)]) == merged

        return Breakeven("adapters", self._last(points, pays), points[-1])

    def zipf(self) -> Breakeven:
        """From which skew on it is chosen to merge the hottest, over all apart."""
        every = ways.options(self.traffic.adapters, self.evaluated.space)
        hottest = [each for each in every if each.family == "hottest merged" and self.evaluated.space.fits(each)]
        if not hottest:
            why = "there is one adapter" if self.traffic.adapters == 1 else "no merged engine fits beside the others"
            return Breakeven("zipf", None, why=why)
        apart = Option(self.traffic.adapters, 0, 1)

        def stays(number: int, skew: float) -> bool:
            choice = self._chosen(number, replace(self.traffic, zipf=skew), [apart, *hottest[:3]])
            return choice is None or choice == apart

        firsts = [next((s for s in SKEWS if not stays(number, s)), math.inf) for number in range(len(self.drawn))]
        return Breakeven("zipf", plan.spread(firsts), SKEWS[-1])

    def reloads(self) -> Breakeven:
        """Up to how many new versions of each adapter a day the best option that merges is chosen over all apart."""
        merging = [each for each in self.evaluated.options if each.option.merged and each.goodput]
        if not merging:
            return Breakeven("reloads", None, why="no merged engine fits")
        best = max(merging, key=lambda each: (each.chosen, each.goodput.estimate if each.goodput else 0.0)).option
        apart = Option(self.traffic.adapters, 0, 1)
        still = replace(self.traffic, reloads_per_s=0.0)
        known = [self._while_still(number, still, (best, apart)) for number in range(len(self.drawn))]

        def pays(number: int, per_day: float) -> bool:
            outcomes, beside = known[number]
            traffic = replace(self.traffic, reloads_per_s=per_day / PERIODS_S["day"])
            merging = plan.merging_share(best, self.drawn[number], traffic)
            if merging >= 1:
                return False
            goodput = {
                best: outcomes[best].goodput + merging * (beside - outcomes[best].goodput),
                apart: outcomes[apart].goodput if apart in outcomes else 0.0,
            }
            reloading = {
                option: replace(
                    value, goodput=goodput[option] * (1 - plan.loading_share(option, self.drawn[number], traffic))
                )
                for option, value in outcomes.items()
            }
            return plan.choose(reloading, self.evaluated.space) == best

        return Breakeven("reloads", self._last(RELOADS, pays), RELOADS[-1])

    def _while_still(
        self, number: int, traffic: Traffic, options: Sequence[Option]
    ) -> tuple[Mapping[Option, Outcome], float]:
        """What options give without reloads, and the goodput of the first of them during one."""
        due, drawn, space = self._due(number, traffic), self.drawn[number], self.evaluated.space
        beside = plan.while_merging(options[0], drawn, self.speeds.rows, traffic, space, due)
        return self._outcomes(number, traffic, options), beside

    def _due(self, number: int, traffic: Traffic) -> list[Due]:
        return plan.requests(traffic, self.evaluated.requests, self.seed + number)

    def _outcomes(self, number: int, traffic: Traffic, options: Sequence[Option]) -> dict[Option, Outcome]:
        due, drawn, space = self._due(number, traffic), self.drawn[number], self.evaluated.space
        return {
            option: plan.outcome(option, drawn, self.speeds.rows, traffic, space, due)
            for option in options
            if space.fits(option)
        }

    def _chosen(self, number: int, traffic: Traffic, options: Sequence[Option]) -> Option | None:
        return plan.choose(self._outcomes(number, traffic, options), self.evaluated.space)

    def _last(self, points: Sequence[float], pays: Callable[[int, float], bool]) -> Interval:
        """The last point at which merging pays, over the draws; 0 where it never does, infinite where it does at the
        last point."""
        lasts = []
        for number in range(len(self.drawn)):
            last = max((point for point in points if pays(number, point)), default=0.0)
            lasts.append(math.inf if last == points[-1] else float(last))
        return plan.spread(lasts)
