"""The command line. Each verb parses, calls one function, prints. Heavy imports stay inside the verbs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftopt import __version__
from peftopt.errors import (
    ACCEPTED,
    BAD_INPUT,
    BUG,
    ENVIRONMENT,
    INCONCLUSIVE,
    INTERRUPTED,
    REJECTED,
    BadInput,
    PeftoptError,
)

if TYPE_CHECKING:
    from peftopt.client import Target
    from peftopt.console import Console
    from peftopt.lifecycle import Prompts
    from peftopt.records import Decision, Measurement, Model, Plugin, Recipe

app = typer.Typer(
    help="Make a PEFT model fast in production: merge, quantize, compile, benchmark, decide.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 accepted or done, 1 rejected, 2 bad input, 3 inconclusive, 4 environment, 5 bug, "
    "130 interrupted.",
)

EXIT = {"accepted": ACCEPTED, "rejected": REJECTED, "inconclusive": INCONCLUSIVE, "not judged": ENVIRONMENT}

ONE_GB = 10**9

Results = Annotated[Path, typer.Option(help="Folder of artifacts and runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable output on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
BaseFolder = Annotated[Path, typer.Option("--base", help="Folder of the base model (safetensors).")]
ModelFolder = Annotated[Path, typer.Option("--model", help="Folder of a model (safetensors).")]
Out = Annotated[Path, typer.Option("--out", help="New folder to write; it appears whole or not at all.")]
RunFolder = Annotated[Path | None, typer.Argument(help="A folder below results/runs; the newest by default.")]


# ---- the whole job -------------------------------------------------------------------------------


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML); `peftopt new` writes one.")],
    results: Results = Path("results"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start a new run, do not go on with an unfinished one.")
    ] = False,
    more: Annotated[
        bool, typer.Option("--more", help="Add blocks to the last run of this recipe, if it is undecided.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Build every variant, measure it against the adapter, decide, and write the report."""
    from peftopt import runner
    from peftopt.console import Console

    console = Console(quiet)
    parsed, text = _recipe(recipe)
    prepared = runner.prepare(parsed, text, results, console, fresh, more)
    if more and (prepared.folder / "decision.json").exists():
        runner.add_blocks(prepared)
    else:
        runner.execute(prepared)
    _conclude(prepared.folder, console, as_json)


