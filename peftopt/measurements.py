"""What each probe measures, one record a probe: the border at which measurements.jsonl becomes typed.

A line of the file is a `records.Measurement`, whose values are JSON. `measured` makes a `Measured` of it, whose values
are one of the records here. Decisions and reports read these and no JSON. A field that an older peftopt did not write,
or that not every machine tells, has a default; a key that no record has is left in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache, partial
from operator import eq
from types import NoneType
from typing import TYPE_CHECKING, TypeVar, get_args, get_origin

from peftopt.errors import BROKEN, BadInput
from peftopt.records import Measurement

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from cattrs import Converter

Plain = TypeVar("Plain", int, float, str)
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Probe "machine": how fast memory is read here, in bytes per second; once per run."""

    read_bytes_per_s: float | None = None
    gpu_read_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Probe "build": one artifact; that with the id "" is the base with the adapter."""

    id: str
    size_bytes: int
    """All its files on disk."""
    tier0: tuple[str, ...]
    """What is wrong with its files, () for nothing."""
    plugin: str = ""
    seconds: float | None = None
    """What building it took when it was built."""
    cached: bool = False
    """Whether it was there already."""
    peak_memory_bytes: int | None = None
    content: str | None = None
    """The hash of its files."""
    certificate: str = ""
    """A merge's parity certificate, in a line."""
    quantization: str = ""
    """How it was quantized, in a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Probe "launch": a model was loaded into a fresh worker process."""

    model_loading_time: float
    """Seconds from nothing to a model that can answer."""
    adapter_switch_time: float | None = None
    """Seconds from one adapter to another; on vLLM a load and an unload while it runs."""
    threads: int | None = None
    device: str = ""
    """What computes: "cpu", "cuda"."""
    pid: int | None = None
    weight_bytes: int | None = None
    """Bytes of weights that a decode step reads."""
    kv_bytes: int = 0
    """Bytes that a decode step reads for each token in the cache; 0 where it is not known."""
    virtual_tokens: int | None = None
    """How many the adapter puts before every prompt; None for an adapter of weights, and for none."""
    prompt_kv_bytes: int | None = None
    """What their keys and values take of each sequence's cache; None where that is not known."""
    baked: bool = False
    """Whether they were computed beforehand, and are not by each request."""
    gpu_memory_allocated: int | None = None
    gpu_memory_reserved: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a turn. Times in milliseconds since it was submitted, or under load since it was due."""

    request_duration_ms: float | None
    """The whole request. None, and any time that is not finite and positive, makes the turn useless."""
    new_tokens: int
    """Tokens of its answers."""
    warmup: bool
    """Whether it is discarded."""
    ttft_ms: float | None = None
    """Until the first token; None for a server that does not stream."""
    tpot_ms: float | None = None
    """Mean gap between tokens after the first; None where there is one token."""
    queue_time_ms: float | None = None
    """What the sender itself added before it was sent."""
    generation_latency_ms: float | None = None
    """From sent to done."""
    cpu_ms: float | None = None
    """CPU time of the process and of those that serve the model; under load a request's part of the turn's."""
    gpu_ms: float | None = None
    """Between two CUDA events around the generation."""
    turn_ms: float | None = None
    """Under load, from the first request due to the last done; the same in each request of a turn."""
    batch: int = 1
    """Prompts that are answered together."""
    prompt_tokens: int | None = None
    """Tokens of its prompts."""
    touched: int = 0
    """Prompts that a policy changed."""
    steps: int | None = None
    """Where tokens are proposed, the steps after the prompts, summed over the answers; None where that is not told."""
    proposed: int | None = None
    """Tokens that were proposed in them; 0 where the engine does not count them."""
    accepted: int | None = None
    """Tokens that they gave beyond one each."""
    reused: int | None = None
    """Tokens of its prompts whose keys and values earlier requests had left; None where that is not told."""
    error: str = ""
    """Why it failed, "" for a request that was answered."""
    id: str = ""
    """The prompt's, under load."""
    model: str = ""
    """The served name that was asked, under load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent(Request):
    """One request of a load that was run apart. Times in seconds since the run began."""

    scheduled: float
    """When it was due, since the run began; so are the next four."""
    done: float
    """When its last token came, or its failure."""
    sent: float | None = None
    """When it was sent."""
    first: float | None = None
    """When its first token came."""
    last: float | None = None
    """When its last token came."""
    gaps_ms: tuple[float, ...] = ()
    """Between messages of the stream."""
    kind: str | None = None
    """Of an error its kind, as the log of `peftopt serve` has it ("refused", "oom", …); None where that is not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauge:
    """What a server's gauge showed over a turn, read `n` times."""

    mean: float
    """Its mean."""
    peak: float | None = None
    """Its highest."""
    n: int | None = None
    """How often it was read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a server says of a turn itself; what it does not tell is None."""

    running: Gauge | None = None
    """Requests in the running batch."""
    waiting: Gauge | None = None
    """Requests in the queue."""
    kv_cache: Gauge | None = None
    """The share of the key-value cache that is taken, 0 to 1."""
    queue_ms: float | None = None
    """Mean time of a request in the server's queue."""
    busy: float | None = None
    """Mean number of requests in a decode step."""
    slots: int | None = None
    """Requests that it can answer together."""
    proposed: float | None = None
    """Tokens that it proposed to itself."""
    accepted: float | None = None
    """Those of them that went into answers."""

    @property
    def acceptance(self) -> float | None:
        """The share of the proposed tokens that went into answers; None where none were proposed, or it is not told."""
        return self.accepted / self.proposed if self.proposed and self.accepted is not None else None

    @property
    def batch(self) -> float | None:
        """Mean number of requests in the running batch."""
        return self.running.mean if self.running else None

    @property
    def kv_cache_taken(self) -> float | None:
        """The mean share of the key-value cache that is taken."""
        return self.kv_cache.mean if self.kv_cache else None

    @property
    def fill(self) -> float | None:
        """The share of its slots that a batch takes; None where it is not known."""
        batch = self.running.mean if self.busy is None and self.running else self.busy
        return batch / self.slots if self.slots and batch is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What else went on during a turn, see `machine.disturbance`; what is not told here is None."""

    seconds: float | None = None
    """How long the turn took, warm-up included."""
    load: float | None = None
    """The load average at its end."""
    cores: int = 0
    """Processors that the process may use."""
    foreign_cores: float | None = None
    """Processors that other processes kept busy."""
    steal: float | None = None
    """The share of the CPU time that the host took."""
    throttled: float | None = None
    """The share of the CPU time that a quota withheld."""
    heat_events: float | None = None
    """Times that a processor slowed down for heat."""
    mhz: float | None = None
    """The processors' mean clock rate."""
    temperature_c: float | None = None
    """The hottest sensor of the processors."""
    gpu_foreign: int | None = None
    """Processes of others on the GPU."""
    gpu_slowed: bool | None = None
    """Whether the GPU slowed down for heat or power."""
    gpu_temperature_c: float | None = None
    """The GPU's temperature."""
    openmp: Mapping[str, str] = field(default_factory=dict)
    """Environment variables by which threads wait for each other."""


