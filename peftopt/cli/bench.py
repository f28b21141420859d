"""bench: times of one model, or of several against the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import AsJson, app, conclude
from peftopt.errors import BadInput

if TYPE_CHECKING:
    from peftopt.records import Model
    from peftopt.runner.bench import Benched


@app.command()
def bench(
    model: Annotated[list[Path] | None, typer.Option(help="Model folder; repeat to compare with the first.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter on top of the first model, unmerged.")] = None,
    engine: Annotated[
        list[str],
        typer.Option(
            help="eager, compiled, llamacpp, openvino, … (see `peftopt doctor`); one for all, or one a model."
        ),
    ] = ["eager"],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(help="Tokens every answer gets, exactly.")] = 32,
    batch: Annotated[int, typer.Option(help="Prompts per request.")] = 1,
    blocks: Annotated[
        int | None, typer.Option(help="Times that each model is measured, in random order; with --more, at most.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads per process; 0 = all cores.")] = 0,
    more: Annotated[
        Path | None,
        typer.Option(help="Instead: add blocks to this undecided run of a recipe, as many as its planner asks for."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="With --more: about how long it may take.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time one model, or several against the first in interleaved blocks; or go on with an undecided run."""
    from peftopt import plugins
    from peftopt.cli.console import Console
    from peftopt.models import template
    from peftopt.models.hf import tokenizer_home
    from peftopt.records import Model
    from peftopt.runner import recipe_run
    from peftopt.runner.bench import Arm, time_in_turns

    if more:
        if model or prompts or adapter:
            raise BadInput("--more goes on with a run's own models and prompts", "leave the other options out")
        console = Console()
        recipe_run.add_blocks(recipe_run.reopen(more, console), blocks, minutes)
        conclude(more, console, as_json)
    if not model or prompts is None:
        raise BadInput("bench needs --model and --prompts", "or --more RUN, to go on with an undecided run")

    known = [p.name for p in plugins.catalogue().values() if p.kind == "engine"]
    for name in engine:
        if name not in known:
            raise BadInput(f"no engine named {name!r}", f"known: {', '.join(known)}")
    engines = engine * len(model) if len(engine) == 1 else engine
    if len(engines) != len(model):
        raise BadInput(f"{len(engine)} engines for {len(model)} models", "give one --engine, or one for each --model")
    models = [Model(str(m), (str(adapter),) if adapter and n == 0 else ()) for n, m in enumerate(model)]
    arms = [
        Arm(f"{n} {_title(m)}, {runs}", m, runs) for n, (m, runs) in enumerate(zip(models, engines, strict=True), 1)
    ]
    for m in models:
        endless = template.endless(Path(m.path), Path(tokenizer_home(m)))
        if endless:
            Console().warn(endless)
    timed = time_in_turns(arms, str(prompts), new_tokens, batch, blocks or 6, threads)
    for each in timed:
        if each.problem:
            Console().warn(
                f"{each.name} {each.problem}: transformers may read this checkpoint wrongly, so its times mean little"
            )
    if as_json:
        print(json.dumps([_flat(each) for each in timed]))
        return
    header = [
        "model",
        "against the first",
        "P50 ms",
        "P95 ms",
        "TTFT ms",
        "TPOT ms",
        "CPU ms",
        "tokens/s",
        "memory",
        "load s",
        "n",
    ]
    Console().table(header, [_bench_row(f) for f in timed])


def _title(model: Model) -> str:
    name = Path(model.path).name
    return f"{name} + adapter" if model.adapters else name


def _flat(timed: Benched) -> dict[str, object]:
    """What was measured of a model, facts of its launch and peaks of its memory among the rest."""
    from peftopt.measurements import as_json

    rest = {name: value for name, value in as_json(timed).items() if name not in ("launch", "memory")}
    return {**as_json(timed.launch), **as_json(timed.memory), **rest}


def _bench_row(timed: Benched) -> list[str]:
    from peftopt.metrics import format_value
    from peftopt.stats import fewest_for

    n = timed.p50_ms.n
    ratio = timed.ratio
    peak = timed.memory.peak_memory_bytes
    return [
        timed.name,
        f"{ratio.estimate:.2f}x ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else "reference",
        f"{timed.p50_ms.estimate:.0f}",
        f"{timed.p95_ms.estimate:.0f}" if n >= fewest_for(0.95) else "too few requests",
        f"{timed.ttft_ms.estimate:.0f}",
        f"{timed.tpot_ms.estimate:.1f}" if timed.tpot_ms.n else "-",
        f"{timed.cpu_ms.estimate:.0f}",
        f"{timed.throughput.estimate:.1f}",
        "-" if peak is None else format_value("memory", peak),
        f"{timed.launch.model_loading_time:.1f}",
        str(n),
    ]
