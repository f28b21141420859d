"""The worker process, which does the heavy work: it reads JSON jobs from stdin and writes JSON lines to stdout.

It runs as `python -m peftopt.worker` in the environment that its plug-in needs. Parent and worker exchange folders and
the records of jobs.py, never objects. For each job, the worker writes any number of {"record": …} and {"progress": …}
lines and then one {"done": …} or {"failed": {"reason", "detail", "hint"}}. Between jobs, it keeps the open model. It
ends with its stdin.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from peftopt import jobs, machine, progress
from peftopt.corpus import Row
from peftopt.errors import NO_MEMORY, MissingEnvironment, PeftoptError, WorkerFailed, says_no_memory
from peftopt.measurements import Caching, EngineFacts, Launch, Memory, Survey, Task, as_json
from peftopt.merging.certificate import FILE as CERTIFICATE
from peftopt.models import drift, provenance
from peftopt.models.folders import keep_private
from peftopt.models.hf import tokenizer, tokenizer_home
from peftopt.plugins import catalogue, module
from peftopt.probes.layers import Few
from peftopt.records import Json, Model
from peftopt.redaction import redacted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Tell = Callable[[str, "DataclassInstance"], None]
"""Writes a line: its kind ("record", "progress", …) and a record."""

DONE = jobs.Done()


class Worker:
    """The jobs, one method each. State: the open engine, if any, and whether it has not been timed yet (`fresh`)."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.engine: Any = None
        self.fresh = True

    def transform(self, job: jobs.TransformJob) -> jobs.Transformed:
        """Run one transform, scan its output, and return its time, its memory and the results of the checks."""
        from peftopt.probes import memory

        source = module("transform", job.plugin)
        out = Path(job.out)
        texts = _rendered(job.rows, tokenizer_home(job.model), job.model.path) if job.rows else []
        started = time.perf_counter()
        cpu_started = time.process_time()
        with progress.heard(lambda at: self.tell("progress", at)):
            result = source.transform(job.model, source.Params(**job.params), out, texts, job.seed)
        seconds = time.perf_counter() - started
        cpu_seconds = time.process_time() - cpu_started
        keep_private(out, Path(job.model.path))
        quantization = provenance.read(out)
        if quantization:
            used = quantization["calibration"] and {"source": job.calibration, **quantization["calibration"]}
            quantization = provenance.add(out, calibration=used)
        tier0, certificate = _examined(out, job.model)
        tier0 += _drifts(job)
        peaks = memory.peak()
        return jobs.Transformed(
            model=result,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            tier0=tuple(tier0),
            certificate=certificate,
            quantization=quantization,
            peak_memory_bytes=peaks.peak_memory_bytes,
            gpu_memory_allocated=peaks.gpu_memory_allocated,
            gpu_memory_reserved=peaks.gpu_memory_reserved,
        )

    def alive(self, job: jobs.AliveJob) -> jobs.Alive:
        """Whether the open model answers at all: see probes/alive.py."""
        from peftopt.probes import alive

        return jobs.Alive(alive.problem(self.engine, job.rows))

    def preview(self, job: jobs.PreviewJob) -> jobs.Previewed:
        """The changes by a transform, tensor by tensor. Writes nothing."""
        source = module("transform", job.plugin)
        return jobs.built(jobs.Previewed, {"tensors": source.preview(job.model, source.Params(**job.params))})

    def prepare(self, job: jobs.PrepareJob) -> jobs.Done:
        """Import what an engine needs, so that `model_loading_time` is the model's alone. Garbage collections leave out
        what is imported: it is there for good, and searching it takes a second of a model's loading."""
        module("engine", job.plugin).prepare(job.model)
        gc.collect()
        gc.freeze()
        return DONE

    def open(self, job: jobs.OpenJob) -> Launch:
        """Load a model into an engine. Times are in seconds; `adapter_switch_time` is for an attached adapter."""
        from peftopt.models import prompts
        from peftopt.policies import Policed, opened_with
        from peftopt.probes import bandwidth, memory

        source = module("engine", job.plugin)
        started = time.perf_counter()
        self.engine = source.open(job.model, source.Params(**job.params), **opened_with(job.policies))
        if job.rows:
            self.engine.remember([self.engine.encode(row.messages, row.expected)[1] for row in job.rows])
        if job.policies:
            self.engine = Policed(self.engine, job.policies)
        gpu = memory.gpu()
        return Launch(
            model_loading_time=time.perf_counter() - started,
            adapter_switch_time=self.engine.adapter_switch_time,
            threads=self.engine.threads,
            device=self.engine.device,
            pid=os.getpid(),
            **bandwidth.reads(job.model),
            **prompts.facts(job.model),
            gpu_memory_allocated=gpu.gpu_memory_allocated,
            gpu_memory_reserved=gpu.gpu_memory_reserved,
        )

    def warm(self, job: jobs.WarmJob) -> jobs.Done:
        """Let an engine compile for every shape of batches of these rows."""
        lengths = [len(self.engine.encode(row.messages)[0]) for row in job.rows]
        self.engine.warm(lengths, job.batch, job.new_tokens, job.timed)
        return DONE

    def speed(self, job: jobs.SpeedJob) -> jobs.Timed:
        """Measure one turn of a block: see probes/speed.py, and for users or a rate probes/load.py."""
        from peftopt.probes import load, speed

        fresh = self.fresh
        self.fresh = False
        if not job.users and not job.rate:
            turn = speed.turn(self.engine, job.batches, job.new_tokens, job.warmup, fresh, job.stop)
            return jobs.Timed(tuple(turn))
        first = job.batches[: job.warmup]
        timed = [row for batch in job.batches[job.warmup :] for row in batch]
        alone = speed.turn(self.engine, first, job.new_tokens, job.warmup, fresh, job.stop)
        loaded, engine = load.turn(self.engine, timed, job.new_tokens, job.stop, job.users, job.rate, job.seed)
        return jobs.Timed(tuple(alone), loaded, engine)

    def served(self, job: jobs.ServedJob) -> jobs.Served:
        """The open server's address and these prompts in its format, for a load from another process."""
        from peftopt.policies import most

        return jobs.Served(
            target=self.engine.target,
            prompts={row.id: self.engine.prompt(self.engine.encode(row.messages)[0]) for row in job.rows},
            new_tokens=most(self.engine, job.new_tokens, job.stop),
            slots=self.engine.slots,
        )

    def quality(self, job: jobs.QualityJob) -> jobs.Answered:
        """Answer rows, with one record for each answer: see probes/quality.py."""
        from peftopt.probes import quality

        quality.ask(
            self.engine,
            job.rows,
            job.schema,
            job.new_tokens,
            job.batch,
            job.reference,
            job.write_reference,
            lambda answer: self.tell("record", answer),
            job.invariants,
        )
        return jobs.Answered(len(job.rows))

    def task(self, job: jobs.TaskJob) -> Task:
        """Run one task of lm-evaluation-harness: see probes/tasks.py."""
        from peftopt.probes import tasks

        with progress.heard(lambda at: self.tell("progress", at)):
            return tasks.run(self.engine, job.task, job.rows)

    def caching(self, job: jobs.CachingJob) -> Caching:
        """Measure the size and the gain of the KV cache: see probes/caching.py."""
        from peftopt.probes import caching

        return caching.look(self.engine.model, job.tokens, job.rounds)

    def bandwidth(self, job: jobs.BandwidthJob) -> Survey:
        """Measure how fast this machine reads memory: see probes/bandwidth.py."""
        from peftopt.probes import bandwidth

        return bandwidth.survey()

    def layers(self, job: jobs.LayersJob) -> Few:
        """Time variants on the first layers of a model: see probes/layers.py."""
        from peftopt.probes import layers

        texts = _rendered(job.rows, tokenizer_home(job.model), job.model.path) if job.rows else []
        with progress.heard(lambda at: self.tell("progress", at)):
            bench = layers.Bench(job.model, Path(job.folder), texts)
            return layers.try_out(bench, job.variants, job.asked, job.seconds, job.rank, job.seed, job.answers)

    def switch(self, job: jobs.SwitchJob) -> jobs.Switched:
        """Replace the served adapter by another. The time is in seconds."""
        return jobs.Switched(self.engine.switch(job.adapter))

    def facts(self, job: jobs.FactsJob) -> EngineFacts:
        """The engine's own facts on its start, if it has any: see peftopt.engines.Engine."""
        return jobs.built(EngineFacts, self.engine.facts())

    def kernels(self, job: jobs.KernelsJob) -> EngineFacts:
        """The kernels that a request runs on the GPU: see probes/kernels.py."""
        from peftopt.probes import kernels

        return kernels.used(self.engine, job.batch, job.new_tokens)

    def memory(self, job: jobs.MemoryJob) -> Memory:
        """Memory peaks since the start of this process; empty for a remote server."""
        from peftopt.probes import memory

        if not self.engine:
            return memory.peak([])
        return Memory() if self.engine.remote else memory.peak(self.engine.processes())