NO_ACCOUNT = Account()
"""A server that says nothing."""
UNDISTURBED = Disturbance()


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Probe "speed": one variant's requests in a block, the warm-up first."""

    block: int
    requests: tuple[Request, ...]
    order: int | None = None
    """The variant's place in the block, from 0."""
    engine: Account = NO_ACCOUNT
    machine: Disturbance = UNDISTURBED


SERVED = "peftopt serve"
"""The source of a load that users were: the log of a gateway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Probe "load": a load that was run apart, by `peftopt load` or another tool. With a workload it is the variant's
    next block of it."""

    source: str = ""
    title: str = ""
    version: str = ""
    """Of an adapter behind a gateway: which weights answered."""
    arm: str = ""
    """The same: "live", "canary", …"""
    started: str = ""
    """When it began (ISO 8601, UTC), "" where that is not told."""
    requests: tuple[Sent, ...] = ()
    engine: Account = NO_ACCOUNT
    stopped: str = ""
    """Why it ended before its plan did, "" where it did not."""
    unsent: int = 0
    """Requests that were planned and not sent."""
    notes: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    """What the other tool does not tell, in words."""
    slo: tuple[str, ...] = ()
    """The service levels that were asked for, as they were written."""
    highest_rate: float | None = None
    """Requests a second at which they held, found by a search; None where none was searched, or none held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Probe "quality": the answer to one prompt, judged, and how likely the expected answer is. See probes/quality.py.

    What needs scores is None for an engine that only generates; what needs a reference is None for the reference.
    """

    row: str
    """The prompt's id."""
    tokens: tuple[int, ...]
    """Ids of the answer, without the end of sequence that closed it."""
    new_tokens: int
    """How many, the end of sequence included."""
    stopped: bool
    """Whether it ended by itself."""
    correct: bool
    """Whether it is the expected answer."""
    valid: bool
    """Whether it keeps schema, regex and labels."""
    score: float
    """0 to 1; the share of right fields of a JSON object."""
    critical: bool
    """Whether the prompt is tagged critical: one that only the variant gets wrong is a critical error."""
    flags: tuple[str, ...]
    """Tier 1 errors: "empty", "loop", "invalid output", …"""
    slices: tuple[str, ...] = ()
    """The prompt's tags."""
    prompt: str = ""
    """What tells equal prompts of several rows, "" where that is not told."""
    output: str = ""
    """The answer's text."""
    expected: str = ""
    """The right answer, "" where none is known."""
    nll: float | None = None
    """Negative log-likelihood of the scored answer, summed over its tokens, in nats."""
    scored_tokens: int = 0
    """Tokens of the scored answer."""
    kl: float | None = None
    """KL divergence from the reference, summed over the scored tokens, in nats."""
    kl_worst: float | None = None
    """Its highest at one token."""
    kl_tokens: tuple[float, ...] = ()
    """It at each scored token, to three digits."""
    agree: int | None = None
    """Scored tokens at which the most likely one is the reference's."""
    parting: tuple[int, float] | None = None
    """The first scored token at which it is not, and by how many nats the reference prefers its own there."""
    noise: tuple[float, ...] = ()
    """For each scored token, by how many nats the reference's preference for its first choice changes here."""
    kept: float | None = None
    """The variant's shift from the base along the adapter's: the sum of their products over the scored tokens."""
    shift: float | None = None
    """The adapter's own shift: the sum of its squares."""
    uncut_tokens: int | None = None
    """Tokens of the prompt before a policy cut it; None where none did."""
    steps: int | None = None
    """Where tokens are proposed, the steps after the prompt; None where that is not told."""
    proposed: int | None = None
    """Tokens that were proposed in them; 0 where the engine does not count them."""
    accepted: int | None = None
    """Tokens that they gave beyond one each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Probe "memory": peaks in bytes, at the end of a worker's life; of a server elsewhere nothing is known."""

    peak_memory_bytes: int | None = None
    gpu_memory_allocated: int | None = None
    gpu_memory_reserved: int | None = None

    @property
    def idle(self) -> float | None:
        """The share of the reserved GPU memory that was not handed out; a server's driver tells only the first."""
        if self.gpu_memory_allocated is None or not self.gpu_memory_reserved:
            return None
        return 1 - self.gpu_memory_allocated / self.gpu_memory_reserved


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A GPU kernel and its share of all GPU time."""

    name: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """Probe "engine": what an engine says of getting ready, at the end of a worker's life; counts are per process."""

    why: str = ""
    log: tuple[str, ...] = ()
    """Sentences for a person."""
    compile_time: float | None = None
    """Seconds, with an empty compile cache."""
    warm_start: float | None = None
    """Seconds, with a filled one."""
    graphs: int | None = None
    graph_breaks: int | None = None
    recompiles: int | None = None
    uncompiled: int | None = None
    """Requests that no graph fitted."""
    eager_prompts: int | None = None
    """Requests whose prompt no graph fitted."""
    prefix_bytes: int | None = None
    """Memory of the keys and values that it keeps for prompts to come, at the end."""
    gpu_busy: float | None = None
    """The share of a request in which kernels ran on the GPU."""
    kernels: tuple[Kernel, ...] = ()


