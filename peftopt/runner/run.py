"""A run: its folder, what it knows so far, and the workers that measure its variants."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol

from peftopt import corpus, environments, identity, plugins, store
from peftopt.corpus import Row
from peftopt.decision.evidence import Evidence
from peftopt.errors import WorkerFailed
from peftopt.forking import ForkServer
from peftopt.jobs import FactsJob, OpenJob, PrepareJob, WarmJob
from peftopt.measurements import NO_FACTS, SKIPPED, Failure, Launch, Measured, Retry, Values, as_json
from peftopt.models import importing
from peftopt.recipe import plan as planning
from peftopt.records import Measurement, Model, Plan, Recipe, Variant
from peftopt.runner import hashes, preflight
from peftopt.runner.process import WorkerProcess
from peftopt.runner.remote import Remote

RETRIED = ("killed", "died")
"""Reasons for one more try in a fresh process: another process or a driver may have caused the death."""


class Listener(Protocol):
    """Receives the progress of a run: the console, or a listener that shows nothing."""

    def done(self, step: str, what: str, seconds: float | None, note: str = "") -> None:
        """A step is over. `seconds` is None for a cached step."""

    def warn(self, text: str) -> None:
        """A warning: something makes the run weaker than intended, such as a failure."""

    def tell(self, text: str) -> None:
        """A text for the user that is not a warning."""

    def progress(
        self, title: str, total: int, unit: str
    ) -> contextlib.AbstractContextManager[Callable[[int, str], None]]:
        """A progress bar. The function it yields sets how many of `total` are done, and what is going on. `unit` is a
        plural ("blocks") or "%"."""


@dataclass
class Run:
    """One run's folder and its measurements so far. `log` alone adds a measurement."""

    plan: Plan
    store: store.Store
    folder: Path
    listener: Listener
    measurements: list[Measured] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    latest: tuple[int, Evidence] | None = None
    """The latest evidence, and the number of measurements that it is made of."""
    remote: Remote | None = None
    """Where machines share artifacts, if anywhere."""

    def log(self, values: Values, variant: str = "", workload: str = "", launch: int = 0) -> None:
        """Add a measurement, in memory and on disk."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        measurement = Measured(values, variant, workload, launch, datetime.fromisoformat(at).timestamp())
        line = Measurement(measurement.probe, variant, workload, launch, as_json(values), at)
        with self.lock:
            store.append(self.folder / "measurements.jsonl", line)
            self.measurements.append(measurement)

    def fail(self, variant: str, stage: str, error: WorkerFailed) -> None:
        """Record that a stage failed for a variant, and warn of it."""
        self.log(Failure(stage=stage, reason=error.reason, detail=error.detail, hint=error.hint), variant)
        self.listener.warn(f"{variant}: {stage} failed, {error}")

    def skip(self, variant: str, why: str, hint: str) -> None:
        """Record that a variant is skipped, and warn of it."""
        skipped = Failure(stage="start", reason=SKIPPED, detail=why, hint=hint)
        self.log(skipped, variant)
        self.listener.warn(f"{variant} is {skipped.sentence}")

    def retry(self) -> None:
        """Try again what failed before the run stopped: the user may have removed the cause."""
        for variant, failure in list(self.evidence.failures.items()):
            self.log(Retry(), variant)
            if failure.reason != SKIPPED:
                self.listener.tell(f"{variant}: {failure.stage} failed before ({failure.reason}); trying again")

    @property
    def recipe(self) -> Recipe:
        """The recipe as it was planned."""
        return self.plan.recipe

    @property
    def evidence(self) -> Evidence:
        """The evidence so far: the same object until a measurement is added or the plan changes."""
        with self.lock:
            known = self.latest
            if known is None or known[0] != len(self.measurements) or known[1].plan is not self.plan:
                known = len(self.measurements), Evidence(self.plan, self.measurements)
                self.latest = known
            return known[1]

    def model(self, variant: Variant) -> Model:
        """The model that the variant's engine opens."""
        return self.artifact_model(self.plan.models[variant.name])

    def artifact_model(self, artifact_id: str) -> Model:
        """The model of an artifact. For planning.SOURCE, the recipe's base and adapter, unmerged."""
        return self.store.model(artifact_id, Model(self.recipe.base, (self.recipe.adapter,)))

    def alive(self) -> list[Variant]:
        """The variants that have not failed, in the recipe's order."""
        failed = self.evidence.failures
        return [v for v in self.recipe.variants.values() if v.name not in failed]


