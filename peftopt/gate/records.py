"""What a gate keeps of a run, and what it says of two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftopt.records import Interval, Outcome

FORMAT = 1
"""Version of a baseline file."""


@dataclass(frozen=True)
class Hashes:
    """What a run was made of, by content (SHA-256, hex). `adapter_shape`: the names, shapes and dtypes of the adapter's
    tensors, which decide what it costs unmerged. `answers`: the prompts of `quality` with all that decides what is
    asked and how it is judged, "" without such prompts; `workloads` the same of each workload; `folders` those that
    parameters name, by variant, step and parameter ("drafted.speculate.draft")."""

    base: str
    adapter: str
    adapter_shape: str
    tokenizer: str
    answers: str
    workloads: Mapping[str, str]
    folders: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RuleFigure:
    """One rule of the variant: its outcome and its value. `race` names the race that shows its speed, "" for none."""

    outcome: Outcome
    value: Interval | None = None
    unit: str = ""
    limit: float | None = None
    against: str = ""
    race: str = ""


@dataclass(frozen=True)
class Race:
    """Log ratios of times, variant over `against`, one for each block, in groups that share a launch."""

    clock: str
    launches: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Scores:
    """The score, 0 to 1, of each answer. `asked` prompts, whose sorted ids hash to `rows`; those with less than 1 are
    named in `below`."""

    asked: int
    rows: str
    below: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Errors:
    """Critical errors by prompt, of `asked` prompts whose sorted ids hash to `rows`. `always`: what every answer of the
    run shows, the variant's own and both of the adapter's; `sometimes`: what only some of them show, so that it hangs
    on noise. `limit` is the recipe's, on their rate."""

    asked: int
    rows: str
    limit: float
    always: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sometimes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """What a gate keeps of one variant of one run.

    `variant` is what the run ships, the adapter as it is served where it ships nothing else; `outcome` and `decided_by`
    are its own; `chosen` is what the run would ship. `scores` are by metric ("accuracy", "validity", "task.NAME").
    `machine` and `versions` are in words.
    """

    recipe: str
    variant: str
    serves_adapter: bool
    outcome: Outcome
    decided_by: str
    chosen: str
    chain: tuple[str, ...] = ()
    rules: Mapping[str, RuleFigure] = field(default_factory=dict)
    races: Mapping[str, Race] = field(default_factory=dict)
    scores: Mapping[str, Scores] = field(default_factory=dict)
    errors: Errors | None = None
    hashes: Hashes | None = None
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerances:
    """How much worse a figure may become: `speed` and `size` as shares of the ratio, `answers` as a share of the score
    that was accepted."""

    speed: float = 0.1
    answers: float = 0.05
    size: float = 0.1


@dataclass(frozen=True)
class Baseline:
    """What was accepted, since `written` (a day, UTC), and how much worse it may become."""

    written: str
    accepted: Snapshot
    tolerances: Tolerances = Tolerances()


@dataclass(frozen=True)
class Case:
    """One question of a gate. `accepted` and `now` are the value of both runs in `unit`; `change` is what is tested: a
    ratio, now over accepted, with the bounds that may pass it, and `limit` its tolerance."""

    name: str
    outcome: Outcome
    reason: str
    accepted: Interval | None = None
    now: Interval | None = None
    unit: str = ""
    change: Interval | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Gate:
    """A gate's answer: `sentence` says it, `cases` are why, `notes` what else a reviewer should know."""

    recipe: str
    outcome: Outcome
    sentence: str
    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()
