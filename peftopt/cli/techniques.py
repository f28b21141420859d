"""One technique at a time: merge, quantize, compile, bench."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftopt.cli.shared import (
    AsJson,
    BaseFolder,
    ModelFolder,
    Out,
    app,
    conclude,
    plain,
    print_lines,
    read_recipe,
    transform,
)
from peftopt.errors import BadInput

if TYPE_CHECKING:
    from peftopt.records import Model, Plugin

ONE_GB = 10**9


@app.command()
def merge(
    base: BaseFolder,
    adapter: Annotated[
        list[str],
        typer.Option(help="Folder of a PEFT adapter (safetensors), or FOLDER=WEIGHT; repeat to merge several."),
    ],
    out: Annotated[Path | None, typer.Option(help="New folder to write; it appears whole or not at all.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32; the base's own by default.")] = "",
    certify: Annotated[
        str,
        typer.Option(help="blocks (while streaming) or full (the saved model's predictions too; default up to 1 GB)."),
    ] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="JSON-lines prompts for the full certificate; some of ours by default.")
    ] = None,
    merge_base: Annotated[
        str,
        typer.Option(
            help="For an adapter trained on a 4-bit base: full (the 16-bit weights), dequantized (what 4 bits left of "
            "them), or auto (both, and keep the one nearer to the adapter on its 4-bit base); in-place for packed "
            "weights that stay 4-bit."
        ),
    ] = "full",
    scheme: Annotated[str, typer.Option(help="The 4-bit scheme of that base: nf4 or fp4.")] = "nf4",
    combination: Annotated[
        str, typer.Option(help="How several LoRAs add up: cat (exactly), or linear, svd, ties, … as PEFT does.")
    ] = "cat",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change, tensor by tensor.")] = False,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Merge though the adapter names another base.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fold adapters into their base model, and certify that the result is the same model."""
    from peftopt import store
    from peftopt.records import Model

    folders, weights = zip(*map(weighted, adapter), strict=True)
    model = Model(str(base), folders)
    if not certify:
        certify = "blocks" if base.is_dir() and store.size(base) > ONE_GB and merge_base != "auto" else "full"
    params = {
        "dtype": dtype,
        "certify": certify,
        "weights": ",".join(map(str, weights)) if any(w != 1 for w in weights) else "",
        "combination": combination,
        "merge_base": merge_base,
        "scheme": scheme,
        "allow_base_mismatch": allow_base_mismatch,
    }
    if dry_run:
        _preview(params, model, as_json)
    elif out is None:
        raise BadInput("merge needs --out", "name a folder that does not exist yet, or ask for a --dry-run")
    else:
        transform("merge", params, model, out, str(prompts) if prompts else None, 0, as_json)


def weighted(text: str) -> tuple[str, float]:
    """`folder` or `folder=0.7`; a folder whose own name has an equals sign is taken as it is."""
    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return folder, float(weight)
    except ValueError as error:
        raise BadInput(f"--adapter {text}: {weight!r} is no weight", "write FOLDER=0.7") from error


def _preview(params: dict[str, Any], model: Model, as_json: bool) -> None:
    """What a merge would change, largest change first; tensors without a delta are called out."""
    from peftopt.cli.console import Console
    from peftopt.metrics import format_value
    from peftopt.runner import single

    found = single.preview("merge", params, model)
    if as_json:
        print(json.dumps(found))
        return
    ratio = {t["name"]: t["delta_norm"] / t["weight_norm"] if t["weight_norm"] else 0.0 for t in found}
    rows = [
        [
            t["name"],
            "x".join(map(str, t["shape"])),
            t["dtype"],
            format_value("size", t["bytes"]),
            f"{ratio[t['name']]:.2e}",
        ]
        for t in sorted(found, key=lambda t: -ratio[t["name"]])
    ]
    console = Console()
    console.table(["tensor", "shape", "dtype", "size", "delta / weight"], rows)
    total = sum(t["bytes"] for t in found)
    console.say(f"{len(found)} tensors of {format_value('size', total)} would change; nothing was written")
    if still := [t["name"] for t in found if not t["delta_norm"]]:
        console.warn(f"no delta at all in {len(still)} of {len(found)}: {', '.join(still[:3])}")


