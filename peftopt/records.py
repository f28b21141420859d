"""The words of peftopt: frozen values that flow from recipe to report. No behaviour beyond naming."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NewType, get_type_hints

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

Folder = NewType("Folder", str)
"""A plug-in's parameter that is a folder: its absolute path, "" for none. A recipe writes it relative to its own file.
What lies in the folder is part of what is measured: it is hashed by content."""

NO_FOLDER = Folder("")
"""The default of a folder that need not be there."""

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
    "quantize", "compile", "speculate", "prefix", "pack", "truncate", "shorten" or "" for none); `params` is its frozen
    dataclass, whose fields and defaults are its schema; `needs` are the modules it imports; `environment` is whose
    Python runs it; `reader` the engine that opens what a quantizer wrote; `format` the kind of weights that a transform
    writes or an engine opens; `weights` the file that a transform of another format than safetensors writes; `serves`
    whether an engine is a server, which can be put under load; `device` what it computes on where that is not any
    machine ("cuda"); `speculates` what an engine can look up to propose tokens, () for one that proposes none:
    "prompts" one by one and their answers, "batches" of prompts together, n-grams down to a "shortest" one, the
    "answers" of other prompts, and "draft" where a model may propose them; `reuses` whether an engine can start a
    prompt from what earlier ones have left; `pads` whether an engine pads the prompts of a batch to the longest, and
    takes batches of any size alike.
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
    speculates: tuple[str, ...] = ()
    reuses: bool = False
    pads: bool = False

    @property
    def folders(self) -> tuple[str, ...]:
        """Its parameters that are folders."""
        return tuple(name for name, kind in get_type_hints(self.params).items() if kind is Folder)


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
    """A named chain of transforms (`steps`, in order), run on an engine; `policies` change its requests, or how it
    answers them."""

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
    """Timed requests: prompts, and how they are asked."""

    name: str
    prompts: str
    """The file of prompts (JSONL, JSON, CSV, TSV)."""
    new_tokens: int = 64
    """Tokens of each timed answer; the most of them where lengths are natural."""
    batch: int = 1
    """Prompts that are asked together. Under load a server makes the batches."""
    slice: str = ""
    """Only the prompts that carry this tag; all of them where none is named."""
    lengths: str = "fixed"
    """fixed: new_tokens are always generated in full, so that they are the same for all. natural: answers stop by
    themselves, new_tokens at the latest."""
    users: int = 0
    """Under load: so many users in a closed loop, each of whom asks again when answered."""
    rate: float = 0.0
    """Under load: so many requests a second, at random times (Poisson), answered or not."""
    requests: int = 32
    """Under load: requests in a turn."""

    @property
    def loaded(self) -> bool:
        """Whether it is a load on a server, by `users` or at a `rate`."""
        return bool(self.users or self.rate)


@dataclass(frozen=True)
class Invariants:
    """What every answer must keep, whoever gives it. "" and () are not asked for."""

    regex: str = ""
    """A regular expression that matches the whole answer."""
    labels: tuple[str, ...] = ()
    """The answer is one of these."""
    numbers: str = ""
    """kept: every number of the expected answer is in the answer."""
    language: str = ""
    """kept: the answer is in the language of the expected answer, or of the prompt where none is expected. Or the code
    of one language, such as de."""
    refusal: str = ""
    """kept: rows tagged as slice "refusal" are refused, and no others. Or a regular expression that tells a refusal."""


NO_INVARIANTS = Invariants()


@dataclass(frozen=True)
class Quality:
    """Answers that are checked: prompts with `expected`, decoded until they stop by themselves."""

    prompts: str
    """The file of prompts and their right answers (JSONL, JSON, CSV, TSV)."""
    schema: str | None = None
    """A file: the JSON Schema of a valid answer."""
    new_tokens: int = 256
    """The most tokens of an answer."""
    batch: int = 16
    """Prompts that are answered together."""
    rows: int = 0
    """The most prompts to ask, those tagged critical first and long ones last; 0 is all."""
    slice: str = ""
    """Only the prompts that carry this tag; all of them where none is named."""
    invariants: Invariants = NO_INVARIANTS
    """What every answer must keep."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness that are asked beside the prompts: names, or paths of YAML files."""
    task_rows: int = 0
    """The most rows of each task; 0 is all."""

    @property
    def tells_valid(self) -> bool:
        """Whether anything says which answers are valid: a schema, a regular expression or labels."""
        return bool(self.schema or self.invariants.regex or self.invariants.labels)


def task_name(given: str) -> str:
    """What a task is called in metrics: a name of lm-evaluation-harness's, or that of a task file without its end."""
    return Path(given).stem if given.endswith(YAML) else given


