"""The verbs as functions. Each does what the command of its name does, and raises what that prints as an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peftopt import corpus
from peftopt.api.opened import Run, open_run
from peftopt.decision.decide import decide as judge
from peftopt.decision.evidence import Evidence
from peftopt.jobs import Transformed, TransformJob
from peftopt.loadtest import runs
from peftopt.loadtest.protocols import Prompt, Target
from peftopt.loadtest.summary import LoadSummary
from peftopt.records import GENERIC, Decision, Json, Model
from peftopt.runner import judged, recipe_run, single
from peftopt.runner.build import Progress, Show
from peftopt.runner.run import Listener


def merge(
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    progress: Progress | None = None,
    **params: Json,
) -> Transformed:
    """Fold adapters into the base's weights, in a new folder; `params` are those of the transform `merge`.

    Raises BadInput for what cannot be merged, Rejected where the certificate failed.
    """
    adapters = (adapter,) if isinstance(adapter, str | Path) else tuple(adapter)
    model = Model(str(base), tuple(map(str, adapters)))
    return single.transform(TransformJob(plugin="merge", params=params, model=model, out=str(out)), progress)


def quantize(
    model: str | Path,
    method: str,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    calibration: str = "",
    seed: int = 0,
    progress: Progress | None = None,
    **params: Json,
) -> Transformed:
    """Quantize a model's weights by a quantizer (`peftopt list techniques`), in a new folder; `adapter` is kept apart.
    `calibration`: a file of rows like the traffic, or "generic". Raises as `merge` does."""
    job = TransformJob(
        plugin=method,
        params=params,
        model=Model(str(model), (str(adapter),) if adapter else ()),
        out=str(out),
        rows=corpus.calibration(calibration or None),
        seed=seed,
        calibration=GENERIC if calibration == GENERIC else "task",
    )
    return single.transform(job, progress)


def run(
    recipe: str | Path,
    results: str | Path = "results",
    *,
    listener: Listener | None = None,
    fresh: bool = False,
    artifacts: str = "",
) -> Run:
    """Build every variant of a recipe, measure it against the adapter, decide, and write the reports. An unfinished run
    of the same recipe goes on. `listener` hears of each step, warning and share of the way. `artifacts`: a folder or a
    bucket's URL where machines share what they build.

    Raises BadRecipe for a recipe with mistakes, BadInput for its files, WorkerFailed without a baseline.
    """
    parsed, text = judged.read_recipe(Path(recipe))
    hears = listener or judged.Silent()
    with recipe_run.prepare(parsed, text, Path(results), hears, fresh, artifacts=artifacts) as prepared:
        recipe_run.execute(prepared)
        judged.judge(prepared.folder, hears.warn)
    return open_run(prepared.folder)


def load(
    url: str,
    prompts: str | Path,
    *,
    model: str = "",
    protocol: str = "chat",
    rate: float = 1.0,
    users: int = 0,
    requests: int = 0,
    duration_s: float = 60.0,
    new_tokens: int = 64,
    slo: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> LoadSummary:
    """Load a server and say what its users would see: `rate` requests a second at random times, or `users` who each ask
    again when answered; so many `requests`, or for `duration_s` seconds. `slo`: service levels, "ttft <= 500 ms".

    Raises BadInput for what cannot be sent, MissingEnvironment where no server answers.
    """
    levels = runs.service_levels(slo)
    traffic = runs.Traffic(
        prompts={row.id: Prompt(messages=row.messages) for row in corpus.read(str(prompts))},
        weights={model: 1.0} if model else {},
        new_tokens=new_tokens,
        requests=requests,
        duration_s=duration_s,
        concurrency=users,
        seed=seed,
    )
    traffic.check(rate)
    with (progress or _silent)("load", traffic.expected(rate), "requests") as show:
        loaded = runs.run(Target(url, protocol=protocol, model=model), traffic, rate, show)
    return runs.summarized(loaded, levels)


@contextmanager
def _silent(title: str, total: int, unit: str) -> Iterator[Show]:
    yield lambda done, what: None


def decide(run: str | Path | Run) -> Decision:
    """Judge a run again from its files alone; nothing is written."""
    opened = run if isinstance(run, Run) else open_run(run)
    return judge(Evidence(opened.plan, list(opened.records)), opened.machine)
