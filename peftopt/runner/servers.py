"""A recipe's servers outside a race, one at a time: `peftopt load RECIPE` sends its requests to them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from peftopt import machine, plugins, store
from peftopt.corpus import Row
from peftopt.errors import WorkerFailed, as_input
from peftopt.jobs import Served, ServedJob
from peftopt.recipe import plan as planning
from peftopt.records import Build, Recipe, Variant
from peftopt.runner import preflight
from peftopt.runner.prepare import build_alone
from peftopt.runner.run import Listener, Run, load, planned, worker


def stage(recipe: Recipe, results: Path, folder: Path, listener: Listener) -> Run:
    """A run of the recipe's variants on servers, for `serving`. Its artifacts lie in the store, its logs in `folder`.
    For a server that runs already, peftopt opens only the tokenizer here, so it builds nothing."""

    def of(variant: Variant) -> Variant:
        return replace(variant, steps=()) if variant.engine.plugin == "endpoint" else variant

    known = plugins.catalogue()
    servers = {name: of(v) for name, v in recipe.variants.items() if known[v.engine.plugin].serves}
    home = store.Store(results.resolve(), listener.warn)
    started = replace(recipe, variants=servers)
    preflight.check_needs(started)
    plan = planned(started).plan
    home.check_writable()
    return Run(plan, home, folder, listener)


@contextlib.contextmanager
def serving(run: Run, variant: Variant, rows: Sequence[Row], new_tokens: int, stop: bool) -> Iterator[Served]:
    """The variant's server: started by its own engine as in a race, and ended with this context, or a running one.
    Raises BadInput for what the engine refuses, and WorkerFailed with a server's last lines when it does not start."""
    started = time.perf_counter()
    threads = run.recipe.measure.threads or machine.cores()
    with contextlib.ExitStack() as stack:
        try:
            for build in _behind(run, variant):
                build_alone(run, build, threads)
            with run.listener.progress(f"start {variant.name}", 1, "servers"):
                child = stack.enter_context(worker(run, variant, "load", threads))
                load(run, variant, child)
            job = ServedJob(rows=tuple(rows), new_tokens=new_tokens, stop=stop)
            served = child.ask(job, run.recipe.measure.deadline_s)
        except WorkerFailed as error:
            raise as_input(error) from error
        run.listener.done("start", variant.name, time.perf_counter() - started)
        yield served


def _behind(run: Run, variant: Variant) -> list[Build]:
    """The artifacts of the variant's chain, in the order of building."""
    builds = {build.id: build for build in run.plan.builds}
    chain = []
    at = run.plan.models[variant.name]
    while at != planning.SOURCE:
        chain.append(builds[at])
        at = builds[at].parent
    return chain[::-1]