NO_FACTS = EngineFacts()
"""An engine that says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A row of a task and its score."""

    id: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Probe "task": scores of lm-evaluation-harness, run here or imported."""

    task: str = ""
    """"" where an imported file does not tell."""
    source: str = ""
    title: str = ""
    metric: str = ""
    filter: str = ""
    value: float | None = None
    """The mean score."""
    stderr: float | None = None
    n: int | None = None
    set_aside: int = 0
    """Rows without a score."""
    samples: tuple[Sample, ...] | None = None
    """None where only the mean is told."""
    lacks: tuple[str, ...] = ()


SKIPPED = "skipped"
"""The reason of a variant that was not tried: this machine lacks what it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Probe "failure": a variant could not be built, launched or measured."""

    stage: str
    reason: str
    """In a few words: "out of memory", "missing library", …; "skipped" where it was not tried."""
    detail: str
    hint: str = ""

    @property
    def sentence(self) -> str:
        """What happened, and what to do."""
        what = SKIPPED if self.reason == SKIPPED else f"{self.stage} failed, {self.reason}"
        return f"{what}: {self.detail}" + (f"; {self.hint}" if self.hint else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Probe "retry": what failed of the variant is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class More:
    """Probe "more": blocks that were granted to the races of a run after its recipe."""

    max_blocks: int
    race: str = ""
    """"all" where they are for the variants that a race for the winner left open; "" for the races that go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Probe "forecast": what was expected of a variant before anything was built or measured; see decision/forecast.py.
    A ratio of times, above 1 for slower."""

    kind: str
    """"speed" against another variant, "eager" against the matrix products alone, "rank" against the adapter's own
    rank, "shapes" of requests under compile."""
    against: str = ""
    """The variant that it is compared with, "" for none."""
    ratio: float | None = None
    low: float | None = None
    """Of its 95 % interval."""
    high: float | None = None
    warns: bool = False
    """Whether it is sure enough, and bad enough, to be said before the run."""
    reason: str = ""
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one request took: its prompt, and each further token, in milliseconds."""

    prompt_ms: float
    step_ms: float

    def request_ms(self, new_tokens: int) -> float:
        """The whole request."""
        return self.prompt_ms + (new_tokens - 1) * self.step_ms