def _examined(out: Path, source: Model) -> tuple[list[str], Json]:
    """The problems of the written files, and the certificate, None without one. The problems come from the certificate,
    else from a scan of the weights. Words that differ from the source's are problems too."""
    from peftopt.probes import weights

    foreign = weights.foreign_words(out, source)
    if not (out / CERTIFICATE).is_file():
        return weights.scan(out) + foreign, None
    certificate = json.loads((out / CERTIFICATE).read_text(encoding="utf-8"))
    failed = [check for check in certificate["checks"] if not check["passed"]]
    return [f"certificate: {check['name']}: {check['detail']}" for check in failed] + foreign, certificate


def _drifts(job: jobs.TransformJob) -> list[str]:
    """For a merge or a bake, the adapter's words that are not the base's, unless the user allows a mismatch."""
    folded = catalogue()[job.plugin].technique in ("merge", "bake")
    if not (folded and job.model.adapters) or job.params.get("allow_base_mismatch"):
        return []
    return drift.drifts(Path(job.model.path), Path(tokenizer_home(job.model)))


def _rendered(rows: Iterable[Row], home: str, base: str = "") -> list[str]:
    """The calibration texts of rows, with the chat template, if there is one, and the right answer. Raises BadInput,
    which names the row, for a row that the template refuses."""
    from peftopt.engines._text import rendered

    encode = tokenizer(home, base)

    def text(row: Row) -> str:
        answer = [{"role": "assistant", "content": row.expected}] if row.expected else []
        messages = [*row.messages, *answer]
        if not encode.chat_template:
            return "\n".join(message["content"] for message in messages)
        return rendered(encode, messages, prompt=False, what=f"row {row.id!r}")

    return [text(row) for row in rows]