@dataclass(frozen=True)
class Measure:
    """How hard to measure. A turn is some requests of one variant, of which the first are discarded."""

    requests: int = 3
    """Timed requests in a turn."""
    warmup: int = 1
    """Discarded requests before them."""
    relaunch: int = 2
    """Blocks between fresh processes."""
    max_blocks: int = 60
    """The last look that the race may reach: 10, 16, 24, 40 or 60; or more than 60 for an open-ended race."""
    clock: str = "wall"
    """The clock that judges: wall, cpu, or auto."""
    threads: int = 0
    """Threads of each measured process; 0 is all cores."""
    deadline_s: float = 900.0
    """The most time of one job of a worker process: 600 s, 10 min."""
    min_blocks: int = 0
    """Blocks that a variant which nothing rejects gets on the minimized workload even where it is decided, for who
    compares runs."""
    race: str = "all"
    """What is raced: all variants until each is decided, or the winner: a variant that is shown to be slower than an
    accepted one is left open."""


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
    price_per_hour: str = ""
    """What the machine costs an hour, "2.10 USD"; "" where nobody said."""

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
    """An estimate and its bounds (two-sided). In JSON an unknown number is null: a bound that is null is infinite."""

    estimate: float
    """The best single value."""
    low: float
    """The lower bound."""
    high: float
    """The upper bound."""
    n: int
    """From how many samples."""
    level: float = 0.95
    """The level at which the bounds hold."""


@dataclass(frozen=True)
class Verdict:
    """What one named rule says of one variant: the figure, its interval, its n, the clock, and why."""

    rule: str
    """"merge.gain", "int8.critical_errors", "require: latency.p95@chat <= 400 ms", "artifact.intact", …"""
    outcome: Outcome
    """What the rule says: accepted, rejected, inconclusive, or not judged."""
    reason: str
    """Why, in one sentence for a person."""
    against: str = ""
    """The variant that it was compared with."""
    value: Interval | None = None
    """What was measured, in `unit`."""
    unit: str = ""
    """The unit of the value and of the limit."""
    limit: float | None = None
    """What the value is held against, in its unit."""
    clock: str = ""
    """The clock that judged, of a rule on times: "wall" or "cpu"."""
    blocks_needed: int | None = None
    """Of a race that is inconclusive: how many blocks it needs in all."""
    workload: str = ""
    """Of a race: its workload."""
    minutes_needed: float | None = None
    """About how many more minutes those blocks take; null where that is not known."""
    hopeless: bool = False
    """Whether the blocks that the race may have can hardly decide it."""
    protects: str = ""
    """What the rule keeps from being shipped, in a few words."""


@dataclass(frozen=True)
class VariantDecision:
    """A variant's outcome, the verdicts behind it, and the figures for the table."""

    name: str
    techniques: tuple[str, ...]
    """What it is made of, in the words of the trade-off table."""
    outcome: Outcome
    decided_by: str
    """The rule that decided the outcome."""
    verdicts: tuple[Verdict, ...]
    figures: Mapping[str, Interval]
    """A metric's name ("latency.p50@chat", "accuracy", …) -> its value; docs/metrics.md has all of them."""
    notes: tuple[str, ...] = ()
    """How it was measured, where a reader may ask; no warnings."""
    certificates: tuple[str, ...] = ()
    """What the artifacts that it is made of were checked for, in a line each."""
    remarks: tuple[str, ...] = ()
    """What was found beside the verdicts."""
    speed: Interval | None = None
    """The ratio of times to the baseline's on what is minimized, with the interval and level by which it is judged; of
    the baseline its second copy's. null where no times are minimized, and in a decision of an older peftopt."""


@dataclass(frozen=True)
class Decision:
    """The machine-readable outcome; every report is rendered from it."""

    recipe: str
    """The recipe's name."""
    baseline: str
    """The variant that the others are compared with."""
    minimize: str
    """The metric by which accepted variants are ranked."""
    clock: str
    """The clock that judged: "wall" or "cpu"."""
    chosen: str | None
    """The variant to ship; null for none."""
    outcome: Outcome
    sentence: str
    """The decision in one sentence for a person."""
    variants: tuple[VariantDecision, ...]
    warnings: tuple[str, ...] = ()
    """What a reader should fear before acting on it."""
    machine: Mapping[str, Json] = field(default_factory=dict)
    """What the machine is that measured, as `peftopt doctor --json` says it."""
    format: int = FORMAT
    """The version of the file's form."""
    clock_reason: str = ""
    """Why this clock judged."""
    notes: tuple[str, ...] = ()
    """What is worth knowing and is no warning."""
    next_step: str = ""
    """Where nothing is decided the command that gets nearest to a decision, after what to change before it."""
