"""Is the new version as fast as the live one, and does it fail no more often? Judged on windows of time. Pure.

Both run on one engine and share its load and its noise, so a window affects both alike. For speed a sample is a window:
the log ratio of the two arms' medians, or if the version answers no users, the median log ratio of requests that both
versions got. For failures a sample is a pair of requests, one of each arm. Two halves of the live arm are compared in
the same way: if they differ, the windows decide nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftopt import stats
from peftopt.gateway.bets import Tally
from peftopt.stats import Gamblers


@dataclass
class Arm:
    """One arm's requests of a window: the times of those that were answered, and of each whether it failed."""

    times_ms: list[float] = field(default_factory=list)
    failed: list[bool] = field(default_factory=list)


@dataclass
class Windows:
    """The finished windows: `ratios` log(new / live), `halves` log(live / live), and `failed`. An unfinished window is
    not stored: after a restart its requests do not count."""

    window_s: float
    least: int
    ratios: list[float] = field(default_factory=list)
    halves: list[float] = field(default_factory=list)
    failed: Tally = field(default_factory=Tally)
    _window: int = field(default=0, init=False)
    _arms: dict[str, Arm] = field(default_factory=dict, init=False)
    _pairs: list[tuple[float, float]] = field(default_factory=list, init=False)
    _gamblers: dict[tuple[str, float, float], Gamblers] = field(default_factory=dict, init=False, compare=False)

    def hear(self, at: float, arm: str, sticky: str, ms: float, failed: bool) -> None:
        """A user's request is over, `at` seconds from the start. Requests that clients gave up are not passed here."""
        self.close(at)
        digest = hashlib.blake2b(sticky.encode(errors="surrogatepass"), digest_size=1).digest()
        half = "first" if digest[0] % 2 else "second"
        for name in (arm, *([half] if arm == "live" else [])):
            seen = self._arms.setdefault(name, Arm())
            seen.failed.append(failed)
            if not failed:
                seen.times_ms.append(ms)

    def pair(self, at: float, new_ms: float, live_ms: float, again_ms: float) -> None:
        """A request that the new version got once and the live one twice, with no user waiting for it."""
        self.close(at)
        self._pairs.append((math.log(new_ms / live_ms), math.log(again_ms / live_ms)))

    def close(self, at: float) -> None:
        """Count the finished windows."""
        window = int(at / self.window_s)
        if window == self._window:
            return
        live, canary = self._arms.get("live", Arm()), self._arms.get("canary", Arm())
        for new, old in zip(canary.failed, live.failed, strict=False):
            self.failed.add(new, old)
        self._compare(self.ratios, canary, live)
        self._compare(self.halves, self._arms.get("first", Arm()), self._arms.get("second", Arm()))
        if self._pairs:
            new_, again = zip(*self._pairs, strict=True)
            self.ratios.append(stats.median(new_))
            self.halves.append(stats.median(again))
        self._window, self._arms, self._pairs = window, {}, []

    def _compare(self, into: list[float], one: Arm, other: Arm) -> None:
        if min(len(one.times_ms), len(other.times_ms)) >= self.least:
            into.append(math.log(stats.median(one.times_ms) / stats.median(other.times_ms)))

    def speed(self, limit: float, alpha: float) -> Gamblers:
        """Whether the ratios of all windows so far lie below a log ratio."""
        return self._bets("ratios", self.ratios, limit, alpha)

    def differs(self, limit: float, alpha: float) -> bool:
        """Whether two halves of the live arm differ by more than a log ratio."""
        sides = {"first": self.halves, "second": [-ratio for ratio in self.halves]}
        return any(self._bets(half, side, limit, alpha).outcome == "rejected" for half, side in sides.items())

    def _bets(self, what: str, ratios: Sequence[float], limit: float, alpha: float) -> Gamblers:
        """Bets on log ratios, of which those that were bet on before are not bet on again."""
        key = (what, limit, alpha)
        if key not in self._gamblers:
            self._gamblers[key] = Gamblers(limit, alpha)
        gamblers = self._gamblers[key]
        for ratio in ratios[len(gamblers) :]:
            gamblers.add(ratio)
        return gamblers
