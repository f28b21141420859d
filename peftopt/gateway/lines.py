"""One JSON line for each request: where its time went, which weights answered, and how it ended.

`peftopt import` turns these lines into records of `peftopt load`, and `load --trace` replays them. They have no text of
users, unless the operator asks for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from peftopt.errors import unwritable
from peftopt.gateway.sampling import NO_SAMPLE, Sample
from peftopt.loadtest.arrivals import SERVE_LOG
from peftopt.loadtest.moments import utc
from peftopt.records import Json
from peftopt.redaction import redacted

FORMAT = 1
ROTATE_BYTES = 256 * 2**20
"""A log is set aside under another name when it is this long."""


@dataclass(frozen=True)
class Origin:
    """The origin of a model from a finished run: the run's name, the variant, and the SHA-256 of its decision.json."""

    run: str = ""
    variant: str = ""
    decision: str = ""

    def __str__(self) -> str:
        """In words, with as much of the hash as tells two decisions apart."""
        return f"the variant {self.variant} of {self.run}, decision {self.decision[:12]}"

    def as_json(self) -> dict[str, Json]:
        """Fields of a line of the log, and of a model in /v1/models."""
        return {"run": self.run, "variant": self.variant, "decision": self.decision}


NO_ORIGIN = Origin()


class Written(Protocol):
    """The content of a line of the log: a request's account, or the result of a check."""

    def as_json(self) -> dict[str, Json]:
        """The line."""


@dataclass
class Line:
    """A request's account. Times in seconds on one clock (perf_counter), nan or None for an event that did not happen.

    `arrived` at the gateway, `sent` to the engine, `first` and `last` byte of text, `done`; `gaps_ms` between pieces of
    the answer. `sources` names the source of each number that can come from several: "engine", the engine itself;
    "gateway", measured from outside; "derived", computed from other numbers.
    """

    request_id: str
    arrived: float
    at: float
    """When it arrived, in seconds since 1970."""
    adapter: str = ""
    version: str = ""
    arm: str = ""
    certified: bool | None = None
    """Whether the version had to answer as itself before it was served; None for a request that had none."""
    key: str = ""
    trace_id: str = ""
    waited: float | None = None
    """Seconds that it waited here to go on; None for one that did not come so far."""
    sent: float | None = None
    first: float | None = None
    last: float | None = None
    done: float | None = None
    gaps_ms: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    new_tokens: int = 0
    finish: str = ""
    status: int = 0
    error: str = ""
    kind: str = ""
    """Of an error: "refused", "oom", "timeout_connect", "timeout_first", "timeout_gap", "timeout", "engine_dead",
    "upstream", "cancelled", "request", "gateway" (a fault of its own)."""
    running_at_start: int = 0
    waiting_at_start: int = 0
    batch_fill: float | None = None
    """The share of what may run that did, when it went on: of the limit, or of what the engine runs at most; None where
    neither is known."""
    engine: Mapping[str, Json] = field(default_factory=dict)
    """What the engine says of the request: see frames.Ended."""
    sampled: Sample | None = None
    """The nearest sample of the engine's memory."""
    model_loading_time: float | None = None
    adapter_switch_time: float | None = None
    sources: dict[str, str] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    """The prompt and the answer, where the log was asked to keep them."""
    origin: Origin = NO_ORIGIN
    """Of a model that a run decided to serve."""

    @property
    def queue_gateway_ms(self) -> float:
        """Its wait in the gateway, until it was admitted or refused."""
        return 1e3 * (self.waited or 0.0)

    @property
    def queue_engine_ms(self) -> float | None:
        """Its wait in the engine, if the engine reports it."""
        told = self.engine.get("queue_time_ms")
        return float(told) if isinstance(told, int | float) else None

    @property
    def request_duration_ms(self) -> float:
        """From its arrival to its last byte."""
        return 1e3 * ((self.done if self.done is not None else self.arrived) - self.arrived)

    @property
    def generation_latency_ms(self) -> float | None:
        """The engine's time for it: as the engine reports it, or from sending to the end."""
        waited, decoded = self.engine.get("time_to_first_token_ms"), self.engine.get("generation_time_ms")
        if isinstance(waited, int | float) and isinstance(decoded, int | float):
            return float(waited) + float(decoded)
        if self.sent is None or self.done is None:
            return None
        return 1e3 * (self.done - self.sent)

    @property
    def ttft_ms(self) -> float | None:
        """From its arrival to its first token; None for an answer that came whole."""
        return None if self.first is None else 1e3 * (self.first - self.arrived)

    @property
    def tpot_ms(self) -> float | None:
        """The mean gap between tokens after the first."""
        if self.first is None or self.last is None or self.new_tokens < 2:
            return None
        return 1e3 * (self.last - self.first) / (self.new_tokens - 1)

    def as_json(self) -> dict[str, Json]:
        """The line. Every time in ms, except `model_loading_time` and `adapter_switch_time`, which are in seconds."""
        engine = self.queue_engine_ms
        sources = {"generation_latency_ms": "engine" if "generation_time_ms" in self.engine else "gateway"}
        sampled = self.sampled or NO_SAMPLE
        for name in ("allocated", "reserved"):
            if name in sampled.sources:
                sources[f"gpu_memory_{name}"] = sampled.sources[name]
        return {
            "kind": SERVE_LOG,
            "format": FORMAT,
            "ts": utc(self.at),
            "timestamp": round(1e3 * self.at, 3),
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "model": self.adapter,
            "adapter": self.adapter,
            "version": self.version,
            "arm": self.arm,
            "certified": self.certified,
            "key": self.key,
            **(self.origin.as_json() if self.origin.run else {}),
            "status": self.status,
            "finish": self.finish,
            "error": self.error,
            "error_kind": self.kind,
            "request_duration_ms": _ms(self.request_duration_ms),
            "generation_latency_ms": _ms(self.generation_latency_ms),
            "queue_time_ms": _ms(self.queue_gateway_ms + (engine or 0.0)),
            "queue_gateway_ms": _ms(self.queue_gateway_ms),
            "queue_engine_ms": _ms(engine),
            "ttft_ms": _ms(self.ttft_ms),
            "tpot_ms": _ms(self.tpot_ms),
            "gaps_p95_ms": _ms(_p95(self.gaps_ms)),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "model_loading_time": self.model_loading_time,
            "adapter_switch_time": self.adapter_switch_time,
            "gpu_memory_allocated": sampled.allocated,
            "gpu_memory_reserved": sampled.reserved,
            "gpu_utilization": sampled.utilization,
            "kv_usage": sampled.kv_usage,
            "sample_age_ms": _ms(1e3 * ((self.sent or self.arrived) - sampled.at)) if self.sampled else None,
            "running_at_start": self.running_at_start,
            "waiting_at_start": self.waiting_at_start,
            "batch_fill": None if self.batch_fill is None else round(self.batch_fill, 4),
            "sources": {**sources, **self.sources},
            **self.text,
        }


