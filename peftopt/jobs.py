"""The jobs of a worker process: for each job, the record of its request and the record of its reply.

A request's class names its job (`SpeedJob` is "speed") and its reply (`Job[Timed]`). `as_line` writes a request, and
`from_line` reads it in the worker, without cattrs: a worker may run in another environment's Python. The parent reads a
reply with `measurements.structured`, which checks every field.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Generic, TypeVar, get_args, get_type_hints

from peftopt.corpus import Row
from peftopt.loadtest.protocols import Prompt, Target
from peftopt.measurements import (
    NO_ACCOUNT,
    Account,
    Caching,
    EngineFacts,
    Launch,
    Memory,
    Request,
    Sent,
    Survey,
    Task,
    as_json,
)
from peftopt.probes.layers import Asked, Few
from peftopt.records import NO_INVARIANTS, Invariants, Json, Model, Step, Variant

Reply = TypeVar("Reply")
Record = TypeVar("Record")


@dataclass(frozen=True)
class Job(Generic[Reply]):
    """A job for a worker, which replies with a `Reply`."""

    @classmethod
    def name(cls) -> str:
        """The job's name in a line. The worker's method of this name does the job."""
        return cls.__name__.removesuffix("Job").lower()

    @classmethod
    def reply(cls) -> type[Reply]:
        """The class of the worker's reply."""
        (base,) = vars(cls)["__orig_bases__"]
        (kind,) = get_args(base)
        return typing.cast(type[Reply], kind)


@dataclass(frozen=True)
class Done:
    """The reply of a job without a result."""


@dataclass(frozen=True)
class Failed:
    """The reply of a failed job. `reason`: a few words for the report ("out of memory"). `detail`: the error's text."""

    reason: str
    detail: str = ""
    hint: str = ""


# ---- transforms --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Transformed(Memory):
    """A written model, its time and memory (peaks in bytes), and the results of its checks."""

    model: Model
    """The written model, and the adapters that stay unmerged."""
    seconds: float
    """Wall-clock seconds of the transform alone."""
    cpu_seconds: float
    """CPU seconds of the worker."""
    tier0: tuple[str, ...]
    """Problems of its files, () for none."""
    certificate: Mapping[str, Json] | None = None
    """A merge's parity.json."""
    quantization: Mapping[str, Json] | None = None
    """A quantizer's quantization.json."""


@dataclass(frozen=True, kw_only=True)
class TransformJob(Job[Transformed]):
    """Run one transform on a model, write the result, and scan it."""

    plugin: str
    params: Mapping[str, Json]
    """The plug-in's parameters. Missing ones have their defaults."""
    model: Model
    out: str
    """The folder to write, which does not exist yet."""
    rows: tuple[Row, ...] = ()
    """Texts for calibration, or for a merge's comparison of predictions."""
    seed: int = 0
    calibration: str = "task"
    """The origin of the rows: "task" for the user's, "generic" for built-in ones."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of one tensor by a transform."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    delta_norm: float
    """Frobenius norm of the change, 0 for none."""
    weight_norm: float
    """Frobenius norm of the weight before."""


@dataclass(frozen=True)
class Previewed:
    """The changes by a transform, tensor by tensor."""

    tensors: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True)
class PreviewJob(Job[Previewed]):
    """Compute what a transform would change. Writes nothing."""

    plugin: str
    params: Mapping[str, Json]
    model: Model


# ---- engines -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrepareJob(Job[Done]):
    """Import what an engine needs, so that `model_loading_time` is the model's alone."""

    plugin: str
    model: Model


@dataclass(frozen=True, kw_only=True)
class OpenJob(Job[Launch]):
    """Load a model into an engine. Policies change its requests, in this order."""

    plugin: str
    model: Model
    params: Mapping[str, Json]
    policies: tuple[Step, ...] = ()
    rows: tuple[Row, ...] = ()
    """Rows whose right answers an engine may propose when it speculates."""


@dataclass(frozen=True, kw_only=True)
class WarmJob(Job[Done]):
    """Let an engine compile for every shape of batches of these rows. Without `timed`, only for one shape that fits
    all."""

    rows: tuple[Row, ...]
    batch: int
    new_tokens: int
    timed: bool = True


@dataclass(frozen=True)
class Switched:
    """The reply of SwitchJob: another adapter is served now."""

    adapter_switch_time: float
    """Seconds."""


@dataclass(frozen=True)
class SwitchJob(Job[Switched]):
    """Replace the served adapter by the adapter in a folder."""

    adapter: str


@dataclass(frozen=True)
class FactsJob(Job[EngineFacts]):
    """Ask for the engine's facts on its start: compiling, graphs, log. NO_FACTS if it has none."""


@dataclass(frozen=True)
class MemoryJob(Job[Memory]):
    """Ask for the memory peaks since the worker's start; empty for a server elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """The open server's address, and prompts in its format by row id."""

    target: Target
    prompts: Mapping[str, Prompt]
    new_tokens: int
    """Tokens of an answer, after policies."""
    slots: int
    """Requests that it runs at once, 0 if unknown."""


