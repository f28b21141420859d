"""Is the new version as good as the live one? One verdict for each rule, with three outcomes. Pure.

`windows` judge times and failures, `shadow` answers to users' prompts, `labelled` answers to the operator's own. All
but the last are valid at any time. A fine-tune is meant to change answers, so a changed answer alone rejects nothing:
the operator sets how many may change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peftopt import stats
from peftopt.canary import fingerprint
from peftopt.decision.evidence import exp
from peftopt.errors import BadInput
from peftopt.gateway import bets
from peftopt.gateway.bets import Tally
from peftopt.gateway.labelled import Labelled
from peftopt.gateway.said import Said, Vocabulary, flags
from peftopt.gateway.windows import Windows
from peftopt.metrics import counted, percent
from peftopt.records import Interval, Json, Outcome, Verdict

ALPHA = 0.01
"""The chance of a wrong verdict on each side, shared by the rules that judge at any time."""

MOST_DISTANCES = 200
"""So many of the last distances between answers are kept, for the report."""


@dataclass(frozen=True)
class Terms:
    """The length of a trial, and how much worse the new version may be.

    `shadow`: share of users' requests that both versions get again. `slower`: its median time may be at most this times
    the live one's; `failures` and `critical`: the shares of its failed requests, and of its answers with a critical
    error, at most this much higher; `changed`: the share of greedy answers that may differ, None = any; `lost`: the
    share of right answers to labelled prompts that may be lost; `new_tokens` of an answer to those, at most; `schema`
    that every answer keeps.

    Windows of `window_s` seconds in which each arm answered `least` requests. After `for_s` seconds without a verdict
    it is held; an accepted one is promoted if `then` says so."""

    shadow: float = 0.0
    slower: float = 1.10
    failures: float = 0.02
    critical: float = 0.02
    changed: float | None = None
    lost: float = 0.02
    new_tokens: int = 256
    schema: Mapping[str, Json] | None = None
    window_s: float = 30.0
    least: int = 5
    for_s: float = 1800.0
    then: Literal["promote", "hold"] = "hold"

    def __post_init__(self) -> None:
        """Raises BadInput for terms that nothing can be judged by."""
        shares = (self.shadow, self.failures, self.critical, self.lost, self.changed or 0.0)
        numbers = (*shares, self.slower, self.window_s, self.least, self.for_s, self.new_tokens)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise BadInput("a trial's terms are numbers", "write --for 30m --window 30s --slower 1.10")
        if self.window_s <= 0 or self.for_s <= 0:
            raise BadInput("a trial and its windows take more than 0 s", "write --for 30m --window 30s")
        if not 0 <= self.shadow <= 1 or not all(0 <= share < 1 for share in shares[1:]):
            raise BadInput("a share is out of range", "shares lie between 0 and 1: write --shadow 5% --changed 5%")
        if self.slower <= 0 or self.least < 1 or self.new_tokens < 1:
            raise BadInput("a trial's limits are out of range", "write --slower 1.10 --new-tokens 256")
        if self.then not in ("promote", "hold"):
            raise BadInput(f"nothing is done by the name of {self.then!r}", "write --then promote, or --then hold")


@dataclass
class Shadow:
    """Users' prompts that both versions got again: answers with a critical error, greedy answers that changed, and the
    distances of log-probabilities of the new version and of the live one's second run from the live one's first
    (nats)."""

    critical: Tally = field(default_factory=Tally)
    changed: Tally = field(default_factory=Tally)
    first: str = ""
    """The first critical error that the live version did not make."""
    apart: list[tuple[float, float]] = field(default_factory=list)

    @property
    def distances(self) -> dict[str, float]:
        """The median distances of the new version, and of the live one's second run, from the live one's first
        (nats)."""
        if not self.apart:
            return {}
        new, again = zip(*self.apart, strict=True)
        return {"new": stats.median(new), "again": stats.median(again), "n": len(self.apart)}

    def add(self, new: Said, live: Said, again: Said, greedy: bool, terms: Terms, vocabulary: Vocabulary) -> None:
        """One more prompt. The new version's answer is compared with the live one's first; the second run shows what
        changes by itself."""
        ours, *known = (flags(said, terms.schema, vocabulary) for said in (new, live, again))
        self.critical.add(bool(ours - known[0]), bool(known[0] - ours))
        if fresh := ours - known[0] - known[1]:
            self.first = self.first or min(fresh)
        if greedy and not (new.error or live.error or again.error):
            self.changed.add(new.text != live.text, again.text != live.text)
        if new.print and live.print and again.print:
            found = fingerprint.distance(live.print, new.print), fingerprint.distance(live.print, again.print)
            self.apart = [*self.apart, found][-MOST_DISTANCES:]


@dataclass(frozen=True)
class Judged:
    """`outcome` by `rule`, and the reason, in a sentence; `verdicts` of every rule."""

    outcome: Outcome
    rule: str
    said: str
    verdicts: tuple[Verdict, ...] = ()


@dataclass
class Trial:
    """The data on a `version` (its name at the engine) after `passed_s` seconds. `users`: it answers some of them, so
    their requests show its times. Labelled prompts alone show none. `wrong`: an answer of another version; `itself`:
    how often it and the live one were asked whether they answer as themselves."""

    version: str
    terms: Terms
    users: bool = True
    passed_s: float = 0.0
    windows: Windows = field(default_factory=lambda: Windows(Terms.window_s, Terms.least))
    shadow: Shadow = field(default_factory=Shadow)
    wrong: str = ""
    itself: int = 0
    prompts: int = 0
    """Labelled prompts to ask; their answers are in a file of their own."""

    @classmethod
    def begin(cls, version: str, terms: Terms, users: bool = True, prompts: int = 0) -> Trial:
        """A trial without data."""
        windows = Windows(terms.window_s, terms.least)
        return cls(version, terms, users, windows=windows, prompts=prompts)

    def judge(self, labelled: Labelled | None = None, brief: bool = False) -> Judged:
        """The verdict so far: one broken rule rejects, all rules kept accept. With `brief`, parts that are slow to put
        in words have only their outcomes."""
        verdicts = self._verdicts(labelled or Labelled(), brief)
        for outcome in ("rejected", "inconclusive"):
            if first := next((v for v in verdicts if v.outcome == outcome), None):
                return Judged(first.outcome, first.rule, first.reason, verdicts)
        last = verdicts[-1]
        return Judged("accepted", last.rule, f"{counted(len(verdicts), 'rule')} kept; {last.reason}", verdicts)

    @property
    def over(self) -> bool:
        """Whether its time is up."""
        return self.passed_s >= self.terms.for_s

    def _verdicts(self, labelled: Labelled, brief: bool) -> tuple[Verdict, ...]:
        """The rules that reject at once come first, and times last: what answers is worth more than how soon."""
        terms, shares = self.terms, []
        if terms.shadow:
            shares.append(_Share("critical_errors", self.shadow.critical, terms.critical, self._critical))
        if terms.shadow and terms.changed is not None:
            what = "greedy answers are others, beyond those of the live version's own second run"
            shares.append(_Share("changed", self.shadow.changed, terms.changed, what))
        timed = self.users or bool(terms.shadow)
        if timed:
            shares.append(_Share("failures", self.windows.failed, terms.failures, "more of its requests fail"))
        alpha = ALPHA / (len(shares) + timed + bool(self.prompts))
        found = [_wrong_adapter(self.wrong, self.itself)]
        if self.prompts:
            found += labelled.verdicts(terms.critical, terms.lost, alpha)
        found += [share.judge(alpha) for share in shares]
        return (*found, self._latency(alpha, brief)) if timed else tuple(found)

    @property
    def _critical(self) -> str:
        first = f", first: {self.shadow.first}" if self.shadow.first else ""
        return f"more of its answers have a critical error{first}"

    def _latency(self, alpha: float, brief: bool) -> Verdict:
        """The median time against the live version's."""
        rule, limit, windows = "canary.latency", self.terms.slower, self.windows
        bets = windows.speed(math.log(limit), alpha)
        noisy = bets.outcome == "accepted" and windows.differs(math.log(limit), ALPHA)
        outcome: Outcome = "inconclusive" if noisy else bets.outcome
        if brief:
            return Verdict(rule, outcome, "", "live")
        ratio, n = exp(bets.race().interval), len(windows.ratios)
        said = f"{_times(ratio)} the live version's time in {counted(n, 'window')}; at most {limit:.2f}x is allowed"
        if not n:
            said = "no windows"
        elif noisy:
            said = "two halves of the live version's own requests differ as much: windows tell nothing here"
        elif outcome == "inconclusive":
            said += ": not enough windows to tell"
        return Verdict(rule, outcome, said, "live", ratio, "x", limit)