class Planned(NamedTuple):
    """A recipe's plan, the hash of what it measures (`key`), and the hashes of its inputs (`hashed`)."""

    plan: Plan
    key: str
    sources: Mapping[str, str]


def hashed(recipe: Recipe) -> Mapping[str, str]:
    """The hashes of a recipe's base, adapter and calibration rows, "" for none, and of the folders that its parameters
    name: every file is read. Raises BadInput for a base with weights that no training leaves behind, and for a file
    that is not what was downloaded."""
    preflight.check_weights(Path(recipe.base))
    named = {folder for variant in recipe.variants.values() for folder in hashes.folders(variant).values()}
    return {
        **{f"{planning.FOLDER}{folder}": identity.of_folder(folder) for folder in sorted(named)},
        "base": identity.of_folder(Path(recipe.base)),
        "adapter": identity.of_folder(Path(recipe.adapter)),
        "calibration": identity.of_file(corpus.calibration_file(recipe.calibration)) if recipe.calibration else "",
    }


def planned(recipe: Recipe) -> Planned:
    """The recipe's plan for its files as they are now. Raises BadInput for files that cannot work."""
    preflight.check(recipe)
    sources = hashed(recipe)
    plan = planning.plan(recipe, sources, environments.versions())
    return Planned(plan, identity.of_value([asdict(plan), sources, _content(recipe)])[:8], sources)


def _content(recipe: Recipe) -> list[str]:
    """Hashes of the prompts: the same recipe over other rows is another run."""
    files = {w.prompts for w in recipe.workloads.values()}
    files |= {recipe.quality.prompts} if recipe.quality else set()
    return [identity.of_file(Path(f)) for f in sorted(files)]


def check_baseline(run: Run) -> None:
    """Raises WorkerFailed where the baseline failed: without it, there is nothing to compare with."""
    failure = run.evidence.failures.get(run.recipe.baseline)
    if failure:
        raise WorkerFailed(
            f"the baseline {run.recipe.baseline} could not be measured",
            f"{failure.stage} failed, {failure.reason}: {failure.detail}",
            failure.hint,
        )


def try_twice(run: Run, variant: str, stage: str, attempt: Callable[[], None]) -> bool:
    """Run an attempt; after a kill, once more in a fresh process. Records a failure. Returns whether it succeeded."""
    for last in (False, True):
        try:
            attempt()
            return True
        except WorkerFailed as error:
            if last or not error.reason.startswith(RETRIED):
                run.fail(variant, stage, error)
                return False
            run.listener.warn(f"{variant}: {error}; trying once more")
    return False


@contextlib.contextmanager
def worker(
    run: Run, variant: Variant, why: str, threads: int, forks: ForkServer | None = None
) -> Iterator[WorkerProcess]:
    """A fresh worker that has imported what the variant's engine needs: a copy of `forks` where that has it."""
    cache = run.store.cache(run.plan.models[variant.name])
    log = run.folder / "logs" / f"{why}-{variant.name}.log"
    plugin, model = plugins.catalogue()[variant.engine.plugin], run.model(variant)
    ours = plugin.environment == environments.MAIN and not plugin.serves
    forks = forks if ours and importing.packing(Path(model.path)) not in importing.UNPACKERS else None
    with WorkerProcess(log, threads, cache, environments.interpreter(plugin), forks) as child:
        child.ask(PrepareJob(plugin=variant.engine.plugin, model=model), run.recipe.measure.deadline_s)
        yield child
        with contextlib.suppress(WorkerFailed):  # the reason of a dead worker is recorded already
            facts = child.ask(FactsJob(), 30)
            if facts != NO_FACTS:
                run.log(replace(facts, why=facts.why or why), variant.name)


def load(run: Run, variant: Variant, child: WorkerProcess) -> Launch:
    """Load the variant's model into a worker."""
    engine = variant.engine
    proposes = any(step.params.get("answers") for step in variant.policies)
    answered = [row for row in corpus.calibration(run.recipe.calibration if proposes else None) if row.expected]
    job = OpenJob(
        plugin=engine.plugin,
        model=run.model(variant),
        params=engine.params,
        policies=variant.policies,
        rows=tuple(answered),
    )
    return child.ask(job, run.recipe.measure.deadline_s)


def warm(run: Run, child: WorkerProcess, rows: Sequence[Row], batch: int, new_tokens: int, timed: bool = True) -> None:
    """Let a worker's engine compile for batches of these rows."""
    job = WarmJob(rows=tuple(rows), batch=batch, new_tokens=new_tokens, timed=timed)
    child.ask(job, run.recipe.measure.deadline_s)
