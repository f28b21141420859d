"""Build one artifact, for a recipe or for a verb: a worker writes it, and a fresh worker opens a quantized one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from peftopt import environments, plugins, store
from peftopt.corpus import TEXTS, Row
from peftopt.errors import WorkerFailed
from peftopt.jobs import AliveJob, OpenJob, PrepareJob, Transformed, TransformJob
from peftopt.models import provenance
from peftopt.models.adapter import open_adapter
from peftopt.models.baked import is_baked
from peftopt.models.checkpoint import check_room
from peftopt.progress import Hear, Reached
from peftopt.records import SAFETENSORS, Json, Model, Plugin
from peftopt.runner.process import WorkerProcess
from peftopt.transforms import _layers

VERIFIED_ON = 2
"""The number of prompts that a written model must answer: the first calibration rows, or built-in ones."""

PROMPTS = tuple(Row(str(n), ({"role": "user", "content": text},)) for n, text in enumerate(TEXTS[:VERIFIED_ON]))

NOTHING = 0.98
"""If more than this share of the weights still has 16 bits or more, the quantizer did nothing."""

LACKING = ("missing library", "missing environment")

Show = Callable[[int, str], None]
Progress = Callable[[str, int, str], AbstractContextManager[Show]]
"""Opens a progress bar with a title, a total and its unit, such as "MB". The function it yields sets how much is done,
and what is going on."""


def make_artifact(
    job: TransformJob,
    log: Path,
    threads: int,
    deadline_s: float,
    hear: Hear = lambda _: None,
    watch: Callable[[WorkerProcess], AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
) -> Transformed:
    """Let a worker write the transformed model. A fresh process then opens a quantized model.

    Returns the times and the results of the checks. Raises WorkerFailed when either process fails, with the reason
    "unusable" for a written model that does not work. The folder may then be half written.
    """
    plugin = plugins.catalogue()[job.plugin]
    out = Path(job.out)
    quantizes = plugin.technique == "quantize"
    if quantizes:
        # the output is smaller, by an unknown amount
        check_room(out.parent, store.size(Path(job.model.path)))
    with contextlib.ExitStack() as stack:
        written = replace(job.model, path=job.out)
        opener = stack.enter_context(_opener(plugin, written, log, threads, deadline_s)) if quantizes else None
        with WorkerProcess(log, threads, python=environments.interpreter(plugin)) as child, watch(child):
            transformed = child.ask(job, deadline_s, hear=hear)
        if opener and not transformed.tier0:
            if plugin.format == SAFETENSORS and _layers.unrounded(Path(job.model.path), out) > NOTHING:
                detail = f"{job.plugin} wrote a model whose weights are as wide as before: nothing was quantized"
                raise WorkerFailed("unusable", detail, "keep fewer layers, or use another method")
            hear(Reached("verifying", 0, 1, "in a fresh process"))
            verified = _verified(opener, plugin, transformed.model, job.model, job.rows, log, threads, deadline_s)
            transformed = replace(transformed, quantization=provenance.add(out, verified=verified))
    return transformed


@contextlib.contextmanager
def _opener(
    plugin: Plugin, model: Model, log: Path, threads: int, deadline_s: float
) -> Iterator[Callable[[], WorkerProcess]]:
    """A fresh process that will open the `model`, and imports its reader's libraries while the quantizer writes it. An
    error at its start is raised by the call of the yielded function."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as beside:

        def start() -> WorkerProcess:
            python = environments.interpreter(plugins.catalogue()[plugin.reader])
            child = stack.enter_context(WorkerProcess(log.with_suffix(".verify.log"), threads, python=python))
            child.ask(PrepareJob(plugin=plugin.reader, model=model), deadline_s)
            return child

        yield beside.submit(start).result


def _verified(
    opener: Callable[[], WorkerProcess],
    plugin: Plugin,
    model: Model,
    parent: Model,
    rows: Sequence[Row],
    log: Path,
    threads: int,
    deadline_s: float,
) -> str:
    """The result of opening the written model in a fresh process, in words, or that its reader is not installed."""
    asked = tuple(rows[:VERIFIED_ON]) or PROMPTS

    def problem(child: WorkerProcess, model: Model, engine: str) -> str:
        child.ask(OpenJob(plugin=engine, params=_any_task(engine, model), model=model), deadline_s)
        return child.ask(AliveJob(asked), deadline_s).problem

    def before() -> str:
        """The problem of the model before quantizing, such as a base model that repeats itself: it does not count."""
        with WorkerProcess(log.with_suffix(".parent.log"), threads) as child:
            return problem(child, parent, "eager")

    try:
        trouble = problem(opener(), model, plugin.reader)
        if trouble and trouble != before():
            detail = f"the model that {plugin.name} wrote {trouble}"
            raise WorkerFailed("unusable", detail, "try more bits, or keep layers")
    except WorkerFailed as error:
        if error.reason in LACKING:
            return f"not verified: its reader {plugin.reader} needs {error.detail}"
        if error.reason in ("refused", "error"):
            detail = f"the model that {plugin.name} wrote does not work: {error.detail}"
            hint = error.hint or "keep the layers that it fails on (keep), or use another method"
            raise WorkerFailed("unusable", detail, hint) from error
        raise
    return f"answered {len(asked)} prompts in a fresh process ({plugin.reader})"


def _any_task(engine: str, model: Model) -> Mapping[str, Json]:
    """Parameters for opening an engine to check weights: a multitask prompt needs a task, and any task will do."""
    kinds = {open_adapter(Path(folder)).kind for folder in model.adapters if not is_baked(folder)}
    return {"task": 0} if engine == "eager" and "MULTITASK_PROMPT_TUNING" in kinds else {}


@contextlib.contextmanager
def bars(progress: Progress | None) -> Iterator[Hear]:
    """Show a worker's progress: a bar for each phase, from the phase's first report on."""
    with contextlib.ExitStack() as stack:
        phase = ""
        show = None

        def hear(at: Reached) -> None:
            nonlocal phase, show
            if progress and at.phase != phase:
                stack.close()
                phase = at.phase
                show = stack.enter_context(progress(at.phase, at.total, "steps"))
            if show:
                show(at.done, at.what)

        yield hear
