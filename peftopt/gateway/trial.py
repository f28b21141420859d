"""Is the canary as good as the version that is live? Judged on windows of time, in three outcomes. Pure.

Both arms run on one engine and share its load and its noise, so what a window does to one it does to the other. The
unit of speed is a window in which both answered: the log ratio of their medians, judged by `stats.bet`. The unit of
failures is a pair of requests of one window, one of each arm: failures are rare, so their mean has to be judged, not
the middle of their windows. Both may be looked at after every window. Two halves of the live arm's users are compared
in the same way: where they differ, windows tell nothing, and nothing is accepted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from peftopt import stats
from peftopt.errors import BadInput
from peftopt.records import Outcome

ALPHA = 0.01
"""The chance of a wrong verdict on each side, shared by the rules."""

RULES = ("canary.latency", "canary.failures")


@dataclass(frozen=True)
class Terms:
    """`slower`: the canary's median may be at most this times the live one's; `failures`: its share of failed requests
    at most this much higher. Windows of `window_s` seconds in which each arm answered `least` requests. After `for_s`
    seconds without a verdict it is held; an accepted one is promoted where `then` says so."""

    slower: float = 1.10
    failures: float = 0.02
    window_s: float = 30.0
    least: int = 5
    for_s: float = 1800.0
    then: Literal["promote", "hold"] = "hold"

    def __post_init__(self) -> None:
        """Raises BadInput for terms that nothing can be judged by."""
        numbers = (self.slower, self.failures, self.window_s, self.least, self.for_s)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise BadInput("a trial's terms are numbers", "write --for 30m --window 30s --slower 1.10")
        if self.window_s <= 0 or self.for_s <= 0:
            raise BadInput("a trial and its windows take more than 0 s", "write --for 30m --window 30s")
        if self.slower <= 0 or not 0 <= self.failures < 1 or self.least < 1:
            raise BadInput("a trial's limits are out of range", "write --slower 1.10; failures lie between 0 and 1")
        if self.then not in ("promote", "hold"):
            raise BadInput(f"nothing is done by the name of {self.then!r}", "write --then promote, or --then hold")


@dataclass(frozen=True)
class Judged:
    """`outcome` by `rule` after so many windows, and why, in a sentence."""

    outcome: Outcome
    rule: str
    windows: int
    said: str


@dataclass
class _Arm:
    """One arm's requests of a window: the times of those that were answered, and of each whether it failed."""

    times_ms: list[float] = field(default_factory=list)
    failed: list[bool] = field(default_factory=list)


@dataclass
class Trial:
    """What has been seen since `began` (seconds on the clock of `hear`)."""

    terms: Terms
    began: float
    ratios: list[float] = field(default_factory=list)
    excess: list[int] = field(default_factory=list)
    halves: list[float] = field(default_factory=list)
    _window: int = 0
    _arms: dict[str, _Arm] = field(default_factory=dict)

    def hear(self, now: float, arm: str, sticky: str, duration_ms: float, failed: bool) -> None:
        """A request that is over. Those that their clients gave up are not told of."""
        self.close(now)
        half = (
            "first"
            if hashlib.blake2b(sticky.encode(errors="surrogatepass"), digest_size=1).digest()[0] % 2
            else "second"
        )
        for name in (arm, *([half] if arm == "live" else [])):
            seen = self._arms.setdefault(name, _Arm())
            seen.failed.append(failed)
            if not failed:
                seen.times_ms.append(duration_ms)

    def close(self, now: float) -> None:
        """Count the windows that are over."""
        window = int((now - self.began) / self.terms.window_s)
        if window == self._window:
            return
        live, canary = self._arms.get("live", _Arm()), self._arms.get("canary", _Arm())
        self.excess += [int(one) - int(other) for one, other in zip(canary.failed, live.failed, strict=False)]
        self._compare(self.ratios, canary, live)
        self._compare(self.halves, self._arms.get("first", _Arm()), self._arms.get("second", _Arm()))
        self._window, self._arms = window, {}

    def _compare(self, into: list[float], one: _Arm, other: _Arm) -> None:
        if min(len(one.times_ms), len(other.times_ms)) >= self.terms.least:
            into.append(math.log(stats.median(one.times_ms) / stats.median(other.times_ms)))

    def judge(self, now: float) -> Judged:
        """The verdict so far: a rule that is broken rejects, all of them kept accept."""
        self.close(now)
        terms, alpha = self.terms, ALPHA / len(RULES)
        latency = stats.bet(self.ratios, math.log(terms.slower), alpha)
        failures = bet_on_mean(self.excess, terms.failures, alpha)
        n = len(self.ratios)
        ratio = math.exp(latency.interval.estimate) if n else math.nan
        much = f"{ratio:.2f}x the live version's time in {n} windows; at most {terms.slower:.2f}x is allowed"
        if failures == "rejected":
            share = sum(self.excess) / len(self.excess)
            said = f"{share:.1%} more of its requests fail; at most {terms.failures:.1%} more are allowed"
            return Judged("rejected", "canary.failures", n, said)
        if latency.outcome == "rejected":
            return Judged("rejected", "canary.latency", n, much)
        if latency.outcome == failures == "accepted":
            if self.differs():
                said = "two halves of the live version's own users differ as much: windows tell nothing here"
                return Judged("inconclusive", "canary.latency", n, said)
            return Judged("accepted", "canary.latency", n, much)
        return Judged("inconclusive", "canary.latency", n, f"{much}: not enough windows to tell" if n else "no windows")

    def differs(self) -> bool:
        """Whether two halves of the live arm's users differ by more than the canary may."""
        limit = math.log(self.terms.slower)
        sides: Sequence[Sequence[float]] = (self.halves, [-x for x in self.halves])
        return any(stats.bet(side, limit, ALPHA).outcome == "rejected" for side in sides)

    def over(self, now: float) -> bool:
        """Whether its time is up."""
        return now - self.began >= self.terms.for_s


STAKES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of the wealth that are staked; all wealths are averaged."""


def bet_on_mean(differences: Sequence[float], limit: float, alpha: float) -> Outcome:
    """Whether the mean of differences in [-1, 1] lies below a limit: accepted, rejected above it, or inconclusive.

    A gambler wins where each is below the limit on average whatever came before, another where it is above. If one's
    claim is false, the chance that its wealth ever passes 1 / alpha is alpha at most (Ville).
    Source: Waudby-Smith and Ramdas 2023, "Estimating means of bounded random variables by betting", 4.
    """
    for outcome, side, worst in (("accepted", -1, 1 - limit), ("rejected", 1, 1 + limit)):
        wealth = [0.0] * len(STAKES)
        for difference in differences:
            for n, stake in enumerate(STAKES):
                wealth[n] += math.log1p(stake / worst * side * (difference - limit))
            if _averaged(wealth) >= -math.log(alpha):
                return cast(Outcome, outcome)
    return "inconclusive"


def _averaged(wealth: Sequence[float]) -> float:
    """The logarithm of the mean of wealths, of their logarithms."""
    most = max(wealth)
    return most + math.log(sum(math.exp(w - most) for w in wealth) / len(wealth))
