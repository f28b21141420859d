"""How long a run will take, before it starts: from the speed of requests and counts of work to seconds, by part. Pure.

Every time is a span, from the least to the most that it may be: how many answers have to be generated, and how many
blocks a race takes, is known afterwards only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

BUILDS, COMPILING, ANSWERS = "builds", "compiling", "answers"
"""Parts of a run, beside the race of each workload."""

PREPARED = (BUILDS, COMPILING, ANSWERS)
"""What is over when the races begin."""

SIDE_BY_SIDE = (0.9, 1.0)
"""Answers of several variants at a time take so much of the time that they take one after the other, on all cores."""

SCORING = (1.1, 1.3)
"""What scoring an answer takes, of reading it: likelihoods are taken of its tokens."""

LAST_S = 5.0
"""Beside all parts: the memory's speed, the decision and its reports."""

MOSTLY = 0.5
"""The share of the whole above which a part is most of it."""

MINUTE, HOUR = 60, 3600


@dataclass(frozen=True)
class Span:
    """From the least to the most: seconds, or a number that seconds are multiplied with."""

    least: float
    most: float

    def __add__(self, other: Span) -> Span:
        """Both, one after the other."""
        return Span(self.least + other.least, self.most + other.most)

    def __mul__(self, times: Span | float) -> Span:
        """So many of it."""
        few, many = (times.least, times.most) if isinstance(times, Span) else (times, times)
        return Span(self.least * few, self.most * many)

    @property
    def middle(self) -> float:
        """Half way."""
        return (self.least + self.most) / 2


NOTHING = Span(0.0, 0.0)


@dataclass(frozen=True)
class Pace:
    """How fast a variant is: seconds for each token of a prompt, and for each that it generates, of a single row."""

    prompt_token: Span
    token: Span


@dataclass(frozen=True)
class Answering:
    """One variant's answers to `rows` prompts: mean tokens of a prompt and of an answer, and the share of the answers
    that are generated token by token. The others are found by reading the expected answer. `start`: seconds until its
    model is loaded."""

    rows: int
    prompt_tokens: float
    new_tokens: Span
    generated: Span
    pace: Pace
    start: Span = NOTHING


@dataclass(frozen=True)
class Racing:
    """A workload's race: how many blocks, `requests` in a turn with those that are discarded, blocks between launches;
    the seconds of a request of each arm, and of one launch of all arms."""

    blocks: Span
    requests: int
    relaunch: int
    arms: Sequence[Span]
    launch: Span


@dataclass(frozen=True)
class Work:
    """What a run has to do. `lanes`: how many builds or compilations go on side by side."""

    builds: Sequence[Span] = ()
    compiling: Sequence[Span] = ()
    answers: Sequence[Answering] = ()
    races: Mapping[str, Racing] = field(default_factory=dict)
    lanes: int = 1


@dataclass(frozen=True)
class Duration:
    """Seconds by part; what is `not_counted`, in words; where nothing can be said, why; and whether the machine was
    `busy` with other work when it was timed."""

    parts: Mapping[str, Span] = field(default_factory=dict)
    not_counted: Sequence[str] = ()
    unknown: str = ""
    busy: bool = False

    @property
    def whole(self) -> Span:
        """All parts, and the little that is beside them."""
        return total(self.parts.values()) + Span(LAST_S, LAST_S)


def parts(work: Work) -> dict[str, Span]:
    """Seconds of each part of the work; a part without work is left out."""
    found = {
        BUILDS: _apart(work.builds, work.lanes),
        COMPILING: _apart(work.compiling, work.lanes),
        ANSWERS: total(map(_answers, work.answers)) * Span(*SIDE_BY_SIDE),
        **{f"the race of {name}": _race(racing) for name, racing in work.races.items()},
    }
    return {name: span for name, span in found.items() if span.most}


def total(spans: Iterable[Span]) -> Span:
    """All of them, one after the other."""
    return sum(spans, NOTHING)


