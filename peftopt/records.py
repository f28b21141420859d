"""The words of peftopt: frozen values that flow from recipe to report. No behaviour beyond naming."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FORMAT = 1
"""Version of every line in measurements.jsonl and of decision.json."""

YAML = (".yaml", ".yml")
NAME = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}")
"""What a variant or a workload may be called: safe in a path, a report and a metric's name."""

GENERIC = "generic"
"""Stands for the texts that come with peftopt where a file of calibration rows is asked for."""

SAFETENSORS = "safetensors"
"""The format of weights that transformers opens; a plug-in may have another."""

Json = Any
"""JSON of other programs, whose form is theirs."""

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]
"""JSON of our own: what a report writes as data."""

Outcome = Literal["accepted", "rejected", "inconclusive", "not judged"]
Stage = Literal["build", "launch", "speed", "quality"]


# ---- what a user names -------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A folder of weights and the adapters that still sit on top of it (none after a merge)."""

    path: str
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plugin:
    """What the core knows of a plug-in file without running it.

    `kind` is "transform", "engine" or "policy"; `technique` names its row of the trade-off table ("merge", "bake",
    "quantize", "compile", "truncate", "shorten" or "" for none); `params` is its frozen dataclass, whose fields and
    defaults are its schema; `needs` are the modules it imports; `environment` is whose Python runs it; `reader` the
    engine that opens what a quantizer wrote; `format` the kind of weights that a transform writes or an engine opens;
    `weights` the file that a transform of another format than safetensors writes; `serves` whether an engine is a
    server, which can be put under load; `device` what it computes on where that is not any machine ("cuda").
    """

    name: str
    kind: str
    help: str
    technique: str
    params: type
    needs: tuple[str, ...] = ()
    environment: str = "main"
    calibrates: bool = False
    reader: str = "eager"
    format: str = SAFETENSORS
    weights: str = ""
    serves: bool = False
    device: str = ""


@dataclass(frozen=True)
class Step:
    """One technique of a variant: a plug-in and its parameters, defaults filled in."""

    plugin: str
    kind: str
    technique: str
    params: Mapping[str, Json] = field(default_factory=dict)
    calibrates: bool = False
    environment: str = "main"


@dataclass(frozen=True)
class Variant:
    """A named chain of transforms (`steps`, in order), run on an engine; `policies` change its requests."""

    name: str
    steps: tuple[Step, ...]
    engine: Step
    policies: tuple[Step, ...] = ()

    @property
    def techniques(self) -> tuple[Step, ...]:
        """Every step that the trade-off table may judge: transforms, engine, policies."""
        return tuple(s for s in (*self.steps, self.engine, *self.policies) if s.technique)


@dataclass(frozen=True)
class Workload:
    """Timed requests. `lengths`: "fixed", where `new_tokens` are always generated in full, so that they are the same
    for all; or "natural", where answers stop by themselves, `new_tokens` at the latest.

    `slice` keeps only the prompts that carry this tag ("" = all of them).

    Under load a server is sent `requests` in a turn, by so many `users` in a closed loop, each asking when answered; or
    as they come at random (Poisson), `rate` a second. 0 and 0 = one batch after the other.
    """

    name: str
    prompts: str
    new_tokens: int = 64
    batch: int = 1
    slice: str = ""
    lengths: str = "fixed"
    users: int = 0
    rate: float = 0.0
    requests: int = 32

    @property
    def loaded(self) -> bool:
        """Whether it is a load on a server, by `users` or at a `rate`."""
        return bool(self.users or self.rate)


@dataclass(frozen=True)
class Invariants:
    """What every answer must keep, whoever gives it. "" and () are not asked for.

    `regex`: matches the whole answer. `labels`: the answer is one of these. `numbers`: "kept", every number of the
    expected answer is in the answer. `language`: "kept", the answer is in the language of the expected answer, or of
    the prompt where none is expected; or the code of one ("de"). `refusal`: "kept", rows tagged as slice "refusal" are
    refused and no others; or the regular expression that tells a refusal.
    """

    regex: str = ""
    labels: tuple[str, ...] = ()
    numbers: str = ""
    language: str = ""
    refusal: str = ""


NO_INVARIANTS = Invariants()


@dataclass(frozen=True)
class Quality:
    """Answers that are checked: prompts with `expected`, decoded until they stop by themselves.

    `slice` restricts them to those with this tag ("" = all); `rows` is the most to ask, those tagged critical first and
    long ones last; 0 = all. `tasks` of lm-evaluation-harness are asked beside them, names or paths of YAML files, each
    with at most `task_rows` rows (0 = all).
    """

    prompts: str
    schema: str | None = None
    new_tokens: int = 256
    batch: int = 16
    rows: int = 0
    slice: str = ""
    invariants: Invariants = NO_INVARIANTS
    tasks: tuple[str, ...] = ()
    task_rows: int = 0


def task_name(given: str) -> str:
    """What a task is called in metrics: a name of lm-evaluation-harness's, or that of a task file without its end."""
    return Path(given).stem if given.endswith(YAML) else given


@dataclass(frozen=True)
class Measure:
    """How hard to measure. A turn is `warmup` discarded and `requests` timed requests of one variant.

    `relaunch`: blocks between fresh processes. `min_blocks`: what a variant that nothing rejects gets on the minimized
    workload even where it is decided, for who compares runs. `max_blocks`: the last look (10, 16, 24, 40 or 60) the
    race may reach, or more than 60 for an open-ended race. `clock`: "wall", "cpu" or "auto", the clock that judges.
    `threads`: per measured process, 0 = all cores.
    """

    requests: int = 3
    warmup: int = 1
    relaunch: int = 2
    max_blocks: int = 60
    clock: str = "wall"
    threads: int = 0
    deadline_s: float = 900.0
    min_blocks: int = 0


