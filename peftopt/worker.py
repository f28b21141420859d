"""A child process that does the heavy work: JSON jobs in on stdin, JSON lines out on stdout.

It runs as `python -m peftopt.worker` in the environment its plug-in needs; what crosses the border is folders and
records, never objects. Each job answers with any number of {"record": …} and {"progress": …} lines and then one
{"done": …} or {"failed": {"reason", "detail", "hint"}}. A worker keeps the model it opened between jobs, and ends with
its stdin.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from peftopt import machine, progress
from peftopt.corpus import Row, row_from
from peftopt.errors import MissingEnvironment, PeftoptError, WorkerFailed
from peftopt.merging.certificate import FILE as CERTIFICATE
from peftopt.models import provenance
from peftopt.models.hf import tokenizer, tokenizer_home
from peftopt.plugins import module
from peftopt.records import Invariants, Json, Model


class Worker:
    """The jobs. State: the engine that is open, if any, and whether it has not been timed yet."""

    def __init__(self, tell: Callable[[str, Json], None]) -> None:
        self.tell = tell
        self.engine: Any = None
        self.fresh = True

    def transform(
        self,
        plugin: str,
        params: dict[str, Json],
        model: dict[str, Json],
        out: str,
        rows: list[Json],
        seed: int,
        calibration: str = "task",
    ) -> dict[str, Json]:
        """Run one transform, scan what it wrote, and say what it took. `calibration` says where the rows came from."""
        from peftopt.probes import memory

        source = module("transform", plugin)
        opened = _model(model)
        texts = _rendered(map(row_from, rows), tokenizer_home(opened), opened.path) if rows else []
        started, cpu = time.perf_counter(), time.process_time()
        with progress.heard(lambda at: self.tell("progress", at)):
            result = source.transform(opened, source.Params(**params), Path(out), texts, seed)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        if made := provenance.read(Path(out)):
            used = made["calibration"] and {"source": calibration, **made["calibration"]}
            made = provenance.add(Path(out), calibration=used)
        return {
            "model": dataclasses.asdict(result),
            "seconds": seconds,
            "cpu_seconds": cpu,
            **_examined(Path(out), opened),
            **({"quantization": made} if made else {}),
            **memory.peak(),
        }

    def alive(self, rows: list[Json]) -> dict[str, Json]:
        """Whether the open model answers at all: see probes/alive.py."""
        from peftopt.probes import alive

        return {"problem": alive.problem(self.engine, [row_from(row) for row in rows])}

    def preview(self, plugin: str, params: dict[str, Json], model: dict[str, Json]) -> dict[str, Json]:
        """What a transform would change, tensor by tensor; nothing is written."""
        source = module("transform", plugin)
        return {"tensors": source.preview(_model(model), source.Params(**params))}

    def prepare(self, plugin: str, model: dict[str, Json]) -> dict[str, Json]:
        """Import what an engine needs, so that `model_loading_time` is the model's alone."""
        module("engine", plugin).prepare(_model(model))
        return {}

    def open(
        self, plugin: str, params: dict[str, Json], model: dict[str, Json], policies: Sequence[dict[str, Json]] = ()
    ) -> dict[str, Json]:
        """Load a model into an engine. Times in seconds; `adapter_switch_time` where an adapter was attached."""
        from peftopt.policies import Policed
        from peftopt.probes import bandwidth, memory

        source = module("engine", plugin)
        opened = _model(model)
        started = time.perf_counter()
        self.engine = source.open(opened, source.Params(**params))
        if policies:
            self.engine = Policed(self.engine, policies)
        return {
            "model_loading_time": time.perf_counter() - started,
            "adapter_switch_time": self.engine.adapter_switch_time,
            "threads": self.engine.threads,
            "device": self.engine.device,
            "pid": os.getpid(),
            **bandwidth.reads(opened),
            **memory.gpu(),
        }

    def warm(self, rows: list[Json], batch: int, new_tokens: int, timed: bool = True) -> dict[str, Json]:
        """Have an engine that compiles do so for every shape that batches out of these rows can have."""
        lengths = [len(self.engine.encode(row_from(row).messages)[0]) for row in rows]
        self.engine.warm(lengths, batch, new_tokens, timed)
        return {}

    def speed(
        self,
        batches: list[list[Json]],
        new_tokens: int,
        warmup: int,
        stop: bool = False,
        users: int = 0,
        rate: float = 0.0,
        seed: int = 0,
    ) -> dict[str, Json]:
        """One turn of a block: see probes/speed.py, and with users or a rate probes/load.py."""
        from peftopt.probes import load, speed

        rows = [[row_from(row) for row in batch] for batch in batches]
        fresh, self.fresh = self.fresh, False
        if not users and not rate:
            return {"requests": speed.turn(self.engine, rows, new_tokens, warmup, fresh, stop)}
        alone = speed.turn(self.engine, rows[:warmup], new_tokens, warmup, fresh, stop)
        timed = [row for batch in rows[warmup:] for row in batch]
        requests, engine = load.turn(self.engine, timed, new_tokens, stop, users, rate, seed)
        return {"requests": alone + requests, "engine": engine}

    def served(self, rows: list[Json], new_tokens: int, stop: bool) -> dict[str, Json]:
        """Where the open server is, and these prompts as it takes them: for a load that is sent from elsewhere."""
        from peftopt.policies import most

        asked = {row.id: self.engine.prompt(self.engine.encode(row.messages)[0]) for row in map(row_from, rows)}
        return {
            "target": dataclasses.asdict(self.engine.target),
            "prompts": {id_: dataclasses.asdict(prompt) for id_, prompt in asked.items()},
            "new_tokens": most(self.engine, new_tokens, stop),
            "slots": self.engine.slots,
        }

    def quality(
        self,
        rows: list[Json],
        schema: Json,
        new_tokens: int,
        batch: int,
        reference: str | None = None,
        write_reference: str | None = None,
        invariants: dict[str, Json] | None = None,
    ) -> dict[str, Json]:
        """Answer rows; one record each: see probes/quality.py."""
        from peftopt.probes import quality

        checked = [row_from(row) for row in rows]
        quality.ask(
            self.engine,
            checked,
            schema,
            new_tokens,
            batch,
            reference,
            write_reference,
            lambda record: self.tell("record", record),
            Invariants(**{**(invariants or {}), "labels": tuple((invariants or {}).get("labels", ()))}),
        )
        return {"rows": len(rows)}

    def task(self, task: str, rows: int) -> dict[str, Json]:
        """One task of lm-evaluation-harness: see probes/tasks.py."""
        from peftopt.probes import tasks

        with progress.heard(lambda at: self.tell("progress", at)):
            return tasks.run(self.engine, task, rows)

    def bandwidth(self) -> dict[str, Json]:
        """How fast this machine reads memory: see probes/bandwidth.py."""
        from peftopt.probes import bandwidth

        return bandwidth.survey()

    def switch(self, adapter: str) -> dict[str, Json]:
        """Another adapter in the place of the one that is served. Time in seconds."""
        return {"adapter_switch_time": self.engine.switch(adapter)}

    def facts(self) -> dict[str, Json]:
        """What the engine says of its own getting ready, where it does: see peftopt.engines.Engine."""
        return dict(self.engine.facts())

    def kernels(self, batch: list[Json], new_tokens: int) -> dict[str, Json]:
        """Which kernels a request runs on the GPU: see probes/kernels.py."""
        from peftopt.probes import kernels

        return kernels.used(self.engine, [row_from(row) for row in batch], new_tokens)

    def memory(self) -> dict[str, Json]:
        """Peaks since this process started; nothing of a server, whose memory is another process's."""
        from peftopt.probes import memory

        if not self.engine:
            return memory.peak([])
        return {} if self.engine.remote else memory.peak(self.engine.processes())


