"""What a worker process is asked, and what it answers: for each job a request record, and the record of its reply.

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
    """One thing to do for a worker, which answers with a `Reply`."""

    @classmethod
    def name(cls) -> str:
        """What it is called in a line: the worker's method of that name does it."""
        return cls.__name__.removesuffix("Job").lower()

    @classmethod
    def reply(cls) -> type[Reply]:
        """The record that the worker answers with."""
        (base,) = vars(cls)["__orig_bases__"]
        (kind,) = get_args(base)
        return typing.cast(type[Reply], kind)


@dataclass(frozen=True)
class Done:
    """The reply of a job that has nothing to tell."""


@dataclass(frozen=True)
class Failed:
    """What takes a reply's place: `reason` is a few words of the report ("out of memory"), `detail` the error's own."""

    reason: str
    detail: str = ""
    hint: str = ""


# ---- transforms --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Transformed(Memory):
    """A model that was written, what it took, and what was found in it; peaks in bytes."""

    model: Model
    """What was written, and the adapters that are kept apart."""
    seconds: float
    """Wall clock, of the transform alone."""
    cpu_seconds: float
    """CPU time of the worker."""
    tier0: tuple[str, ...]
    """What is wrong with its files, () for nothing."""
    certificate: Mapping[str, Json] | None = None
    """A merge's parity.json."""
    quantization: Mapping[str, Json] | None = None
    """A quantizer's quantization.json."""


@dataclass(frozen=True, kw_only=True)
class TransformJob(Job[Transformed]):
    """Run one transform on a model, write the result, and scan what was written."""

    plugin: str
    params: Mapping[str, Json]
    """The plug-in's own; those that are not given have their defaults."""
    model: Model
    out: str
    """The folder to write, which does not exist yet."""
    rows: tuple[Row, ...] = ()
    """To calibrate with, or for a merge to compare on."""
    seed: int = 0
    calibration: str = "task"
    """Where the rows came from: "task", or "generic" for ours."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a transform would change of a tensor."""

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
    """What a transform would change, tensor by tensor."""

    tensors: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True)
class PreviewJob(Job[Previewed]):
    """What a transform would change; nothing is written."""

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
    """Load a model into an engine, behind policies, which change requests in this order."""

    plugin: str
    model: Model
    params: Mapping[str, Json]
    policies: tuple[Step, ...] = ()
    rows: tuple[Row, ...] = ()
    """In whose right answers an engine that speculates looks up what to propose."""


@dataclass(frozen=True, kw_only=True)
class WarmJob(Job[Done]):
    """Have an engine that compiles do so for every shape that batches of so many of these rows can have; not `timed`:
    for one shape that holds them all."""

    rows: tuple[Row, ...]
    batch: int
    new_tokens: int
    timed: bool = True


@dataclass(frozen=True)
class Switched:
    """Another adapter answers."""

    adapter_switch_time: float
    """Seconds."""


@dataclass(frozen=True)
class SwitchJob(Job[Switched]):
    """Put another adapter, a folder, in the place of the one that is served."""

    adapter: str


@dataclass(frozen=True)
class FactsJob(Job[EngineFacts]):
    """What the engine says of its own getting ready; NO_FACTS where it says nothing."""


