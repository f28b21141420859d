"""compile: apply torch.compile, and measure cold and warm starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftopt.cli.shared import AsJson, ModelFolder, app, model_of, params_of, print_lines
from peftopt.metrics import percent

if TYPE_CHECKING:
    from peftopt.runner.compile import Compiled, Start


@app.command("compile")
def compile_(
    model: ModelFolder,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="Adapter on top of the model, unmerged; repeat to measure the switch to the others."),
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option(help="A recipe: compile for the shapes of its workloads, with its engine's parameters."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts; by default, a built-in one.")] = None,
    batch: Annotated[list[int], typer.Option(help="Batch sizes to compile for; repeat the option.")] = [1],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(help="Tokens per answer.")] = 32,
    threads: Annotated[int, typer.Option(help="Threads per process; 0 = all cores.")] = 0,
    settings: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A parameter of the compiled engine, such as mode, cache_len, prompt_buckets, regions, fullgraph or "
            "dynamic; repeat for more.",
        ),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Apply torch.compile to a model, keep the compile cache beside it, and measure cold and warm starts."""
    from peftopt import corpus, plugins
    from peftopt.measurements import as_json as as_plain
    from peftopt.runner import judged, preflight
    from peftopt.runner.compile import Traffic, compile_model

    preflight.check_base(model, quantized=True)
    preflight.check_weights(model)
    params: dict[str, Any] = {}
    options = params_of(plugins.catalogue()["compiled"], {}, settings)
    if workload is not None:
        recipe, _ = judged.read_recipe(workload)
        steps = [v.engine for v in recipe.variants.values() if v.engine.plugin == "compiled"]
        params = dict(steps[0].params) if steps else {}
        threads = threads or recipe.measure.threads
        loads = [Traffic(corpus.read(w.prompts, w.slice), w.batch, w.new_tokens) for w in recipe.workloads.values()]
    else:
        ours = [corpus.Row("compile", ({"role": "user", "content": "Say hello."},))]
        rows = corpus.read(str(prompts)) if prompts else ours
        loads = [Traffic(rows, b, new_tokens) for b in batch]
    adapters = adapter or []
    others = adapters[1:]
    opened = model_of(model, adapters[0] if adapters else None)
    compiled = compile_model(opened, {**params, **options}, loads, threads, list(map(str, others)))
    print_lines(f"compiled {model}", _compile_lines(compiled), as_plain(compiled), as_json)


def _compile_lines(compiled: Compiled) -> dict[str, str]:
    from peftopt.metrics import format_value

    def start(it: Start) -> str:
        parts = {"imports": it.imports, "load": it.load, "graphs": it.graphs, "answers": it.answers}
        shown = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
        return f"{it.total:.1f} s to an answer in every shape ({shown})"

    facts = compiled.cold.facts
    per_shape = {
        f"batch {t.batch}, {t.new_tokens} tokens": (
            f"{t.tpot_ms:.1f} ms a token, eager {t.eager_tpot_ms:.1f}; "
            + (f"pays after {t.break_even:.0f} requests" if t.break_even is not None else "does not pay")
        )
        for t in compiled.traffic
    }
    return {
        "cold start": start(compiled.cold),
        "warm start": f"{start(compiled.warm)}, {compiled.cold.total / compiled.warm.total:.1f}x faster than cold",
        "eager start": start(compiled.eager),
        **per_shape,
        "against eager": f"KL {compiled.kl:.2g} nats a token, {percent(compiled.greedy_match)} of "
        f"{compiled.prompts} greedy answers the same",
        **{
            f"switch to {s.adapter}": f"{s.adapter_switch_time:.2f} s, {s.recompiles} recompiles, then "
            f"{s.first_answers_s:.1f} s to an answer in every shape"
            for s in compiled.switches
        },
        "graphs": f"{facts.graphs}, {facts.graph_breaks} graph breaks, {facts.recompiles} recompiles",
        "engine": "; ".join([*facts.log, *compiled.warm.facts.log]),
        "compile cache": f"{compiled.cache} ({format_value('size', compiled.cache_bytes)})",
    }
