"""Transform one model outside a recipe: the work of `peftopt merge` and `peftopt quantize`."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from peftopt import environments, machine, plugins, scratch, store
from peftopt.errors import BadInput, Rejected, WorkerFailed, as_input, unwritable
from peftopt.jobs import (
    Change,
    PreviewJob,
    Transformed,
    TransformJob,
)
from peftopt.models import template
from peftopt.models.hf import tokenizer_home
from peftopt.records import Model, Step
from peftopt.runner import build, preflight
from peftopt.runner.build import Progress
from peftopt.runner.process import WorkerProcess

DEADLINE_S = 3600.0


def transform(
    job: TransformJob, progress: Progress | None = None, tell: Callable[[str], None] = lambda _: None
) -> Transformed:
    """Write the transformed model to `job.out`, whole or not at all. `tell` receives a text on removed leftovers of
    killed processes.

    Raises Rejected for a written model that does not work, or whose certificate failed. With a failed certificate, the
    model stays beside `job.out`, for inspection.
    """
    plugin = plugins.catalogue()[job.plugin]
    out = Path(job.out)
    environments.interpreter(plugin)
    _check(job.plugin, job.model)
    step = Step(job.plugin, "transform", plugin.technique, job.params)
    template.check(Path(tokenizer_home(job.model)), job.rows, answers=True)
    preflight.check_step(step, Path(job.model.path), (), job.rows)
    temporary = _beside(out, tell)
    log = scratch.folder(tell) / f"{job.plugin}.log"
    aside = replace(job, model=absolute(job.model), out=str(temporary))
    try:
        with build.bars(progress) as hear:
            made = build.make_artifact(
                aside, log, machine.cores(), DEADLINE_S, hear, lambda child: _watched(child, job, progress)
            )
        if made.tier0:
            raise _broken(job.plugin, made, temporary, out)
        store.move(temporary, out)
    except WorkerFailed as error:
        raise as_input(error) from error
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)
    return replace(made, model=_moved(made.model, temporary, out))


def _moved(model: Model, temporary: Path, out: Path) -> Model:
    """The model after the move of its new folder, which may hold the weights or replace an adapter."""
    where = {str(temporary): str(out)}
    return Model(where.get(model.path, model.path), tuple(where.get(a, a) for a in model.adapters))


@contextlib.contextmanager
def _watched(child: WorkerProcess, job: TransformJob, progress: Progress | None) -> Iterator[None]:
    """Show how much of a merge is written. The size of other transforms' output is not known in advance."""
    if progress is None or job.plugin != "merge":
        yield
        return
    over = threading.Event()
    total = max(1, store.size(Path(job.model.path)) // 10**6)

    def watch(show: Callable[[int, str], None]) -> None:
        while not over.wait(0.2):
            done = min(child.written() // 10**6, total)
            show(done, "" if done < total else "certifying")

    with progress(job.plugin, total, "MB") as show:
        watcher = threading.Thread(target=watch, args=(show,))
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def preview(job: PreviewJob) -> tuple[Change, ...]:
    """What a transform would change, tensor by tensor; nothing is written."""
    _check(job.plugin, job.model)
    log = scratch.folder() / f"{job.plugin}.log"
    try:
        with WorkerProcess(log, machine.cores()) as child:
            return child.ask(replace(job, model=absolute(job.model)), DEADLINE_S).tensors
    except WorkerFailed as error:
        raise as_input(error) from error


def _check(plugin: str, model: Model) -> None:
    merges = plugin == "merge"  # merge itself checks quantized bases, with better messages
    bakes = plugins.catalogue()[plugin].technique == "bake"
    preflight.check_base(Path(model.path), quantized=merges or bakes, ours=not merges)
    if not merges:  # which looks at each weight as it passes by
        preflight.check_weights(Path(model.path))
    for adapter in model.adapters:
        preflight.check_adapter(Path(adapter), Path(model.path), [plugin] if merges else [])


def _broken(plugin: str, transformed: Transformed, made: Path, out: Path) -> Exception:
    """The error for a model that did not pass its checks. A model with a certificate is moved aside, not deleted."""
    if transformed.certificate is None:
        return BadInput(f"{plugin} gave a broken model: {transformed.tier0[0]}", "check the adapter and the base")
    aside = store.unused(out.with_name(f"{out.name}.failed"))
    store.move(made, aside)
    return Rejected(
        f"the {plugin} did not pass its certificate: {transformed.tier0[0].removeprefix('certificate: ')}",
        f"nothing was written to {out}; the result is in {aside}, its parity.json says what was measured",
    )


def _beside(out: Path, tell: Callable[[str], None]) -> Path:
    """A temporary folder on the same disk. Raises an error for an `out` that exists or cannot be written."""
    if out.exists():
        raise BadInput(f"{out} exists already", "choose another --out or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        store.tell_removed(store.remove_orphans(out), out.parent, tell)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", dir=out.resolve().parent)) / "model"
    except OSError as error:
        raise unwritable(out, error, "choose another --out") from error


def absolute(model: Model) -> Model:
    """The model with absolute paths: a worker's working directory is another."""
    return Model(str(Path(model.path).resolve()), tuple(str(Path(a).resolve()) for a in model.adapters))


def compile_cache(model: Model) -> Path:
    """The folder of `peftopt compile`'s cache: beside the model, so that the model's own files stay as they are. Raises
    BadInput for a folder that peftopt did not make."""
    folder = Path(model.path).resolve()
    return store.claim(folder.with_name(folder.name + ".compiled"))