@app.command()
def quantize(
    method: Annotated[
        str, typer.Option(help="int8, w8a8, fp8, gptq, awq, bnb8, nf4: any quantizer of `peftopt doctor`.")
    ],
    model: ModelFolder,
    out: Out,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="JSON-lines prompts with answers, like the real traffic, for gptq, awq and w8a8; generic for some "
            "texts of ours.",
        ),
    ] = "",
    adapter: Annotated[Path | None, typer.Option(help="Adapter to keep apart on the quantized base.")] = None,
    bits: Annotated[str, typer.Option(metavar="N", help="Bits per weight, where the method has a choice.")] = "",
    group_size: Annotated[
        str, typer.Option(metavar="N", help="Weights that share a scale; by default the most that divide every layer.")
    ] = "",
    mixed: Annotated[
        str,
        typer.Option(
            metavar="SHARE", help="Share of the weights, such as 0.2, that may stay at 8 bits: the most sensitive."
        ),
    ] = "",
    keep: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Layers to leave alone, names or patterns with commas between; the output head always is.",
        ),
    ] = "",
    samples: Annotated[str, typer.Option(metavar="N", help="Calibration rows to use.")] = "",
    max_tokens: Annotated[str, typer.Option(metavar="N", help="Tokens at which each of them is cut.")] = "",
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="NAME=VALUE", help="Any other parameter of the method; repeat for more."),
    ] = [],  # noqa: B006
    type_: Annotated[
        str,
        typer.Option("--type", metavar="TYPE", help="gguf: q4_k_m, q8_0, bf16, …; openvino_ir: int8, int4, bf16, … ."),
    ] = "",
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Quantize a model's weights to 8 or 4 bits, by the library that is alive for each method, and open the result."""
    from peftopt import plugins
    from peftopt.recipe.reader import nearest

    known = {p.name: p for p in plugins.catalogue().values() if p.technique == "quantize"}
    if method not in known:
        raise BadInput(f"no quantizer named {method!r}", nearest(method, known))
    options = {"bits": bits, "group_size": group_size, "mixed": mixed, "keep": keep}
    options |= {"samples": samples, "max_tokens": max_tokens, "type": type_}
    params = _params(known[method], {name: value for name, value in options.items() if value}, settings)
    if known[method].calibrates and not calibration:
        raise BadInput(
            f"{method} needs calibration texts", "add --calibration FILE.jsonl (rows like the real traffic), or generic"
        )
    if calibration and not known[method].calibrates:
        raise BadInput(f"{method} needs no calibration texts", "leave --calibration out")
    transform(method, params, _model(model, adapter), out, calibration or None, seed, as_json)


def _params(plugin: Plugin, options: dict[str, str], settings: Sequence[str]) -> dict[str, Any]:
    """A plug-in's parameters from its options and from `name=value`. Raises BadInput for what it does not take."""
    import typing

    from peftopt.recipe.reader import nearest

    hints = typing.get_type_hints(plugin.params)
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or name in options:
            raise BadInput(f"--set {text}: write NAME=VALUE, each name once", f"names: {', '.join(hints)}")
        options = {**options, name: value}
    read: dict[type, Any] = {int: int, float: float, str: str, bool: {"true": True, "false": False}.__getitem__}
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in hints:
            raise BadInput(f"{plugin.name} has no parameter {name}", nearest(name, hints))
        try:
            values[name] = read[hints[name]](text)
        except (ValueError, KeyError) as error:
            wanted = {int: "a whole number", float: "a number", bool: "true or false"}[hints[name]]
            raise BadInput(
                f"{name}: {text!r} is not {wanted}", f"its default is {plugin.params().__dict__[name]}"
            ) from error
    try:
        plugin.params(**values)
    except ValueError as error:
        raise BadInput(f"{plugin.name}: {error}") from error
    return values


@app.command("compile")
def compile_(
    model: ModelFolder,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="Adapter on top of the model, unmerged; repeat it to measure switching to the others."),
    ] = None,
    workload: Annotated[
        Path | None, typer.Option(help="A recipe: warm the shapes of its workloads, with its engine's parameters.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON-lines prompts; one of ours by default.")] = None,
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
    """torch.compile a model and keep the compile cache beside it; says what cold and warm starts cost."""
    from peftopt import corpus, plugins
    from peftopt.runner import preflight, single

    preflight.check_base(model, quantized=True)
    params: dict[str, Any] = {}
    asked = _params(plugins.catalogue()["compiled"], {}, settings)
    if workload is not None:
        recipe, _ = read_recipe(workload)
        steps = [v.engine for v in recipe.variants.values() if v.engine.plugin == "compiled"]
        params = dict(steps[0].params) if steps else {}
        threads = threads or recipe.measure.threads
        loads = [
            single.Traffic(corpus.read(w.prompts, w.slice), w.batch, w.new_tokens) for w in recipe.workloads.values()
        ]
    else:
        ours = [corpus.Row("compile", ({"role": "user", "content": "Say hello."},))]
        rows = corpus.read(str(prompts)) if prompts else ours
        loads = [single.Traffic(rows, b, new_tokens) for b in batch]
    served, others = (adapter or [])[:1], (adapter or [])[1:]
    opened = _model(model, served[0] if served else None)
    found = single.compile_model(opened, {**params, **asked}, loads, threads, list(map(str, others)))
    print_lines(f"compiled {model}", _compile_lines(found), found, as_json)