def _wrong_adapter(wrong: str, asked: int) -> Verdict:
    """One answer that is another version's rejects: caches or batches mix them up."""
    said = wrong or f"each answered as itself, {counted(asked + 1, 'time')}"
    return Verdict("canary.wrong_adapter", "rejected" if wrong else "accepted", said, "live")


@dataclass(frozen=True)
class _Share:
    """A share of requests that may be higher than the live version's by a `limit`, and what they are."""

    rule: str
    tally: Tally
    limit: float
    what: str

    def judge(self, alpha: float) -> Verdict:
        """The verdict so far, which errs `alpha` a side at most whenever one looks."""
        outcome, value = bets.judge(self.tally, self.limit, alpha), bets.interval(self.tally, alpha)
        if not self.tally.n:
            said = "no pair of requests yet"
        else:
            bounds = f"{percent(value.low, 1)} to {percent(value.high, 1)}, {counted(self.tally.n, 'pair')}"
            said = f"{percent(value.estimate, 1)} {self.what} ({bounds}); at most {percent(self.limit, 1)} are allowed"
            said += ": not enough pairs to tell" if outcome == "inconclusive" else ""
        return Verdict(f"canary.{self.rule}", outcome, said, "live", value, "share", self.limit)


def _times(ratio: Interval) -> str:
    bounded = math.isfinite(ratio.high) and ratio.low > 0
    return f"{ratio.estimate:.2f}x" + (f" ({ratio.low:.2f} to {ratio.high:.2f})" if bounded else "")