@dataclass(frozen=True)
class MemoryJob(Job[Memory]):
    """Peaks since the worker started; nothing of a server elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """Where the open server is, and prompts in the forms that it takes, by the id of their row."""

    target: Target
    prompts: Mapping[str, Prompt]
    new_tokens: int
    """What policies leave of those that were asked for."""
    slots: int
    """Requests that it works on together, 0 where that is not known."""


@dataclass(frozen=True, kw_only=True)
class ServedJob(Job[Served]):
    """Where the open server is, and these prompts as it takes them: for a load that is sent from elsewhere."""

    rows: tuple[Row, ...]
    new_tokens: int
    stop: bool
    """Whether answers end by themselves."""


# ---- probes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """The requests of a turn, in the order in which they were due, the warm-up first."""

    alone: tuple[Request, ...]
    """Those that were sent one after the other."""
    loaded: tuple[Sent, ...] = ()
    """Those that were sent under load."""
    engine: Account = NO_ACCOUNT
    """What the server says of the load."""

    @property
    def requests(self) -> tuple[Request, ...]:
        """All of them, whichever way they were sent."""
        return (*self.alone, *self.loaded)


@dataclass(frozen=True, kw_only=True)
class SpeedJob(Job[Timed]):
    """One turn of a block: each batch is a request. With `users` or a `rate` what follows the warm-up is sent under
    load, each row as a request of its own."""

    batches: tuple[tuple[Row, ...], ...]
    new_tokens: int
    warmup: int
    """Requests at the start that are discarded."""
    stop: bool = False
    """Whether answers end by themselves; otherwise they have `new_tokens` exactly."""
    users: int = 0
    """In a closed loop, each asking when answered."""
    rate: float = 0.0
    """Requests a second, at random times."""
    seed: int = 0
    """Draws those times."""


@dataclass(frozen=True)
class Answered:
    """How many rows were answered; each was told as an `Answer`."""

    rows: int


@dataclass(frozen=True, kw_only=True)
class QualityJob(Job[Answered]):
    """Answer rows, and tell each answer, judged: see probes/quality.py."""

    rows: tuple[Row, ...]
    new_tokens: int
    """The most that an answer may have."""
    batch: int
    schema: Mapping[str, Json] | None = None
    """The JSON schema that every answer must keep."""
    reference: str | None = None
    """The file of the reference's answers."""
    write_reference: str | None = None
    """Where to leave one's own as the reference."""
    invariants: Invariants = NO_INVARIANTS


@dataclass(frozen=True)
class Alive:
    """What is wrong with the answers of a model that was just written, "" for nothing."""

    problem: str


@dataclass(frozen=True)
class AliveJob(Job[Alive]):
    """Whether the open model answers at all: see probes/alive.py."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class CachingJob(Job[Caching]):
    """Look at the KV cache of the eager engine's model at a token that has so many before it: see probes/caching.py."""

    tokens: int
    rounds: int


@dataclass(frozen=True)
class TaskJob(Job[Task]):
    """One task of lm-evaluation-harness, by its name or its file: see probes/tasks.py."""

    task: str
    rows: int
    """The most rows to ask, 0 for all."""


@dataclass(frozen=True)
class BandwidthJob(Job[Survey]):
    """How fast this machine reads memory: see probes/bandwidth.py."""


@dataclass(frozen=True, kw_only=True)
class LayersJob(Job[Few]):
    """What variants take on the first layers of a model: see probes/layers.py."""

    model: Model
    variants: tuple[Variant, ...]
    asked: tuple[Asked, ...]
    folder: str
    """Where the cut models are written; the asker removes it."""
    seconds: float
    """Of a variant on a workload."""
    rows: tuple[Row, ...] = ()
    """To calibrate with."""
    rank: int = 0
    """An adapter padded to it is timed too, 0 for none."""
    seed: int = 0
    answers: tuple[Row, ...] = ()
    """The prompts whose answers will be checked."""


@dataclass(frozen=True)
class KernelsJob(Job[EngineFacts]):
    """Which kernels a batch runs on the GPU: see probes/kernels.py. NO_FACTS for an engine that computes elsewhere."""

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
    """A request as a line for a worker."""
    return json.dumps({"job": job.name(), **as_json(job)}) + "\n"


def from_line(line: str) -> Job[Json]:
    """The request in a line, as the parent wrote it."""
    values = json.loads(line)
    return built(JOBS[values.pop("job")], values)


def built(record: type[Record], values: Mapping[str, Json]) -> Record:
    """A record of JSON that is known to fit it. A key that the record has no field for is left out."""
    kinds = _kinds(typing.cast(Json, record))
    return record(**{name: _value(kinds[name], values[name]) for name in kinds if name in values})


@cache
def _kinds(record: Json) -> Mapping[str, Json]:
    hints = get_type_hints(record)
    return {each.name: hints[each.name] for each in fields(record)}


def _value(kind: Json, value: Json) -> Json:
    if isinstance(kind, type) and is_dataclass(kind):
        return built(kind, value)
    origin: Json = typing.get_origin(kind)
    if origin is tuple:
        (each, *_) = get_args(kind)
        return tuple(_value(each, one) for one in value)
    return value