def _ms(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _p95(gaps: list[float]) -> float | None:
    return sorted(gaps)[min(len(gaps) - 1, int(0.95 * len(gaps)))] if gaps else None


def _encoded(value: Json) -> bytes:
    """A line of JSON. Half a surrogate, which a client may send escaped, is no UTF-8: only the slower way writes it."""
    import orjson

    try:
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def set_aside(path: Path) -> dict[int, Path]:
    """The rotated files of a log, by their numbers: the highest is the newest."""
    found = {}
    for other in path.parent.glob(f"{glob.escape(path.name)}.*"):
        number = other.name.removeprefix(f"{path.name}.")
        if number.isdecimal():
            found[int(number)] = other
    return found


class Log:
    """A file of lines, or standard output ("-"), or nothing (""). A line that cannot be written is counted in `lost`,
    and nothing else fails; the next line tries the file again. Several processes may write a `shared` file: each holds
    a lock while it writes a line or rotates the file."""

    def __init__(self, where: str, rotate_bytes: int = ROTATE_BYTES, shared: bool = False, keep: int = 0) -> None:
        """`keep`: so many files that were set aside, 0 = all. Raises MissingEnvironment for a file that cannot be
        opened."""
        self.written = self.lost = 0
        self._shared, self._keep = shared, keep
        self._rotate, self._file, self._path = rotate_bytes, None, None
        if where == "-":
            self._file = sys.stdout.buffer
        elif where:
            self._path = Path(where)
            try:
                self._file = self._opened(self._path)
            except OSError as error:
                raise unwritable(where, error, "choose another log: --log") from error

    def write(self, line: Written) -> None:
        """Add a line, whole or not at all."""
        if self._file is None and self._path is None:
            return
        try:
            self._append(redacted(_encoded(line.as_json()).decode()).encode())
            self.written += 1
        except OSError:
            self.lost += 1

    def reopen(self) -> None:
        """Open the file of that name again: another program, such as logrotate, has moved the old one."""
        self.close()

    def close(self) -> None:
        """Close the file; an error of the disk is ignored."""
        if self._path and self._file:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()

    def _append(self, text: bytes) -> None:
        if self._path is None:
            assert self._file is not None
            self._file.write(text)
            self._file.flush()
            return
        if self._file is None:
            self._file = self._opened(self._path)
        while True:
            with self._alone(self._path) as file:
                at = os.fstat(file.fileno()).st_size
                if not at or at + len(text) <= self._rotate or not self._set_aside():
                    self._add(file, text, at)
                    return

    @contextlib.contextmanager
    def _alone(self, path: Path) -> Iterator[BinaryIO]:
        """The file, without other processes meanwhile: the one that the path leads to, where another has set the one
        that was open aside."""
        assert self._file is not None
        while self._shared:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if _same(self._file, path):
                break
            self.close()
            self._file = self._opened(path)
        file = self._file
        try:
            yield file
        finally:
            if self._shared and not file.closed:
                fcntl.flock(file, fcntl.LOCK_UN)

    @staticmethod
    def _add(file: BinaryIO, text: bytes, at: int) -> None:
        """Add a line to a file of `at` bytes, whole or not at all."""
        try:
            if at and os.pread(file.fileno(), 1, at - 1) != b"\n":
                text = b"\n" + text  # a power cut has torn the line before
            written = os.write(file.fileno(), text)
            if written < len(text):
                raise OSError("a part of the line was written")
        except OSError:
            os.ftruncate(file.fileno(), at)  # half a line would spoil the next
            raise

    def _set_aside(self) -> bool:
        """Give the full file the next number, and open another: the lowest is the oldest. Whether that was done: where
        the folder allows no other name, the file goes on."""
        assert self._path is not None and self._file is not None
        aside = set_aside(self._path)
        number = max(aside, default=0) + 1
        try:
            self._path.rename(self._path.with_name(f"{self._path.name}.{number}"))
        except OSError:
            return False
        for old, path in aside.items():
            if self._keep and old <= number - self._keep:
                with contextlib.suppress(OSError):
                    path.unlink()
        self.close()
        self._file = self._opened(self._path)
        return True

    @staticmethod
    def _opened(path: Path) -> BinaryIO:
        return path.open("ab+", buffering=0)


def _same(file: BinaryIO, path: Path) -> bool:
    """Whether the path leads to the file that is open."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