def _compile_lines(found: dict[str, Any]) -> dict[str, str]:
    from peftopt.metrics import format_value

    def start(name: str) -> str:
        parts = ", ".join(f"{part} {found[name][part]:.1f}" for part in ("imports", "load", "graphs", "answers"))
        return f"{found[name]['total']:.1f} s to an answer in every shape ({parts})"

    cold, warm, facts = found["cold"], found["warm"], found["cold"]["facts"]
    per_shape = {
        f"batch {t['batch']}, {t['new_tokens']} tokens": (
            f"{t['tpot_ms']:.1f} ms a token, eager {t['eager_tpot_ms']:.1f}; "
            + (f"pays after {t['break_even']:.0f} requests" if t["break_even"] is not None else "does not pay")
        )
        for t in found["traffic"]
    }
    return {
        "cold start": start("cold"),
        "warm start": f"{start('warm')}, {cold['total'] / warm['total']:.1f}x faster than cold",
        "eager start": start("eager"),
        **per_shape,
        "against eager": f"KL {found['kl']:.2g} nats a token, {found['greedy_match']:.0%} of {found['prompts']} greedy "
        "answers the same",
        **{
            f"switch to {s['adapter']}": f"{s['adapter_switch_time']:.2f} s, {s['recompiles']} recompiles, then "
            f"{s['first_answers_s']:.1f} s to an answer in every shape"
            for s in found["switches"]
        },
        "graphs": f"{facts['graphs']}, {facts['graph_breaks']} graph breaks, {facts['recompiles']} recompiles",
        "engine": "; ".join([*facts["log"], *warm["facts"]["log"]]),
        "compile cache": f"{found['cache']} ({format_value('size', found['cache_bytes'])})",
    }


@app.command()
def bench(
    model: Annotated[
        list[Path] | None, typer.Option(help="Model folder; repeat to compare, the first is the reference.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON-lines prompts.")] = None,
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
    from peftopt.runner import recipe_run, single

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
        single.Arm(f"{n} {Path(m.path).name}{' + adapter' * bool(m.adapters)}, {runs}", m, runs)
        for n, (m, runs) in enumerate(zip(models, engines, strict=True), 1)
    ]
    for m in models:
        if why := template.endless(Path(m.path), Path(tokenizer_home(m))):
            Console().warn(why)
    found = single.bench(arms, str(prompts), new_tokens, batch, blocks or 6, threads)
    for arm in found:
        if problem := arm.get("problem"):
            Console().warn(f"{arm['name']} {problem}: its reader may not understand this checkpoint; times mean little")
    if as_json:
        print(json.dumps(found, default=plain))
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
    Console().table(header, [_bench_row(f) for f in found])


def _bench_row(found: dict[str, Any]) -> list[str]:
    from peftopt.metrics import format_value
    from peftopt.stats import fewest_for

    n, ratio = found["p50_ms"].n, found["ratio"]
    return [
        found["name"],
        f"{ratio.estimate:.2f}x ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else "reference",
        f"{found['p50_ms'].estimate:.0f}",
        f"{found['p95_ms'].estimate:.0f}" if n >= fewest_for(0.95) else "too few requests",
        f"{found['ttft_ms'].estimate:.0f}",
        f"{found['tpot_ms'].estimate:.1f}" if found["tpot_ms"].n else "-",
        f"{found['cpu_ms'].estimate:.0f}",
        f"{found['throughput'].estimate:.1f}",
        format_value("memory", found["peak_memory_bytes"]),
        f"{found['model_loading_time']:.1f}",
        str(n),
    ]


def _model(base: Path, adapter: Path | None) -> Model:
    from peftopt.records import Model

    return Model(str(base), (str(adapter),) if adapter else ())