@dataclass(frozen=True, kw_only=True)
class ServedJob(Job[Served]):
    """Ask for the open server's address and these prompts in its format, for a load from another process."""

    rows: tuple[Row, ...]
    new_tokens: int
    stop: bool
    """Whether answers end by themselves."""


# ---- probes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """The requests of a turn in the order of sending, the warm-up first."""

    alone: tuple[Request, ...]
    """Requests that were sent one after the other."""
    loaded: tuple[Sent, ...] = ()
    """Requests that were sent under load."""
    engine: Account = NO_ACCOUNT
    """The server's own numbers on the load."""

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests of the turn."""
        return (*self.alone, *self.loaded)


@dataclass(frozen=True, kw_only=True)
class SpeedJob(Job[Timed]):
    """Measure one turn of a block. Each batch is a request. With `users` or a `rate`, the requests after the warm-up
    are sent under load, each row as a request of its own."""

    batches: tuple[tuple[Row, ...], ...]
    new_tokens: int
    warmup: int
    """Requests at the start that are discarded."""
    stop: bool = False
    """Whether answers end by themselves; otherwise they have `new_tokens` exactly."""
    users: int = 0
    """Users in a closed loop, who ask again when answered."""
    rate: float = 0.0
    """Requests a second, at random times."""
    seed: int = 0
    """The seed of those times."""


@dataclass(frozen=True)
class Answered:
    """The number of answered rows. Each was sent as an `Answer` before."""

    rows: int


@dataclass(frozen=True, kw_only=True)
class QualityJob(Job[Answered]):
    """Answer rows, and send each answer with its judgement: see probes/quality.py."""

    rows: tuple[Row, ...]
    new_tokens: int
    """Most tokens of an answer."""
    batch: int
    schema: Mapping[str, Json] | None = None
    """The JSON schema that every answer must match."""
    reference: str | None = None
    """The file of the reference's answers."""
    write_reference: str | None = None
    """The file to write this model's answers to, as the reference."""
    invariants: Invariants = NO_INVARIANTS


@dataclass(frozen=True)
class Alive:
    """The problem of a new model's answers, "" for none."""

    problem: str


@dataclass(frozen=True)
class AliveJob(Job[Alive]):
    """Check that the open model answers at all: see probes/alive.py."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class CachingJob(Job[Caching]):
    """Measure the KV cache of the eager engine's model after `tokens` tokens: see probes/caching.py."""

    tokens: int
    rounds: int


@dataclass(frozen=True)
class TaskJob(Job[Task]):
    """Run one task of lm-evaluation-harness, by its name or its file: see probes/tasks.py."""

    task: str
    rows: int
    """Most rows to ask, 0 for all."""


@dataclass(frozen=True)
class BandwidthJob(Job[Survey]):
    """Measure how fast this machine reads memory: see probes/bandwidth.py."""


@dataclass(frozen=True, kw_only=True)
class LayersJob(Job[Few]):
    """Time variants on the first layers of a model: see probes/layers.py."""

    model: Model
    variants: tuple[Variant, ...]
    asked: tuple[Asked, ...]
    folder: str
    """The folder for the cut models. The parent removes it."""
    seconds: float
    """Seconds for a variant on a workload."""
    rows: tuple[Row, ...] = ()
    """Calibration rows."""
    rank: int = 0
    """The rank of a padded adapter to time too, 0 for none."""
    seed: int = 0
    answers: tuple[Row, ...] = ()
    """The prompts whose answers will be checked."""


@dataclass(frozen=True)
class KernelsJob(Job[EngineFacts]):
    """List the kernels that a batch runs on the GPU: see probes/kernels.py. NO_FACTS for an engine elsewhere."""

    batch: tuple[Row, ...]
    new_tokens: int


JOBS: Mapping[str, type[Job[Json]]] = {
    job.name(): job
    for job in (
        TransformJob,
        PreviewJob,
        PrepareJob,
        OpenJob,
        WarmJob,
        SwitchJob,
        FactsJob,
        MemoryJob,
        ServedJob,
        SpeedJob,
        QualityJob,
        AliveJob,
        CachingJob,
        TaskJob,
        BandwidthJob,
        LayersJob,
        KernelsJob,
    )
}
"""A job's name in a line -> the record of its request."""


# ---- the border --------------------------------------------------------------------------------


def as_line(job: Job[Reply]) -> str:
    """A job as a line for a worker."""
    return json.dumps({"job": job.name(), **as_json(job)}) + "\n"


def from_line(line: str) -> Job[Json]:
    """The job in a line of the parent."""
    values = json.loads(line)
    return built(JOBS[values.pop("job")], values)


def built(record: type[Record], values: Mapping[str, Json]) -> Record:
    """A record from JSON that is known to fit it. Keys without a field are left out."""
    kinds = _kinds(typing.cast(Json, record))
    return record(**{name: _value(kinds[name], values[name]) for name in kinds if name in values})


@cache
def _kinds(record: Json) -> Mapping[str, Json]:
    hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in fields(record)}


def _value(kind: Json, value: Json) -> Json:
    if isinstance(kind, type) and is_dataclass(kind):
        return built(kind, value)
    origin: Json = typing.get_origin(kind)
    if origin is tuple:
        (each, *_) = get_args(kind)
        return tuple(_value(each, one) for one in value)
    return value
