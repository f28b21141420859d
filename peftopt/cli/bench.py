"""bench: time one model, or several against the first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import AsJson, app, conclude
from peftopt.errors import BadInput

if TYPE_CHECKING:
    from peftopt.records import Model
    from peftopt.runner.bench import Arm, Benched


@app.command()
def bench(
    model: Annotated[list[Path] | None, typer.Option(help="Model folder; repeat to compare with the first.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts.")] = None,
    adapter: Annotated[
        list[Path],
        typer.Option(
            help="Adapter on top of the first model, unmerged; with --soak, adapters to load and unload; repeat."
        ),
    ] = [],  # noqa: B006
    engine: Annotated[
        list[str],
        typer.Option(
            help="eager, compiled, llamacpp, openvino, … (see `peftopt doctor`); one for all, or one per model."
        ),
    ] = ["eager"],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(help="Tokens of every answer, exactly.")] = 32,
    batch: Annotated[int, typer.Option(help="Prompts per request.")] = 1,
    blocks: Annotated[
        int | None, typer.Option(help="Measurements of each model, in random order; with --more, at most.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads per process; 0 = all cores.")] = 0,
    more: Annotated[
        Path | None,
        typer.Option(help="Instead: add blocks to this undecided run of a recipe, as many as its plan needs."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="With --more: approximate time limit.")] = None,
    soak: Annotated[
        float | None,
        typer.Option(help="Instead: load a server for this many minutes while adapters come and go, to find leaks."),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="With --soak: the base to start a server on.")] = None,
    url: Annotated[str, typer.Option(help="With --soak: a server that runs already, in place of --base.")] = "",
    users: Annotated[int, typer.Option(help="With --soak: concurrent users, who ask again when answered.")] = 4,
    out: Annotated[Path | None, typer.Option(help="With --soak: write the result to this JSON file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time one model, or several against the first, in interleaved blocks. Or add blocks to an undecided run. Or soak a
    server: a long load while adapters come and go."""
    from peftopt.cli.console import Console, print_json
    from peftopt.models import template
    from peftopt.models.hf import tokenizer_home
    from peftopt.runner import recipe_run
    from peftopt.runner.bench import time_in_turns

    if soak is not None:
        if model or more or len(engine) != 1:
            raise BadInput(
                "--soak takes one engine and no --model or --more", "name the base: --base DIR, or --url URL"
            )
        from peftopt.cli import soak as soaking

        soaking.soak(
            soaking.Options(
                soak, base, url, tuple(adapter), engine[0], prompts, users, new_tokens, threads, out, as_json
            )
        )
    if base or url or out:
        raise BadInput("--base, --url and --out go with --soak", "to time a model, name it: --model DIR")
    if more:
        if model or prompts or adapter:
            raise BadInput("--more goes on with a run's own models and prompts", "leave the other options out")
        console = Console()
        with recipe_run.reopen(more, console) as run:
            recipe_run.add_blocks(run, blocks, minutes)
            conclude(more, console, as_json)
    if not model or prompts is None:
        raise BadInput("bench needs --model and --prompts", "or --more RUN, to go on with an undecided run")

    arms = _arms(model, adapter, engine)
    for arm in arms:
        endless = template.endless(Path(arm.model.path), Path(tokenizer_home(arm.model)))
        if endless:
            Console().warn(endless)
    models = time_in_turns(arms, str(prompts), new_tokens, batch, blocks or 6, threads)
    for timed in models:
        if timed.problem:
            Console().warn(
                f"{timed.name} {timed.problem}: transformers may read this checkpoint wrongly, so its times mean little"
            )
    if as_json:
        print_json({"models": [_flat(timed) for timed in models]})
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
    Console().table(header, [_bench_row(timed) for timed in models])


def _arms(model: list[Path], adapter: list[Path], engine: list[str]) -> list[Arm]:
    """The models to time. Raises BadInput for unknown engines, and for another number of engines than of models."""
    from peftopt import plugins
    from peftopt.records import Model
    from peftopt.runner.bench import Arm

    if len(adapter) > 1:
        raise BadInput(
            f"{len(adapter)} adapters are given, and a model is timed with one on top", "give --adapter once"
        )
    known = [p.name for p in plugins.catalogue().values() if p.kind == "engine"]
    for name in engine:
        if name not in known:
            raise BadInput(f"no engine named {name!r}", f"known: {', '.join(known)}")
    engines = engine * len(model) if len(engine) == 1 else engine
    if len(engines) != len(model):
        raise BadInput(f"{len(engine)} engines for {len(model)} models", "give one --engine, or one for each --model")
    models = [Model(str(m), (str(adapter[0]),) if adapter and n == 0 else ()) for n, m in enumerate(model)]
    return [
        Arm(f"{n} {_title(m)}, {runs}", m, runs) for n, (m, runs) in enumerate(zip(models, engines, strict=True), 1)
    ]


def _title(model: Model) -> str:
    name = Path(model.path).name
    return f"{name} + adapter" if model.adapters else name


def _flat(timed: Benched) -> dict[str, object]:
    """A model's measurements in one flat mapping, with the facts of its launch and its memory peaks."""
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
