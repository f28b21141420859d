"""One artifact, for a recipe or for a verb: a worker makes it, and another, which knows nothing of it, opens it."""

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
"""Prompts that a written model has to answer: the first calibration rows, or of our own."""

PROMPTS = tuple(Row(str(n), ({"role": "user", "content": text},)) for n, text in enumerate(TEXTS[:VERIFIED_ON]))

NOTHING = 0.98
"""Share of a model's weights that are still in 16 bits or more, above which nothing was quantized."""

LACKING = ("missing library", "missing environment")

Show = Callable[[int, str], None]
Progress = Callable[[str, int, str], AbstractContextManager[Show]]
"""Opens a bar of a title, a total and its unit, such as "MB"; the function it gives sets how much is done, and what is
going on."""


def make_artifact(
    job: TransformJob,
    log: Path,
    threads: int,
    deadline_s: float,
    hear: Hear = lambda _: None,
    watch: Callable[[WorkerProcess], AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
) -> Transformed:
    """Let a worker write the transformed model; what a quantizer wrote is then opened in a fresh process.

    Returns what it took and what was found. Raises WorkerFailed when either of them fails: "unusable" for a model that
    was written and does not work. The folder may be half written then.
    """
    plugin = plugins.catalogue()[job.plugin]
    out = Path(job.out)
    quantizes = plugin.technique == "quantize"
    if quantizes:
        # what it writes is smaller, and by how much not yet known
        check_room(out.parent, store.size(Path(job.model.path)))
    with contextlib.ExitStack() as stack:
        opener = stack.enter_context(_opener(plugin, job.model, log, threads, deadline_s)) if quantizes else None
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
    """A fresh process to open the result in, which imports what the reader needs while the quantizer works. What keeps
    it from starting is raised when it is asked for."""
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
    made: Model,
    parent: Model,
    rows: Sequence[Row],
    log: Path,
    threads: int,
    deadline_s: float,
) -> str:
    """What a fresh process says of the written model, in a few words; of one whose reader is not installed, that."""
    asked = tuple(rows[:VERIFIED_ON]) or PROMPTS

    def problem(child: WorkerProcess, model: Model, engine: str) -> str:
        child.ask(OpenJob(plugin=engine, params=_any_task(engine, model), model=model), deadline_s)
        return child.ask(AliveJob(asked), deadline_s).problem

    def usual() -> str:
        """A base model may repeat itself as it is: only what quantizing brought about counts."""
        with WorkerProcess(log.with_suffix(".parent.log"), threads) as child:
            return problem(child, parent, "eager")

    try:
        trouble = problem(opener(), made, plugin.reader)
        if trouble and trouble != usual():
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
    """What an engine is opened with to see that weights work: a multitask prompt answers for one task, and any does."""
    kinds = {open_adapter(Path(folder)).kind for folder in model.adapters if not is_baked(folder)}
    return {"task": 0} if engine == "eager" and "MULTITASK_PROMPT_TUNING" in kinds else {}


@contextlib.contextmanager
def bars(progress: Progress | None) -> Iterator[Hear]:
    """Show what a worker reports: a bar for each phase, opened when the first word of it comes."""
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