@dataclass(frozen=True)
class Metric:
    """A figure by name: "latency.p50@chat". `workload` is "" for figures of the whole variant ("perplexity")."""

    name: str
    workload: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.workload}" if self.workload else self.name


@dataclass(frozen=True)
class Threshold:
    """`metric op limit`, e.g. "latency.p95@chat <= 400 ms" or "perplexity <= 1.02x" (relative to the baseline).

    `limit` is in base units: ms for times, bytes for memory and size, tokens/s for throughput, a share in 0..1
    for rates; a ratio when `relative`. `text` is what the user wrote.
    """

    metric: Metric
    op: Literal["<=", "<", ">=", ">"]
    limit: float
    relative: bool
    text: str


@dataclass(frozen=True)
class Rule:
    """One half-row of the trade-off table, e.g. technique "merge", name "gain", limit 0.15. None = switched off."""

    technique: str
    name: str
    limit: float | None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every path absolute, every default filled in."""

    name: str
    path: str
    base: str
    adapter: str
    variants: Mapping[str, Variant]
    baseline: str
    workloads: Mapping[str, Workload]
    quality: Quality | None
    calibration: str | None
    rules: tuple[Rule, ...]
    require: tuple[Threshold, ...]
    minimize: Metric
    measure: Measure
    seed: int = 0

    def timed_requests(self, workload: str) -> int:
        """Timed requests in a turn of this workload."""
        timed = self.workloads[workload]
        return timed.requests if timed.loaded else self.measure.requests


# ---- what a run leaves -------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """A built model on disk. `id` hashes the inputs that shape it, `content` the files themselves."""

    id: str
    path: str
    content: str
    size_bytes: int
    seconds: float
    cached: bool = False
    facts: Mapping[str, Json] = field(default_factory=dict)
    """What its manifest says beside: build time, memory, weight scan."""


@dataclass(frozen=True)
class Build:
    """One transform to run: its artifact's id, its parent's id ("" = the base with the adapter)."""

    id: str
    parent: str
    step: Step


@dataclass(frozen=True)
class Plan:
    """Everything the decision needs to know of the recipe: builds in order, shared prefixes once."""

    recipe: Recipe
    builds: tuple[Build, ...]
    models: Mapping[str, str]
    """variant name -> id of the build whose model it opens, "" for the adapter on its base."""
    left_out: tuple[str, ...] = ()
    """Variants that were measured and are not judged again; they stay what others are compared with."""


TWIN = "~aa"
"""Suffix of the A/A arm: a hidden second copy of the baseline that must not differ from it."""


@dataclass(frozen=True)
class Measurement:
    """One line of measurements.jsonl, as it is written. `probe` says what `values` holds, raw samples among them:
    measurements.py has a record for each probe, and makes it of a line. `launch` tells the baseline's two runs of
    answers apart; `at` is when it was written."""

    probe: str
    variant: str
    workload: str = ""
    launch: int = 0
    values: Mapping[str, Json] = field(default_factory=dict)
    at: str = ""


# ---- what the decision says --------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds that hold at `level` (two-sided), from `n` samples."""

    estimate: float
    low: float
    high: float
    n: int
    level: float = 0.95


@dataclass(frozen=True)
class Verdict:
    """What one named rule says of one variant: the figure, its interval, its n, the clock, and why.

    `rule` is "merge.gain", "int8.critical_errors", "require: latency.p95@chat <= 400 ms", "artifact.intact", …;
    `against` the variant it was compared with; `reason` one sentence for a person. Of a race: its `workload`, and where
    it is inconclusive `blocks_needed` in all and about how many more `minutes_needed` (None where it is not known);
    `hopeless` says that the blocks it may have can hardly decide it.
    """

    rule: str
    outcome: Outcome
    reason: str
    against: str = ""
    value: Interval | None = None
    unit: str = ""
    limit: float | None = None
    clock: str = ""
    blocks_needed: int | None = None
    workload: str = ""
    minutes_needed: float | None = None
    hopeless: bool = False
    protects: str = ""
    """What the rule keeps from being shipped, in a few words."""


@dataclass(frozen=True)
class VariantDecision:
    """A variant's outcome, the verdicts behind it, the one that decided, and the figures for the table.

    `figures` maps a metric's name ("latency.p50@chat", "speed@chat" = ratio to the baseline, "accuracy",
    "perplexity", "kl", "top1", "critical_errors", "memory", "size", "load_time", …) to its Interval. `notes` warn,
    `remarks` only tell; `certificates` say in a line each what the artifacts it is made of were checked for.
    """

    name: str
    techniques: tuple[str, ...]
    outcome: Outcome
    decided_by: str
    verdicts: tuple[Verdict, ...]
    figures: Mapping[str, Interval]
    notes: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """The machine-readable outcome; every report is rendered from it. `clock` judged, "wall" or "cpu", for
    `clock_reason`."""

    recipe: str
    baseline: str
    minimize: str
    clock: str
    chosen: str | None
    outcome: Outcome
    sentence: str
    variants: tuple[VariantDecision, ...]
    warnings: tuple[str, ...] = ()
    machine: Mapping[str, Json] = field(default_factory=dict)
    format: int = FORMAT
    clock_reason: str = ""
