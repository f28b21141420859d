"""Execute a plan: build, check answers, race. Artifacts in the store are reused. A failure becomes a record.

    artifacts + answers -> blocks -> decision

This module judges nothing: `stopping` says, from the records so far, which variants need more blocks or answers.
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from peftopt import machine, stats, store
from peftopt.decision import duration as durations
from peftopt.decision import stopping
from peftopt.decision.evidence import Evidence
from peftopt.errors import BadInput, WorkerFailed
from peftopt.jobs import BandwidthJob
from peftopt.measurements import Measured, More
from peftopt.metrics import counted
from peftopt.records import Plan, Recipe
from peftopt.runner import build, duration, forecast, hashes, preflight, remote
from peftopt.runner.prepare import make_ready
from peftopt.runner.process import WorkerProcess
from peftopt.runner.race import Field, race
from peftopt.runner.run import Listener, Run, check_baseline, hashed, planned


@contextlib.contextmanager
def prepare(
    recipe: Recipe,
    text: str,
    results: Path,
    listener: Listener,
    fresh: bool = False,
    more: bool = False,
    artifacts: str = "",
) -> Iterator[Run]:
    """Check the recipe's files, make the plan and open its run folder. An unfinished run of the same plan on the same
    kind of machine continues; with `more`, a finished run too. This process owns the folder until the end; see
    `store.own`. `artifacts`: where machines share them, see `remote.opened`."""
    home = store.Store(results.resolve(), listener.warn)
    plan, key, sources = planned(recipe)
    home.check_writable()
    shared = remote.opened(artifacts, listener.warn, listener.tell) if artifacts else None
    home.clear()
    runs = home.root / "runs"
    mine = sorted(runs.glob(f"*-{recipe.name}-{key}"))
    unfinished = [] if fresh else _resumable(mine, listener)
    if mine and more and not unfinished and not fresh:
        with reopen(mine[-1], listener) as run:
            yield run
        return
    if unfinished:
        folder = unfinished[-1]
        listener.warn(f"continuing the unfinished run {folder.name}")
    else:
        folder = runs / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{recipe.name}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
    store.note(folder, recipe.name)
    with _owned(folder, plan, home, listener) as run:
        run.remote = shared
        if not (folder / "machine.json").exists():
            _begin(run, text, sources)
        run.retry()
        yield run


def _begin(run: Run, text: str, sources: Mapping[str, str]) -> None:
    """Write the first files of a run, and warn of problems of its recipe. `text` is the recipe's text; `sources` are
    the hashes of its base and adapter."""
    folder, recipe, listener = run.folder, run.recipe, run.listener
    store.write(folder / "recipe.yaml", text)
    store.write(folder / "plan.json", json.dumps(asdict(run.plan), indent=1))
    store.write(folder / hashes.FILE, json.dumps(asdict(hashes.of(recipe, sources)), indent=1))
    store.write(folder / "machine.json", json.dumps(machine.describe(), indent=1))
    for line in (*preflight.origins(recipe), *preflight.prompts(recipe), *preflight.repeats(recipe)):
        listener.tell(line)
    for line in (*preflight.warnings(recipe), *preflight.copies(recipe)):
        listener.warn(line)
    for line in preflight.foreseen(recipe):
        listener.warn(f"cannot be decided: {line}")


@contextlib.contextmanager
def _owned(folder: Path, plan: Plan, home: store.Store, listener: Listener) -> Iterator[Run]:
    """The run of a folder, which this process owns meanwhile."""
    lines = folder / "measurements.jsonl"
    owner = store.own(folder, listener.warn)
    try:
        measurements = store.read(lines, listener.warn)
        store.cut_torn_line(lines)
        yield Run(plan, home, folder, listener, measurements)
    except KeyboardInterrupt:
        kept = counted(len(measurements), "measurement")
        listener.warn(f"{kept} kept in {folder}: the same command continues from there")
        raise
    finally:
        store.disown(owner)


@contextlib.contextmanager
def reopen(folder: Path, listener: Listener) -> Iterator[Run]:
    """A run that may get more blocks. Raises BadInput where the files, the libraries or the machine have changed."""
    plan = store.read_plan(folder / "plan.json")
    now, key, _ = planned(plan.recipe)
    if [b.id for b in now.builds] != [b.id for b in plan.builds] or not folder.resolve().name.endswith(f"-{key}"):
        hint = "run the recipe again: a new run measures everything as it is now"
        raise BadInput(f"the models, prompts or libraries of {folder} have changed since it ran", hint)
    if changed := _differences(folder):
        hint = "one race takes blocks of one machine: continue on that machine, or run the recipe here"
        raise BadInput(f"{folder} was measured on another machine: its {', '.join(changed)} differ", hint)
    home = store.Store(folder.resolve().parents[1], listener.warn)
    with _owned(folder, plan, home, listener) as run:
        yield run


def _resumable(folders: Sequence[Path], listener: Listener) -> list[Path]:
    """The unfinished runs that may continue here: one race takes blocks of one machine only."""
    alike = []
    for folder in folders:
        if store.is_finished(folder):
            continue
        if changed := _differences(folder):
            listener.warn(
                f"{folder.name} is unfinished, but was measured on another machine: its {', '.join(changed)} differ"
            )
        else:
            alike.append(folder)
    return alike


def _differences(folder: Path) -> list[str]:
    """What differs between this machine and the machine of a run; nothing for a run without a machine.json."""
    if not (folder / "machine.json").exists():
        return []
    then = store.read_object(folder / "machine.json")
    here = json.loads(json.dumps(machine.describe()))
    return [key for key in ("cpu", "cores", "gpu") if then.get(key) != here.get(key)]


def add_blocks(run: Run, blocks: int | None = None, minutes: float | None = None) -> None:
    """Continue the undecided races of a run, up to the planned look at which the race nearest to a decision should be
    decided, or for at most `blocks` or `minutes`.

    The error budget that was spent stays spent (stats.race). Measures nothing where these blocks can hardly decide a
    race. Where a race for the winner has decided all that it goes on with, the blocks are for what it left open.
    """
    evidence = run.evidence
    races, raced = stopping.open_races(evidence), ""
    if not races and evidence.race == "winner":
        raced = "all"
        evidence = _granted(run, More(max_blocks=evidence.budget, race=raced))
        races = stopping.open_races(evidence)
    if not races:
        run.listener.tell("no race is open: more blocks would change no verdict")
        return
    nearest = min(races, key=lambda v: v.blocks_needed or 0)
    have = evidence.blocks(run.recipe.baseline, nearest.workload)
    needed = nearest.blocks_needed or 0
    limits = [] if blocks is None else [have + blocks]
    if minutes is not None:
        look = _granted(run, More(max_blocks=stats.next_look(needed), race=raced))
        limits.append(_within(evidence, stopping.racing(look) or (nearest.workload,), have, minutes))
    total = min(limits) if limits else stats.next_look(needed)
    more = More(max_blocks=total, race=raced)
    granted = _granted(run, more)
    if total >= stats.MOST_BLOCKS or total <= have or all(v.hopeless for v in stopping.open_races(granted)):
        many = f"about {needed - have} more" if needed < stats.MOST_BLOCKS else "too many"
        takes = evidence.minutes(nearest.workload, needed - have) if needed < stats.MOST_BLOCKS else None
        granted_words = f"; {total - have} can hardly suffice" if limits else ""
        run.listener.warn(f"{nearest.rule} would take {many} blocks{_about(takes)}{granted_words}")
        run.listener.warn("nothing was measured")
        return
    run.log(more)
    run.listener.tell(f"up to {counted(total - have, 'more block')}{_about(stopping.minutes(granted))}")
    for workload in run.recipe.workloads.values():
        race(run, workload)
        check_baseline(run)


def _granted(run: Run, more: More) -> Evidence:
    """The run's evidence, were these blocks granted."""
    return Evidence(run.plan, [*run.measurements, Measured(more)])