def _examined(out: Path, source: Model) -> dict[str, Json]:
    """What is wrong with the files: as the transform's own certificate says, where it left one, else by a scan; and
    what of their words is not the source's."""
    from peftopt.probes import weights

    foreign = weights.foreign_words(out, source)
    if not (out / CERTIFICATE).is_file():
        return {"tier0": weights.scan(out) + foreign}
    found = json.loads((out / CERTIFICATE).read_text(encoding="utf-8"))
    failed = [f"certificate: {check['name']}: {check['detail']}" for check in found["checks"] if not check["passed"]]
    return {"tier0": failed + foreign, "certificate": found}


def _model(values: dict[str, Json]) -> Model:
    return Model(values["path"], tuple(values["adapters"]))


def _rendered(rows: Iterable[Row], home: str, base: str = "") -> list[str]:
    """The calibration texts of rows: chat template applied where there is one, the right answer included. Raises
    BadInput, naming the row, for one that the template refuses."""
    from peftopt.engines._text import rendered

    encode = tokenizer(home, base)

    def text(row: Row) -> str:
        answer = [{"role": "assistant", "content": row.expected}] if row.expected else []
        messages = [*row.messages, *answer]
        if not encode.chat_template:
            return "\n".join(message["content"] for message in messages)
        return rendered(encode, messages, prompt=False, what=f"row {row.id!r}")

    return [text(row) for row in rows]


def _failure(error: BaseException) -> dict[str, str]:
    """Why a job failed, in the words of the report. The traceback goes to the worker's log."""
    traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, WorkerFailed):
        return {"reason": error.reason, "detail": error.detail, "hint": error.hint}
    if isinstance(error, PeftoptError):
        lacks = isinstance(error, MissingEnvironment)
        return {"reason": "missing environment" if lacks else "refused", "detail": error.message, "hint": error.hint}
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "OutOfMemory" in type(error).__name__:
        return {"reason": "out of memory", "detail": str(error).splitlines()[0] if str(error) else "", "hint": ""}
    if isinstance(error, ModuleNotFoundError):
        return {"reason": "missing library", "detail": str(error), "hint": f"pip install {error.name}"}
    return {"reason": "error", "detail": f"{type(error).__name__}: {error}"[:500], "hint": ""}


def serve(jobs: TextIO, channel: TextIO) -> None:
    """Answer jobs until there are no more."""

    def tell(word: str, value: Json) -> None:
        channel.write(json.dumps({word: value}) + "\n")
        channel.flush()

    worker = Worker(tell)
    for line in jobs:
        job = json.loads(line)
        try:
            answer = getattr(worker, job.pop("job"))(**job)
        except Exception as error:  # noqa: BLE001 (whatever a library raises becomes a record with its reason)
            tell("failed", _failure(error))
        else:
            tell("done", answer)


def main() -> None:
    """Serve jobs from stdin. stdout is the protocol, so whatever a library prints goes to stderr, the worker's log."""
    machine.die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, channel)
    sys.stderr.flush()
    os._exit(0)  # everything is said: torch would take most of a second to put its things away


if __name__ == "__main__":
    main()