def _failure(error: BaseException) -> jobs.Failed:
    """The reason of a job's failure, in the words of the report. The traceback goes to the worker's log."""
    sys.stderr.write(redacted("".join(traceback.format_exception(error))))
    if isinstance(error, WorkerFailed):
        return jobs.Failed(error.reason, error.detail, error.hint)
    if isinstance(error, PeftoptError):
        lacks = isinstance(error, MissingEnvironment)
        return jobs.Failed("missing environment" if lacks else "refused", error.message, error.hint)
    if isinstance(error, MemoryError) or says_no_memory(f"{type(error).__name__}: {error}"):
        first = str(error).splitlines()[:1]
        return jobs.Failed(NO_MEMORY, "; ".join([*first, f"the worker held {_peak()} at most"]))
    if isinstance(error, ModuleNotFoundError):
        return jobs.Failed("missing library", str(error), f"pip install {error.name}")
    return jobs.Failed("error", f"{type(error).__name__}: {error}"[:500])


def _peak() -> str:
    """The process's peak of host memory, in words."""
    from peftopt.probes import memory

    held = memory.peak().peak_memory_bytes
    return f"{held / 2**30:.2f} GiB" if held else "an unknown amount"


def serve(lines: TextIO, channel: TextIO) -> None:
    """Do jobs until stdin ends."""

    def tell(word: str, record: DataclassInstance) -> None:
        channel.write(json.dumps({word: as_json(record)}) + "\n")
        channel.flush()

    worker = Worker(tell)
    for line in lines:
        try:
            job = jobs.from_line(line)
            answer = getattr(worker, job.name())(job)
        except Exception as error:  # noqa: BLE001 (whatever a library raises becomes a record with its reason)
            tell("failed", _failure(error))
        else:
            tell("done", answer)


def main() -> None:
    """Do jobs from stdin. stdout has the protocol, so libraries' output goes to stderr, which is the worker's log."""
    machine.die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, channel)
    sys.stderr.flush()
    os._exit(0)  # all output is flushed: torch would take most of a second to clean up


if __name__ == "__main__":
    main()
