"""Does a version answer as itself? The result of a check, as a verdict and as a line of the log. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peftopt.canary.fingerprint import Wrong
from peftopt.canary.mixed import Round
from peftopt.loadtest.arrivals import SERVE_CHECK
from peftopt.loadtest.moments import utc
from peftopt.records import Json

FORMAT = 1

Verdict = Literal["own", "stale", "wrong", "unclear"]
"""It answers as itself; as another known version of the same adapter; as something else, or as the base; nobody can
tell: the engine gives no log-probabilities, or no answer."""


@dataclass(frozen=True)
class Check:
    """The check of a version by its fingerprint prompts at `at` (seconds since 1970). `adapter`: its name for users;
    its `version`, "" for a model that the engine had from its start; the `arm` that it answers in, "" for none.
    `distance` from its own fingerprint in units of its own noise, the largest over the prompts; `why` it is not its
    own; `answers`: counts by verdict."""

    adapter: str
    version: str
    arm: str
    verdict: Verdict
    at: float
    distance: float | None = None
    why: str = ""
    answers: Mapping[Verdict, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Json]:
        """The line of the log."""
        return {
            "kind": SERVE_CHECK,
            "format": FORMAT,
            "ts": utc(self.at),
            "timestamp": round(1e3 * self.at, 3),
            "adapter": self.adapter,
            "version": self.version,
            "arm": self.arm,
            "verdict": self.verdict,
            "distance": None if self.distance is None else round(self.distance, 3),
        }


@dataclass(frozen=True)
class Itself:
    """The result for the answers of one version: the `verdict` over all, and the other fields as in Check."""

    verdict: Verdict
    distance: float | None = None
    why: str = ""
    answers: Mapping[Verdict, int] = field(default_factory=dict)


def judged(name: str, seen: Round) -> Itself:
    """Judge the answers of a version; `name` is its served name."""
    answered = seen.answered.count(name)
    failed = [why for whose, why in seen.failed if whose == name]
    wrong = [each for each in seen.wrong if each.model == name]
    answers: Counter[Verdict] = Counter(map(_of_answer, wrong))
    verdicts = set(answers)
    answers["own"] = answered - len(wrong)
    answers["unclear"] = len(failed)
    distance = seen.distances.get(name)
    if verdicts:
        worst = max(wrong, key=lambda each: each.distance)
        return Itself("stale" if verdicts == {"stale"} else "wrong", distance, str(worst), answers)
    if failed or not answered:
        return Itself("unclear", None, failed[0] if failed else "nothing was asked", answers)
    return Itself("own", distance, "", answers)


def _of_answer(wrong: Wrong) -> Verdict:
    """ "stale" for an answer as another version of the same adapter gives: both are named NAME@HASH."""
    whose, at, _ = wrong.model.partition("@")
    return "stale" if at and wrong.like.partition("@")[:2] == (whose, at) else "wrong"