def _within(evidence: Evidence, workloads: Sequence[str], have: int, minutes: float) -> int:
    """The most blocks in all of which those after the first `have` take at most so many minutes."""

    def takes(total: int) -> float:
        known = stopping.minutes(evidence, workloads, total)
        if known is None:
            raise BadInput("how long a block of this run takes is not known", "give the number of blocks: --blocks")
        return known

    return have + bisect_right(range(have + 1, stats.MOST_BLOCKS), minutes, key=takes)


def _about(minutes: float | None) -> str:
    return "" if minutes is None else f", about {counted(max(round(minutes), 1), 'minute')}"


def execute(run: Run, forecasts: bool = True) -> None:
    """Measure everything, in the order of time. With `forecasts`, first say which variants will be slower and how long
    the run will take."""
    skip(run)
    takes = foretell(run) if forecasts else durations.Duration()
    survey(run)
    first, *others = run.recipe.workloads.values()
    with contextlib.closing(Field(run, first)) as field:
        make_ready(run, field.start)
        if left := durations.left(takes, durations.PREPARED):
            run.listener.tell(left)
        race(run, first, field)
    check_baseline(run)
    for workload in others:
        race(run, workload)
        check_baseline(run)
    store.write(run.folder / store.FINISHED, "")


def skip(run: Run) -> None:
    """Record which variants this machine cannot run, and why. The others are measured."""
    for name, lack in preflight.skipped(run.recipe).items():
        run.skip(name, lack.why, lack.hint)


def foretell(run: Run) -> durations.Duration:
    """Say how long the rest of a run will take, and warn of variants that will be slower. The run keeps its first
    forecast, to compare it with the measurements."""
    known = hashes.read(run.folder)
    sources = {"base": known.base, "adapter": known.adapter} if known else hashed(run.recipe)
    with build.bars(run.listener.progress) as hear:
        outlook = forecast.outlook(run.recipe, sources, run.store.root, hear)
    if not (run.evidence.forecasts or run.evidence.surveyed):
        for forecast_ in outlook.forecasts:
            run.log(forecast_.values, forecast_.variant, forecast_.workload)
        for line in outlook.warnings:
            run.listener.warn(line)
        if outlook.forecasts:
            run.listener.done("forecast", f"of {len(outlook.variants)} variants", outlook.seconds)
    takes = duration.expected(run.plan, outlook, run.store, run.evidence)
    run.listener.tell(durations.sentence(takes))
    return takes


def survey(run: Run) -> None:
    """Measure how fast this machine reads memory: once per run, with the run's threads, while nothing else runs."""
    if run.evidence.surveyed:
        return
    threads = run.recipe.measure.threads or machine.cores()
    try:
        with WorkerProcess(run.folder / "logs" / "bandwidth.log", threads) as child:
            run.log(child.ask(BandwidthJob(), 60))
    except WorkerFailed as error:
        run.listener.warn(f"memory bandwidth is not known: {error}")