Values = (
    Survey | Built | Launch | Turn | Load | Answer | Memory | EngineFacts | Task | Failure | Retry | More | Forecast
)

PROBES: Mapping[str, type[Values]] = {
    "machine": Survey,
    "build": Built,
    "launch": Launch,
    "speed": Turn,
    "load": Load,
    "quality": Answer,
    "memory": Memory,
    "engine": EngineFacts,
    "task": Task,
    "failure": Failure,
    "retry": Retry,
    "more": More,
    "forecast": Forecast,
}
"""A probe's name in measurements.jsonl -> the record of its values."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement: whose, of which workload ("" for none), in which of the baseline's two runs, and the values.
    `at`: when its line was written, in seconds since 1970; None where that is not told."""

    values: Values
    variant: str = ""
    workload: str = ""
    launch: int = 0
    at: float | None = None

    @property
    def probe(self) -> str:
        """The name of its probe in the file."""
        return next(name for name, record in PROBES.items() if isinstance(self.values, record))


def measured(line: Measurement, where: str = "") -> Measured:
    """The measurement that a line holds. Raises BadInput that names the line (`where`, such as "run.jsonl:12") and the
    field, for a probe that is not known, a field that is missing, and a value of another kind than its field."""
    _check_names(line, where)
    if line.probe not in PROBES:
        hint = f"this peftopt knows {', '.join(PROBES)}; a newer one may know more"
        raise BadInput(f"{_at(where)}no probe is named {line.probe!r}", hint)
    return Measured(_structured(line, where), line.variant, line.workload, line.launch, _moment(line.at))


def _moment(text: object) -> float | None:
    """Seconds since 1970 of a time in ISO 8601, UTC where it has no zone; None for anything else."""
    try:
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _check_names(line: Measurement, where: str) -> None:
    for field_, value, kind in (
        ("probe", line.probe, str),
        ("variant", line.variant, str),
        ("workload", line.workload, str),
        ("launch", line.launch, int),
    ):
        if not isinstance(value, kind):
            raise BadInput(f"{_at(where)}{field_} is not {_KINDS[kind]}", _hint(where))


def _hint(where: str) -> str:
    values = "peftopt/measurements.py says what the values of each probe are"
    return f"restore the file, or remove the line: {values}" if where else values


def _structured(line: Measurement, where: str) -> Values:
    if not isinstance(line.values, Mapping):
        raise BadInput(f"{_at(where)}values is not an object", _hint(where))
    try:
        return structured(PROBES[line.probe], line.values, line.probe)
    except BadInput as error:
        raise BadInput(f"{_at(where)}{error.message}", _hint(where)) from error


