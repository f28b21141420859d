"""A listener: the detectors of one adapter, or of all of them together, and their parts of the budget. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from peftopt.metrics import format_value
from peftopt.records import JsonValue
from peftopt.watch.detectors import Bet, Detector, number
from peftopt.watch.hearing import Pool, Topic

TIMES = 0.75
"""Of a listener's budget, what its detectors of times have where it has others too: a change of times is the hardest to
see."""


@dataclass
class Listening:
    """A detector at work: its `weight` in its listener's budget, and how many requests it has heard since it was last
    judged."""

    topic: Topic
    weight: float
    detector: Detector
    unjudged: int = 0

    def hear(self, value: float, n: int, began: float) -> bool:
        """A span's number, of so many requests. Whether it is to be judged now."""
        self.detector.hear(value, n, began)
        self.unjudged += n
        if self.unjudged < self.topic.fewest:
            return False
        self.unjudged = 0
        return True

    def begin_anew(self) -> Bet:
        """Forget all; what had won most until now."""
        leader = self.detector.leader
        self.detector = Detector(self.topic.mean)
        return leader

    @property
    def seen(self) -> str:
        """What it has heard, for a person; "" where that is nothing yet."""
        if not self.detector.n:
            return ""
        heard = said(self.detector.hits, self.detector.n, self.topic)
        return f"{heard}; {shown(self.topic.mean)} at most was promised ({self.topic.name})"


@dataclass
class Listener:
    """All that listens to an adapter, or to all together."""

    by_topic: dict[Topic, Listening]
    pool: Pool

    @classmethod
    def of(cls, topics: Iterable[Topic]) -> Listener:
        """One that has heard nothing."""
        weights = weights_of([*topics])
        return cls({topic: Listening(topic, weight, Detector(topic.mean)) for topic, weight in weights.items()}, Pool())

    def as_json(self) -> dict[str, JsonValue]:
        """Its state, as `restore` reads it."""
        parts: list[JsonValue] = [[each.unjudged, each.detector.as_json()] for each in self.by_topic.values()]
        return {"pool": asdict(self.pool), "detectors": parts}

    def restore(self, state: JsonValue) -> None:
        """Be as it was. Raises one of errors.BROKEN for what is not a state of the same topics."""
        if not isinstance(state, dict):
            raise TypeError("a listener's state has fields")
        parts = state["detectors"]
        if not isinstance(parts, list):
            raise TypeError("a listener's state has detectors")
        self.pool = Pool(**numbers(state["pool"]))
        for each, part in zip(self.by_topic.values(), parts, strict=True):
            if not isinstance(part, list):
                raise TypeError("a detector's state is a list")
            unjudged, detector = part
            each.unjudged, each.detector = int(number(unjudged)), Detector.restored(each.topic.mean, detector)


def numbers(state: JsonValue) -> dict[str, Any]:
    """The fields of a state that has numbers alone. Raises TypeError for another."""
    if not isinstance(state, dict):
        raise TypeError("expected fields with numbers")
    return {name: number(value) for name, value in state.items()}


def weights_of(topics: list[Topic]) -> dict[Topic, float]:
    """The parts of a listener's budget: detectors of times have TIMES in equal parts, the others the rest. They sum to
    1."""
    weights = {}
    for topic in topics:
        alike = sum(other.of_times == topic.of_times for other in topics)
        part = 1.0 if alike == len(topics) else TIMES if topic.of_times else 1 - TIMES
        weights[topic] = part / alike
    return weights


def said(hits: float, n: int, topic: Topic) -> str:
    """ "9.8 % of 1,204 requests took longer than 500 ms"."""
    return f"{shown(hits / n)} of {n:,} {topic.amiss}"


def shown(share: float) -> str:
    """ "9.8 %"."""
    return format_value("share", share)