def _apart(jobs: Sequence[Span], lanes: int) -> Span:
    """Jobs that may go on side by side, each on one core: at best all lanes are busy, at worst one waits for
    another."""
    together = total(jobs)
    longest = max((job.least for job in jobs), default=0.0)
    return Span(max(together.least / lanes, longest), together.most)


def _answers(asked: Answering) -> Span:
    read = (Span(asked.prompt_tokens, asked.prompt_tokens) + asked.new_tokens) * asked.pace.prompt_token
    generated = asked.new_tokens * asked.pace.token * asked.generated
    return (read * Span(*SCORING) + generated) * asked.rows + asked.start


def _race(racing: Racing) -> Span:
    launches = Span(*(-(-round(n) // racing.relaunch) for n in (racing.blocks.least, racing.blocks.most)))
    turns = total(racing.arms) * racing.requests
    return turns * racing.blocks + racing.launch * launches


# ---- saying it ---------------------------------------------------------------------------------


def words(span: Span) -> str:
    """ "20 to 45 s", "6 to 15 minutes", "1.5 to 4.0 hours"."""
    if span.most < 1.5 * MINUTE:
        return _between(f"{span.least:.0f}", f"{max(span.most, 1):.0f}", "s")
    if span.most < 1.5 * HOUR:
        if span.least < MINUTE / 2:
            return f"up to {_count(span.most / MINUTE, 'minute')}"
        return _between(f"{max(span.least / MINUTE, 1):.0f}", f"{span.most / MINUTE:.0f}", "minutes")
    return _between(f"{span.least / HOUR:.1f}", f"{span.most / HOUR:.1f}", "hours")


def _between(least: str, most: str, unit: str) -> str:
    if least != most:
        return f"{least} to {most} {unit}"
    return f"{most} {unit.removesuffix('s') if most == '1' and unit != 's' else unit}"


def _count(number: float, unit: str) -> str:
    return _between(f"{number:.0f}", f"{number:.0f}", f"{unit}s")


def sentence(duration: Duration) -> str:
    """How long a run takes, and of what most of it is: "a run takes about 6 to 15 minutes, most of it answers (…)"."""
    left_out = f"; not counted: {'; '.join(duration.not_counted)}" if duration.not_counted else ""
    if duration.unknown:
        return f"how long a run takes is not known before it starts: {duration.unknown}{left_out}"
    whole = duration.whole
    ordered = sorted(duration.parts.items(), key=lambda each: each[1].middle, reverse=True)
    first, span = ordered[0] if ordered else ("", NOTHING)
    mostly = f", most of it {first}" if span.middle > MOSTLY * whole.middle else ""
    listed = ", ".join(f"{name} {words(each)}" for name, each in duration.parts.items())
    busy = "; other processes keep this machine busy now: it takes less once they are done" if duration.busy else ""
    return f"a run takes about {words(whole)}{mostly}" + (f" ({listed})" if listed else "") + left_out + busy


LONG_S = 30 * MINUTE
"""A run that may take longer is told how to make it shorter."""

SHORTER = {
    BUILDS: "take variants out",
    COMPILING: "take compiled variants out",
    ANSWERS: "lower quality.rows, which can then show less",
}
"""What makes a part of a run shorter; a race is none of these."""


def shorter(duration: Duration) -> str:
    """How to make a long run shorter, its largest part first; "" for one that is not long, or not known."""
    if not duration.parts or duration.whole.most < LONG_S:
        return ""
    ordered = sorted(duration.parts.items(), key=lambda each: each[1].most, reverse=True)
    large = [name for name, span in ordered if span.most > duration.whole.most / 4]
    ways = dict.fromkeys(SHORTER.get(name, "take variants out, or lower new_tokens of its workload") for name in large)
    return f"to shorten {', '.join(large)}: {'; '.join(ways)}" if ways else ""


def left(duration: Duration, done: Sequence[str]) -> str:
    """What is left once these parts are over: "about 3 to 6 minutes left: the race of chat"; "" where that is not
    known."""
    still = {name: span for name, span in duration.parts.items() if name not in done}
    return f"about {words(total(still.values()))} left: {', '.join(still)}" if still else ""