@app.command()
def decide(
    run_folder: RunFolder = None,
    results: Results = Path("results"),
    recipe: Annotated[
        Path | None,
        typer.Option(help="Judge by the thresholds of this recipe, changed since; the newest run of its name."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a run again from its files alone: no model, no GPU."""
    from peftopt.console import Console

    parsed = _recipe(recipe)[0] if recipe else None
    _conclude(_run_folder(run_folder, results, parsed.name if parsed else ""), Console(), as_json, parsed)


@app.command()
def report(run_folder: RunFolder = None, results: Results = Path("results")) -> None:
    """Write a run's reports again from decision.json and its measurements, and print the Markdown one."""
    from peftopt import store
    from peftopt.console import Console

    folder = _run_folder(run_folder, results)
    console = Console()
    _write_reports(folder, store.read(folder / "measurements.jsonl", console.warn))
    print(_read(folder / "report.md"))
    console.err.print(f"report: {folder / 'report.html'}", soft_wrap=True)


# ---- one technique -------------------------------------------------------------------------------


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
        typer.Option(help="blocks (while streaming), or full (the saved model's predictions too). [over 1 GB: blocks]"),
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

    folders, weights = zip(*map(_weighted, adapter), strict=True)
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
        _transform("merge", params, model, out, str(prompts) if prompts else None, 0, as_json)


def _weighted(text: str) -> tuple[str, float]:
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
    from peftopt import oneshot
    from peftopt.console import Console
    from peftopt.thresholds import format_value

    found = oneshot.preview("merge", params, model)
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
    type_: Annotated[str, typer.Option("--type", metavar="TYPE", help="gguf: q4_k_m, q4_1, q8_0, bf16, … .")] = "",
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Quantize a model's weights to 8 or 4 bits, by the library that is alive for each method, and open the result."""
    from peftopt import plugins
    from peftopt.reading import nearest

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
    _transform(method, params, _model(model, adapter), out, calibration or None, seed, as_json)


def _params(plugin: Plugin, options: dict[str, str], settings: Sequence[str]) -> dict[str, Any]:
    """A plug-in's parameters from its options and from `name=value`. Raises BadInput for what it does not take."""
    import typing

    from peftopt.reading import nearest

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
    as_json: AsJson = False,
) -> None:
    """torch.compile a model and keep the compile cache beside it; says what cold and warm starts cost."""
    from peftopt import corpus, oneshot, preflight

    preflight.check_base(model, quantized=True)
    params: dict[str, Any] = {}
    if workload is not None:
        recipe, _ = _recipe(workload)
        steps = [v.engine for v in recipe.variants.values() if v.engine.plugin == "compiled"]
        params = dict(steps[0].params) if steps else {}
        threads = threads or recipe.measure.threads
        loads = [
            oneshot.Traffic(corpus.read(w.prompts, w.slice), w.batch, w.new_tokens) for w in recipe.workloads.values()
        ]
    else:
        ours = [corpus.Row("compile", ({"role": "user", "content": "Say hello."},))]
        rows = corpus.read(str(prompts)) if prompts else ours
        loads = [oneshot.Traffic(rows, b, new_tokens) for b in batch]
    served, others = (adapter or [])[:1], (adapter or [])[1:]
    opened = _model(model, served[0] if served else None)
    found = oneshot.compile_model(opened, params, loads, threads, list(map(str, others)))
    _print(f"compiled {model}", _compile_lines(found), found, as_json)


def _compile_lines(found: dict[str, Any]) -> dict[str, str]:
    from peftopt.thresholds import format_value

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
        list[str], typer.Option(help="eager, compiled or llamacpp (see `peftopt doctor`); one for all, or one a model.")
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
    from peftopt import oneshot, plugins, runner
    from peftopt.console import Console
    from peftopt.records import Model

    if more:
        if model or prompts or adapter:
            raise BadInput("--more goes on with a run's own models and prompts", "leave the other options out")
        console = Console()
        runner.add_blocks(runner.reopen(more, console), blocks, minutes)
        _conclude(more, console, as_json)
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
        oneshot.Arm(f"{n} {Path(m.path).name}{' + adapter' * bool(m.adapters)}, {runs}", m, runs)
        for n, (m, runs) in enumerate(zip(models, engines, strict=True), 1)
    ]
    found = oneshot.bench(arms, str(prompts), new_tokens, batch, blocks or 6, threads)
    for arm in found:
        if problem := arm.get("problem"):
            Console().warn(f"{arm['name']} {problem}: its reader may not understand this checkpoint; times mean little")
    if as_json:
        print(json.dumps(found, default=_plain))
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
    from peftopt.stats import fewest_for
    from peftopt.thresholds import format_value

    n, ratio = found["p50_ms"].n, found["ratio"]
    return [
        found["name"],
        f"{ratio.estimate:.2f}x ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else "reference",
        f"{found['p50_ms'].estimate:.0f}",
        f"{found['p95_ms'].estimate:.0f}" if n >= fewest_for(0.95) else "too few requests",
        f"{found['ttft_ms'].estimate:.0f}",
        f"{found['tpot_ms'].estimate:.1f}",
        f"{found['cpu_ms'].estimate:.0f}",
        f"{found['throughput'].estimate:.1f}",
        format_value("memory", found["peak_memory_bytes"]),
        f"{found['model_loading_time']:.1f}",
        str(n),
    ]


@app.command()
def load(
    target: Annotated[str, typer.Argument(help="URL of a server, or a recipe whose variants run on an endpoint.")],
    prompts: Annotated[Path | None, typer.Option(help="JSON-lines prompts; a recipe has its own.")] = None,
    model: Annotated[
        list[str],
        typer.Option(help="Served name of a model or an adapter, or NAME=WEIGHT; repeat for a mix. [the only one]"),
    ] = [],  # noqa: B006
    rate: Annotated[float, typer.Option(help="Requests a second that come in, whatever has gone out.")] = 1.0,
    arrivals: Annotated[str, typer.Option(help="poisson, gamma (burstier) or constant.")] = "poisson",
    burstiness: Annotated[float, typer.Option(help="Shape of gamma gaps: 1 is Poisson, less is burstier.")] = 0.3,
    concurrency: Annotated[int, typer.Option(help="Users in a closed loop instead: each asks when answered.")] = 0,
    trace: Annotated[
        Path | None, typer.Option(help='Replay JSON lines {"offset_s": 1.2, "id": "7"}, or with prompt_tokens.')
    ] = None,
    mix: Annotated[
        str, typer.Option(help="How requests fall on several names: uniform, round-robin or zipf.")
    ] = "uniform",
    duration: Annotated[float, typer.Option(help="Seconds in which requests come in.")] = 60.0,
    requests: Annotated[int, typer.Option(help="Send so many instead.")] = 0,
    new_tokens: Annotated[int, typer.Option(help="Tokens every answer gets, exactly where the server can.")] = 64,
    natural: Annotated[
        bool, typer.Option("--natural", help="Let answers end by themselves; new-tokens is a cap.")
    ] = False,
    slo: Annotated[
        list[str], typer.Option(help="Service level of each request, such as 'ttft <= 500 ms'; repeat for several.")
    ] = [],  # noqa: B006
    find: Annotated[
        bool, typer.Option("--find-rate", help="Search the highest rate at which 95 % of requests meet every --slo.")
    ] = False,
    protocol: Annotated[str, typer.Option(help="chat, completions, tgi or mii.")] = "chat",
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 120.0,
    slots: Annotated[
        int, typer.Option(help="Requests the engine runs at once (vLLM: max-num-seqs), for its fill.")
    ] = 0,
    patient: Annotated[bool, typer.Option("--patient", help="Do not stop a saturated run.")] = False,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Append the run to this measurements.jsonl.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Load a running server and say what its users would see: TTFT, TPOT, throughput, goodput, failures."""
    from peftopt import goodput, render
    from peftopt import load as loading
    from peftopt.console import Console

    try:
        slos = [goodput.slo(text) for text in slo]
    except ValueError as error:
        raise BadInput(f"--slo {error}") from error
    if find and not slos:
        raise BadInput("--find-rate needs a service level", "add --slo 'ttft <= 500 ms'")
    if find and (trace or concurrency):
        raise BadInput("--find-rate sets the rate itself", "leave out --trace and --concurrency")
    given = {"protocol": protocol, "key_env": api_key_env, "timeout_s": timeout}
    targets, file = _load_targets(target, given, prompts)
    console, outcomes = Console(quiet), []
    for name, where in targets.items():
        kind = loading.Traffic(
            **loading.read_traffic(file, trace),
            weights=dict(map(_weighted, model)) or ({where.model: 1.0} if where.model else {}),
            new_tokens=new_tokens,
            fixed=not natural,
            arrivals=arrivals,
            burstiness=burstiness,
            mix=mix,
            requests=requests,
            duration_s=duration,
            concurrency=concurrency,
            seed=seed,
        )
        kind.check(rate)
        title = name or "load"
        with console.progress(title, kind.expected(rate)) as show:
            if find:
                found = loading.find_rate(where, kind, rate, slos, show, lambda t: _tell_trial(console, t, slos))
            else:
                found = loading.run(where, kind, rate, show, patient)
        values = loading.as_json(found, slos)
        if out:
            loading.append(out, name or where.url, values)
        if as_json:
            print(json.dumps(render.as_json.plain({"variant": name, "url": where.url, **values}), allow_nan=False))
        else:
            console.table(render.load.HEADER, render.load.rows(values))
            console.pairs(title, render.load.lines(values, slots))
            for note in found.notes:
                console.warn(note)
        outcomes.append(loading.outcome(found, slos, find))
    raise typer.Exit(max(outcomes, key=[ACCEPTED, INCONCLUSIVE, REJECTED, ENVIRONMENT, INTERRUPTED].index))


def _load_targets(target: str, given: dict[str, Any], prompts: Path | None) -> tuple[dict[str, Any], str | None]:
    """Variant name -> where it is served, and the prompts to send there."""
    from peftopt.client import Target

    if "://" in target or not Path(target).exists():
        return {"": Target(target, **given)}, str(prompts) if prompts else None
    recipe, _ = _recipe(Path(target))
    served = {v.name: v.engine.params for v in recipe.variants.values() if v.engine.plugin == "endpoint"}
    if not served:
        raise BadInput(f"{target} has no variant on a server", "add one: served: [{engine: {endpoint: {url: …}}}]")
    found = {
        name: Target(p["url"], p["protocol"], p["model"], p["api_key_env"], p["timeout_s"])
        for name, p in served.items()
    }
    return found, str(prompts or recipe.workloads[recipe.minimize.workload].prompts)


def _tell_trial(console: Any, trial: Any, slos: Any) -> None:
    from peftopt import goodput

    share = goodput.attained(trial.played.requests, slos)
    why = f", stopped: {trial.played.stopped}" if trial.played.stopped else ""
    word = "holds" if trial.held else "does not hold"
    console.done(
        "rate",
        f"{trial.rate:.3g}/s {word}: {share.estimate:.1%} of {share.n}{why}",
        max((r.done for r in trial.played.requests), default=0.0),
    )


@app.command()
def serve(
    base: BaseFolder,
    adapter: Annotated[list[str], typer.Option(help="Adapter folder, or NAME=FOLDER; repeat for several.")] = [],  # noqa: B006
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 8000,
    slots: Annotated[int, typer.Option(help="Adapters in one batch (vLLM: max-loras). [all of them]")] = 0,
    compile_: Annotated[bool, typer.Option("--compile", help="Let vLLM compile the model: a slower start.")] = False,
    prefix_caching: Annotated[bool, typer.Option("--prefix-caching", help="Keep prompts' keys and values.")] = False,
    args: Annotated[str, typer.Option(help="More of `vllm serve`'s own options, as on its command line.")] = "",
) -> None:
    """Serve a base and its adapters with vLLM until Ctrl-C, as the engine `vllm` does: for load and canary."""
    import os

    from peftopt import environments, preflight
    from peftopt.console import Console
    from peftopt.engines import vllm
    from peftopt.records import Model

    preflight.check_base(base, quantized=True)
    named = dict(_named(text) for text in adapter)
    if len(named) < len(adapter) or vllm.BASE in named:
        raise BadInput(f"two adapters, or an adapter and the base ({vllm.BASE}), have one name", "give NAME=FOLDER")
    for folder in named.values():
        preflight.check_adapter(folder, base, [])
    model = Model(str(base.resolve()), tuple(map(str, named.values())))
    params = vllm.Params(compile=compile_, prefix_caching=prefix_caching, max_loras=slots, args=args)
    python = environments.python(vllm.ENVIRONMENT)
    vllm.check_port(port)
    command, variables = vllm.command(model, params, port, tuple(named), python)
    Console().say(f"http://127.0.0.1:{port} will serve {', '.join([vllm.BASE, *named])}; Ctrl-C ends it")
    os.execve(command[0], command, {**os.environ, **variables})


@app.command()
def canary(
    url: Annotated[str, typer.Argument(help="URL of a server with several adapters.")],
    prompts: Annotated[Path, typer.Option(help="JSON-lines prompts on which the models should differ.")],
    model: Annotated[list[str], typer.Option(help="Served names to tell apart, the base among them; repeat.")] = [],  # noqa: B006
    swap: Annotated[
        list[Path],
        typer.Option(help="Adapter folder; give two, to be loaded in turn under one name and path (vLLM)."),
    ] = [],  # noqa: B006
    fingerprints: Annotated[int, typer.Option(help="Prompts to use.")] = 8,
    rounds: Annotated[int, typer.Option(help="Times that all are asked at once, or that both are loaded.")] = 3,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 120.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Catch answers of the wrong adapter, by log-probabilities: in mixed batches, and after reloads (--swap)."""
    from peftopt import corpus
    from peftopt.client import Target
    from peftopt.console import Console

    if not swap and len(set(model)) < 2:
        raise BadInput("a canary tells models apart: it needs two or more", "add --model for the base and each adapter")
    if swap and len(swap) != 2:
        raise BadInput(f"--swap takes two adapters in turn, found {len(swap)}", "give --swap FOLDER --swap OTHER")
    rows = corpus.read(str(prompts))
    console, target = Console(quiet), Target(url, key_env=api_key_env, timeout_s=timeout)
    outcomes = []
    if len(set(model)) > 1:
        asked = {row.id: row.messages for row in rows[:fingerprints]}
        outcomes.append(_watch_mixed(console, target, list(dict.fromkeys(model)), asked, rounds, as_json))
    if swap:
        # The longest, since a prefix cache keeps whole blocks of tokens.
        rows = sorted(rows, key=lambda row: -sum(len(m["content"]) for m in row.messages))
        asked = {row.id: row.messages for row in rows[len(rows) // 10 :][:fingerprints]}
        outcomes.append(_watch_reloads(console, target, (swap[0], swap[1]), asked, rounds, as_json))
    raise typer.Exit(max(outcomes, key=(ACCEPTED, INCONCLUSIVE, ENVIRONMENT, REJECTED).index))


def _watch_mixed(
    console: Console, target: Target, names: list[str], prompts: Prompts, rounds: int, as_json: bool
) -> int:
    """Every model alone and in mixed batches, printed; the exit code."""
    from peftopt import canary as watching

    with console.progress("canary", watching.ALONE * len(names) + rounds) as show:
        found = watching.watch(target, names, prompts, rounds, show)
    if as_json:
        values = {"asked": found.asked, "failed": found.failed, "alike": found.alike, "noise": found.known.noise}
        print(json.dumps({**values, "wrong": [asdict(w) for w in found.wrong]}))
        return found.outcome
    noise = ", ".join(f"{name} {nats:.3f}" for name, nats in found.known.noise.items())
    lines = {"own noise": f"{noise} nats", "mixed answers": f"{found.asked}, of which {len(found.wrong)} wrong"}
    console.pairs("canary", lines)
    for pair in found.alike:
        console.warn(f"no prompt tells {pair[0]} and {pair[1]} apart: nothing can be said of them")
    if found.failed:
        console.warn(f"{found.failed} requests failed")
    for wrong in list(dict.fromkeys(map(str, found.wrong)))[:10]:
        console.say(wrong, "red")
    return found.outcome


def _watch_reloads(
    console: Console, target: Target, folders: tuple[Path, Path], prompts: Prompts, rounds: int, as_json: bool
) -> int:
    """Two adapters in turn under one name, printed; the exit code."""
    from peftopt import lifecycle, stats

    with console.progress("reloads", 2 + 2 * rounds) as show:
        found = lifecycle.live(target, folders, prompts, rounds, show)
    if as_json:
        print(json.dumps(asdict(found)))
        return found.outcome

    def times(seconds: Sequence[float]) -> str:
        return f"{1e3 * stats.median(seconds):.0f} ms (first {1e3 * seconds[0]:.0f}, last {1e3 * seconds[-1]:.0f})"

    console.pairs(
        "reloads",
        {
            "loads": f"{len(found.load_s)} of two adapters in turn, under one name and path",
            "load": times(found.load_s),
            "first request": times(found.first_s),
            "the same again": times(found.warm_s),
            "unload": times(found.unload_s),
            "answers": f"{found.asked}, of which {len(found.wrong)} of the weights before",
        },
    )
    if found.alike:
        console.warn("no prompt tells the two adapters apart: nothing can be said")
    if found.kept:
        console.say(f"still served after its unload: {found.kept} times", "red")
    for wrong in list(dict.fromkeys(map(str, found.wrong)))[:10]:
        console.say(wrong, "red")
    return found.outcome


def _named(text: str) -> tuple[str, Path]:
    """NAME=FOLDER, or a folder that is called by its own name."""
    name, equals, folder = text.rpartition("=")
    path = Path(folder if equals else text)
    return name or path.resolve().name, path


@app.command("import")
def import_(
    file: Annotated[
        list[Path], typer.Argument(help="Results of vllm bench serve, GuideLLM, AIPerf or lm-evaluation-harness.")
    ],
    variant: Annotated[str, typer.Option(help="The variant they measured. [the file's name]")] = "",
    out: Annotated[Path | None, typer.Option(help="Append them to this measurements.jsonl.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read other meters' results into the same records, and say what they lack."""
    from peftopt import load as loading
    from peftopt import meters, render
    from peftopt.console import Console

    console, raw = Console(), True
    for path in file:
        for found in meters.read(path):
            kept = loading.keep(out, found, variant or path.stem)
            raw = raw and bool(found.requests or found.values.get("samples"))
            if as_json:
                print(json.dumps(render.as_json.plain(kept), allow_nan=False))
                continue
            console.say(f"{path}: {found.source}, {found.title}", "bold")
            if found.requests:
                console.table(render.load.HEADER, render.load.rows(meters.as_loaded(found)))
            else:
                shown = found.reported or {k: v for k, v in found.values.items() if k != "samples"}
                console.pairs("as it reports", {k: v for k, v in shown.items() if v is not None})
            for what in found.lacks:
                console.warn(f"it lacks {what}")
    raise typer.Exit(ACCEPTED if raw else INCONCLUSIVE)


# ---- around it -----------------------------------------------------------------------------------


@app.command()
def check(recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")], results: Results = Path("results")) -> None:
    """Say everything that is wrong with a recipe and its files, and what it would do; runs nothing."""
    from peftopt import environments, plugins, preflight, store
    from peftopt import plan as planning
    from peftopt.console import Console

    parsed, _ = _recipe(recipe)
    preflight.check(parsed)
    store.Store(results.resolve()).check_writable()
    console = Console()
    sources = {"base": "", "adapter": "", "calibration": ""}
    plan = planning.plan(parsed, sources, environments.versions())
    console.say(f"{recipe}: {len(parsed.variants)} variants, {len(plan.builds)} artifacts to build or reuse")
    for variant in parsed.variants.values():
        chain = [step.plugin for step in (*variant.steps, *variant.policies)] or ["base + adapter"]
        steps = (*variant.steps, variant.engine)
        needs = [environments.lacking(plugins.catalogue()[s.plugin]) for s in steps]
        note = "".join(f"  needs {', '.join(what)}: {how}" for what, how in _once(needs))
        mark = "  (baseline)" if variant.name == parsed.baseline else ""
        console.say(f"  {variant.name:<16} {' -> '.join(chain)}, on {variant.engine.plugin}{mark}{note}")


def _once(needs: list[tuple[list[str], str]]) -> list[tuple[list[str], str]]:
    """What is lacking, each said once."""
    return [need for n, need in enumerate(needs) if need[0] and need not in needs[:n]]


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The recipe to write; must not exist.")] = Path("recipe.yaml"),
    like: Annotated[
        str, typer.Option(help="quick, demo, cpu-fastest, bulk-cpu, chat-gpu, many-adapters or limits.")
    ] = "quick",
    base: Annotated[str, typer.Option(help="Base model folder, as the recipe should name it.")] = "",
    adapter: Annotated[str, typer.Option(help="Adapter folder.")] = "",
    prompts: Annotated[str, typer.Option(help="Evaluation prompts (JSON lines).")] = "",
) -> None:
    """Write a recipe to start from."""
    from peftopt import store

    folder = Path(__file__).parent / "recipes"
    starters = {f.stem: f for f in sorted(folder.glob("*.yaml")) if f.stem != "tradeoffs"}
    if like not in starters:
        raise BadInput(f"no starter named {like!r}", f"known: {', '.join(starters)}")
    if file.exists():
        raise BadInput(f"{file} exists already", "choose another name")
    text = _adapt(starters[like].read_text(encoding="utf-8"), base, adapter, prompts)
    try:
        store.write(file, text)
    except OSError as error:
        raise BadInput(f"cannot write {file}: {error.strerror}", "choose another place") from error
    print(f"wrote {file}; next: edit it, then `peftopt check {file}` and `peftopt run {file}`")


def _adapt(text: str, base: str, adapter: str, prompts: str) -> str:
    """A starter recipe with the user's own paths in it."""
    import re

    for key, value in (("base", base), ("adapter", adapter), ("prompts", prompts)):
        if value:
            text = re.sub(rf"\b{key}: [^,}}\s]+", f"{key}: {value}", text)
    return text


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine is, which plug-ins can run here, and what to install for the others."""
    from peftopt import environments, machine, plugins
    from peftopt.console import Console

    found = machine.describe()
    needs = {p.name: environments.lacking(p) for p in plugins.catalogue().values()}
    state = {name: what for name, (what, _) in needs.items()}
    if as_json:
        print(json.dumps({**found, "missing": state}))
    else:
        console = Console()
        versions = found.pop("versions")
        gpu = found.pop("gpu") or ["none: measurements are of the CPU"]
        console.pairs("machine", {**found, "gpu": ", ".join(gpu)})
        console.pairs("versions", versions)
        console.say("plug-ins", "bold")
        rows = [
            [p.name, p.kind, "ready" if not state[p.name] else f"needs {', '.join(state[p.name])}", p.help]
            for p in plugins.catalogue().values()
        ]
        console.table(["name", "kind", "state", "what it does"], rows)
        for how in sorted({how for _, how in needs.values() if how}):
            console.say(f"install what is missing with: {how}")
    if state["eager"] or state["merge"]:
        raise typer.Exit(ENVIRONMENT)


environment_verbs = typer.Typer(no_args_is_help=True, help="Environments of the plug-ins whose pins need their own.")
app.add_typer(environment_verbs, name="env")
EnvironmentName = Annotated[str, typer.Argument(help="A name that `peftopt env list` shows.")]


@environment_verbs.command("list")
def env_list(as_json: AsJson = False) -> None:
    """The environments: which there are, which are installed, how large they are, what they are for."""
    from peftopt import environments
    from peftopt.console import Console
    from peftopt.thresholds import format_value

    found = environments.known()
    if as_json:
        print(json.dumps([asdict(e) for e in found], default=_plain))
        return
    about = {e.name: "about " * (e.state == "missing") + format_value("size", e.size_bytes) for e in found}
    state = {"missing": "not installed", "ready": "installed", "outdated": "outdated: install it with --force"}
    rows = [[e.name, state[e.state], about[e.name], e.help] for e in found]
    Console().table(["name", "state", "size", "what it is for"], rows)


@environment_verbs.command("install")
def env_install(
    name: EnvironmentName,
    force: Annotated[bool, typer.Option("--force", help="Build it again though it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build an environment in the user's cache; it appears whole or not at all."""
    from peftopt import environments
    from peftopt.console import Console

    with Console().working(f"env {name}") as tell:
        made = environments.install(name, force, tell)
    _print(f"environment {name}", {"at": str(made.path), "size": f"{made.size_bytes / 1e6:.0f} MB"}, made, as_json)


@environment_verbs.command("remove")
def env_remove(name: EnvironmentName) -> None:
    """Delete an environment."""
    from peftopt import environments

    print(f"removed {name}: {environments.remove(name) / 1e6:.0f} MB")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"peftopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


# ---- shared --------------------------------------------------------------------------------------


def _recipe(path: Path) -> tuple[Recipe, str]:
    from peftopt import plugins
    from peftopt import recipe as recipes

    text = _read(path)
    defaults = (Path(__file__).parent / "recipes" / "tradeoffs.yaml").read_text(encoding="utf-8")

    def read(name: str) -> str:
        return Path(name).read_text(encoding="utf-8")

    return recipes.parse(text, str(path.resolve()), plugins.catalogue(), defaults, read), text


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > 100_000_000:
            raise BadInput(f"{path} is {path.stat().st_size / 1e6:.0f} MB", "a text file is expected here")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text", "save it as UTF-8") from error


def _run_folder(given: Path | None, results: Path, recipe: str = "") -> Path:
    """The run the user names, or the newest one, of that recipe where one is named."""
    if given is not None:
        return given
    pattern = f"*-{recipe}-*" if recipe else "*"
    runs = sorted(f for f in (results / "runs").glob(pattern) if (f / "plan.json").exists())
    if not runs:
        what = f" of {recipe}" if recipe else ""
        raise BadInput(f"no runs{what} in {results / 'runs'}", "run a recipe first: peftopt run RECIPE")
    return runs[-1]


def _conclude(folder: Path, console: Any, as_json: bool, recipe: Recipe | None = None) -> None:
    """Decide from the run folder's files, write the reports, print the table, exit with the outcome; by the thresholds
    of another recipe where one is given."""
    from dataclasses import replace

    from peftopt import plan as planning
    from peftopt import render, store
    from peftopt.decide import decide as judge

    plan = store.read_plan(folder / "plan.json")
    changed = planning.changes(plan.recipe, recipe) if recipe else []
    plan = planning.rejudged(plan, recipe) if recipe else plan
    measurements = store.read(folder / "measurements.jsonl", console.warn)
    decision: Decision = judge(plan, measurements, json.loads(_read(folder / "machine.json")))
    if changed:
        warning = f"judged by thresholds that were changed after the run: {', '.join(changed)}"
        decision = replace(decision, warnings=(warning, *decision.warnings))
    store.write(folder / "decision.json", render.as_json.render(decision))
    _write_reports(folder, measurements)
    if as_json:
        print(_read(folder / "decision.json"))
    else:
        header, rows = render.table.rows(decision, compact=True)
        console.table(header, rows, [v.outcome for v in decision.variants])
        for warning in decision.warnings:
            console.warn(warning)
        console.say(decision.sentence, "bold")
        console.say(f"report: {folder / 'report.html'}")
    raise typer.Exit(EXIT[decision.outcome])


def _write_reports(folder: Path, measurements: Sequence[Measurement]) -> None:
    """Every report is rendered from decision.json as it is on disk, so that a later `report` gives the same bytes."""
    from peftopt import render, store

    decision = render.as_json.decision_from_json(_read(folder / "decision.json"))
    for name, text in render.reports(decision, measurements).items():
        store.write(folder / name, text)


def _model(base: Path, adapter: Path | None) -> Model:
    from peftopt.records import Model

    return Model(str(base), (str(adapter),) if adapter else ())


def _transform(
    plugin: str, params: dict[str, Any], model: Model, out: Path, calibration: str | None, seed: int, as_json: bool
) -> None:
    from peftopt import oneshot
    from peftopt.console import Console
    from peftopt.thresholds import format_value

    found = oneshot.transform(plugin, params, model, out, calibration, seed, Console().progress)
    lines = {
        "time": f"{found['seconds']:.1f} s",
        "size": format_value("size", found["size_bytes"]),
        "peak memory": format_value("memory", found["peak_memory_bytes"]),
        **_certified(found),
        **_provenance(found),
        **({"adapter": f"{model.adapters[0]}, kept apart"} if found["model"]["adapters"] else {}),
    }
    _print(f"wrote {out}", lines, found, as_json)


def _certified(found: dict[str, Any]) -> dict[str, str]:
    if "certificate" not in found:
        return {"weights": "all finite"}
    from peftopt.merging import certificate

    return {"certificate": certificate.summary(found["certificate"])}


def _provenance(found: dict[str, Any]) -> dict[str, str]:
    """What a quantizer's run should tell its user: what it calibrated on, what it chose, that its output works."""
    made = found.get("quantization") or {}
    lines = {}
    if used := made.get("calibration"):
        lines["calibration"] = f"{used['tokens']} tokens of {used['rows']} rows ({used['source']})"
    if notices := made.get("notices"):
        lines["notice"] = "; ".join(notices)
    return lines | ({"verified": made["verified"]} if "verified" in made else {})


def _print(title: str, lines: dict[str, str], found: Any, as_json: bool) -> None:
    from peftopt.console import Console

    if as_json:
        print(json.dumps(found, default=_plain))
    else:
        Console().pairs(title, lines)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every PeftoptError becomes its message and its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a CI timeout is an interrupt like Ctrl-C
    try:
        code = app(arguments, standalone_mode=False)
    except PeftoptError as error:
        from peftopt.console import Console

        Console().error(error)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001 (the last resort, so that a bug has its own exit code)
        code = _unexpected(error)
    if code == INTERRUPTED:  # typer may have made an exit code of the interrupt already
        print("interrupted; what was measured is kept, the same command goes on from there", file=sys.stderr)
    sys.exit(code or 0)


def _unexpected(error: Exception) -> int:
    """Usage errors are the user's (2); a broken pipe is the reader's; anything else is a bug (5)."""
    import traceback

    usage_error = typer.BadParameter.__base__  # typer carries its own click, and does not export the class
    if usage_error and isinstance(error, usage_error):
        error.show()  # type: ignore[attr-defined]
        return BAD_INPUT
    if isinstance(error, BrokenPipeError):
        return ACCEPTED
    traceback.print_exception(error)
    print("this is a bug in peftopt; please report it with the lines above", file=sys.stderr)
    return BUG


if __name__ == "__main__":
    main()