def structured(record: type[Record], values: object, name: str) -> Record:
    """The record that JSON holds. Raises BadInput for a field that is missing and for a value of another kind than its
    field: "speed.requests[3].new_tokens is missing", where `name` is "speed"."""
    from cattrs.errors import CattrsError

    try:
        return _converter(detailed=False).structure(values, record)
    except (CattrsError, *BROKEN) as error:
        raise BadInput(_first_problem(record, values, name)) from error


def _first_problem(record: type, values: object, name: str) -> str:
    """Found by the converter that keeps all problems, which is slower."""
    from cattrs import BaseValidationError, transform_error

    try:
        _converter(detailed=True).structure(values, record)
    except BaseValidationError as error:
        problem, _, field_ = transform_error(error, path=name, format_exception=_problem)[0].rpartition(" @ ")
        return f"{field_} {problem}"
    return f"{name} is not what it must be"


_KINDS: Mapping[object, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _problem(error: BaseException, kind: object) -> str:
    """What is wrong with one field. `kind` is its type, with or without None."""
    if isinstance(error, KeyError):
        return "is missing"
    (kind, *_) = [each for each in get_args(kind) if each is not NoneType] if NoneType in get_args(kind) else [kind]
    if get_origin(kind) is tuple:
        return "is not a list"
    if is_dataclass(kind):
        return "is not an object"
    return f"is not {_KINDS.get(kind, 'what this field holds')}"


@cache
def _converter(detailed: bool) -> Converter:
    """Builds records of JSON and changes no value: cattrs' own hooks would read "5" as 5 and 0.7 as 0."""
    from cattrs import Converter

    converter = Converter(detailed_validation=detailed)
    converter.register_structure_hook(int, lambda value, _: _whole(value))
    converter.register_structure_hook(float, lambda value, _: _number(value))
    converter.register_structure_hook(str, lambda value, _: _text(value))
    converter.register_structure_hook(bool, lambda value, _: _truth(value))
    converter.register_structure_hook_func(partial(eq, tuple[int, ...]), lambda many, _: _each(int, _whole, many))
    converter.register_structure_hook_func(partial(eq, tuple[float, ...]), lambda many, _: _each(float, _number, many))
    converter.register_structure_hook_func(partial(eq, tuple[str, ...]), lambda many, _: _each(str, _text, many))
    return converter


LARGEST = 2**63
"""No whole number of a measurement is larger; Python's would be, and no float holds it."""


def _whole(value: object) -> int:
    """A count, 16.0 as well: other tools count in such."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
        raise TypeError(value)
    return value


def _number(value: object) -> float:
    """A number as it is, NaN and infinity as well: what they mean is for a rule to say."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise TypeError(value)
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _each(kind: type[Plain], one: Callable[[object], Plain], values: object) -> tuple[Plain, ...]:
    """A list of plain values. Answers hold hundreds of tokens, so those that are all right are not looked at singly."""
    if not isinstance(values, list | tuple):
        raise TypeError(values)
    if all(type(value) is kind for value in values):
        return tuple(values)
    return tuple(one(value) for value in values)


@dataclass(frozen=True, kw_only=True)
class Caching:
    """What the open model's KV cache saves and holds, and what of a token's time the adapter's matrices take."""

    kept_ms: tuple[float, ...]
    """A token with the cache, round by round."""
    anew_ms: tuple[float, ...]
    """The same token with all before it computed anew."""
    kv_bytes: int
    """Keys and values of one token in all layers, as the cache holds them."""
    adapter_share: float | None = None
    """Of a token's time, by torch's profiler; None without a LoRA."""


# ---- records to JSON ---------------------------------------------------------------------------


def as_json(record: DataclassInstance) -> dict[str, object]:
    """A record as a file or a line holds it, which `structured` reads again. A field that has no value (None), and need
    not have one, is left out."""
    values = {each.name: getattr(record, each.name) for each in fields(record)}
    optional = {each.name for each in fields(record) if _is_optional(each)}
    return {name: _plain(value) for name, value in values.items() if value is not None or name not in optional}


def _is_optional(each: Field[object]) -> bool:
    return each.default is None


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
