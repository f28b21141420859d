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
    from peftopt.records import Decision, Measurement, Model, Recipe

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
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Build every variant, measure it against the adapter, decide, and write the report."""
    from peftopt import runner
    from peftopt.console import Console

    console = Console(quiet)
    parsed, text = _recipe(recipe)
    prepared = runner.prepare(parsed, text, results, console, fresh)
    runner.execute(prepared)
    _conclude(prepared.folder, console, as_json)


@app.command()
def decide(run_folder: RunFolder = None, results: Results = Path("results"), as_json: AsJson = False) -> None:
    """Judge a run again from its files alone: no model, no GPU."""
    from peftopt.console import Console

    _conclude(_run_folder(run_folder, results), Console(), as_json)


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


def _preview_row(tensor: dict[str, Any]) -> list[str]:
    from peftopt.thresholds import format_value

    shape = "x".join(map(str, tensor["shape"]))
    return [tensor["name"], shape, tensor["dtype"], format_value("size", tensor["bytes"]), f"{tensor['ratio']:.2e}"]


@app.command()
def quantize(
    method: Annotated[str, typer.Option(help="int8, gptq or awq (any quantizer of `peftopt doctor`).")],
    model: ModelFolder,
    out: Out,
    calibration: Annotated[Path | None, typer.Option(help="JSON-lines prompts with answers (gptq, awq).")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter to keep apart on the quantized base.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per weight, where the method has a choice.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration rows to use.")] = None,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Quantize a model's weights to INT8 or, with GPTQ or AWQ, to 4 bits."""
    import dataclasses

    from peftopt import plugins

    known = {p.name: p for p in plugins.catalogue().values() if p.technique == "quantize"}
    if method not in known:
        raise BadInput(f"no quantizer named {method!r}", f"known: {', '.join(sorted(known))}")
    if known[method].calibrates and calibration is None:
        raise BadInput(f"{method} needs calibration texts", "add --calibration FILE.jsonl (rows like the real traffic)")
    given = {"bits": bits, "group_size": group_size, "samples": samples}
    params = {name: value for name, value in given.items() if value is not None}
    accepted = {f.name for f in dataclasses.fields(known[method].params)}
    for name in params.keys() - accepted:
        raise BadInput(
            f"{method} has no --{name.replace('_', '-')}", f"it takes: {', '.join(sorted(accepted)) or 'nothing'}"
        )
    texts = str(calibration) if calibration and known[method].calibrates else None
    _transform(method, params, _model(model, adapter), out, texts, seed, as_json)


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
    model: Annotated[list[Path], typer.Option(help="Model folder; repeat to compare, the first is the reference.")],
    prompts: Annotated[Path, typer.Option(help="JSON-lines prompts.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter on top of the first model, unmerged.")] = None,
    engine: Annotated[
        list[str],
        typer.Option(help="eager or compiled (any engine of `peftopt doctor`): one for all, or one for each model."),
    ] = ["eager"],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(help="Tokens every answer gets, exactly.")] = 32,
    batch: Annotated[int, typer.Option(help="Prompts per request.")] = 1,
    blocks: Annotated[int, typer.Option(help="Times that each model is measured, in random order.")] = 6,
    threads: Annotated[int, typer.Option(help="Threads per process; 0 = all cores.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Time one model, or several against the first in interleaved blocks."""
    from peftopt import oneshot, plugins
    from peftopt.console import Console
    from peftopt.records import Model

    known = [p.name for p in plugins.catalogue().values() if p.kind == "engine"]
    for name in engine:
        if name not in known:
            raise BadInput(f"no engine named {name!r}", f"known: {', '.join(known)}")
    if len(engine) not in (1, len(model)):
        raise BadInput(f"{len(engine)} engines for {len(model)} models", "give one --engine, or one for each --model")
    engines = engine if len(engine) > 1 else engine * len(model)
    models = [Model(str(m), (str(adapter),) if adapter and n == 0 else ()) for n, m in enumerate(model)]
    arms = [
        oneshot.Arm(f"{n + 1} {Path(m.path).name}{' + adapter' * bool(m.adapters)}, {runs}", m, runs)
        for n, (m, runs) in enumerate(zip(models, engines, strict=True))
    ]
    found = oneshot.bench(arms, str(prompts), new_tokens, batch, blocks, threads)
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
    from peftopt.rules import FEWEST_FOR_P95
    from peftopt.thresholds import format_value

    n, ratio = found["p50_ms"].n, found["ratio"]
    return [
        found["name"],
        f"{ratio.estimate:.2f}x ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else "reference",
        f"{found['p50_ms'].estimate:.0f}",
        f"{found['p95_ms'].estimate:.0f}" if n >= FEWEST_FOR_P95 else "too few requests",
        f"{found['ttft_ms'].estimate:.0f}",
        f"{found['tpot_ms'].estimate:.1f}",
        f"{found['cpu_ms'].estimate:.0f}",
        f"{found['throughput'].estimate:.1f}",
        format_value("memory", found["peak_memory_bytes"]),
        f"{found['model_loading_time']:.1f}",
        str(n),
    ]


# ---- around it -----------------------------------------------------------------------------------


@app.command()
def check(recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")], results: Results = Path("results")) -> None:
    """Say everything that is wrong with a recipe and its files, and what it would do; runs nothing."""
    from peftopt import machine, plugins, preflight, store
    from peftopt import plan as planning
    from peftopt.console import Console

    parsed, _ = _recipe(recipe)
    preflight.check(parsed)
    store.Store(results.resolve()).check_writable()
    console = Console()
    sources = {"base": "", "adapter": "", "calibration": ""}
    plan = planning.plan(parsed, sources, machine.versions())
    console.say(f"{recipe}: {len(parsed.variants)} variants, {len(plan.builds)} artifacts to build or reuse")
    for variant in parsed.variants.values():
        chain = [step.plugin for step in variant.steps] or ["base + adapter"]
        lacking = [m for s in (*variant.steps, variant.engine) for m in plugins.missing(plugins.catalogue()[s.plugin])]
        note = f"  needs {', '.join(lacking)}: pip install 'peftopt[quantize]'" if lacking else ""
        mark = "  (baseline)" if variant.name == parsed.baseline else ""
        console.say(f"  {variant.name:<16} {' -> '.join(chain)}, on {variant.engine.plugin}{mark}{note}")


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The recipe to write; must not exist.")] = Path("recipe.yaml"),
    like: Annotated[str, typer.Option(help="Start from: chat-gpu, bulk-cpu, many-adapters, quick or demo.")] = "quick",
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
    from peftopt import machine, plugins
    from peftopt.console import Console

    found = machine.describe()
    state = {p.name: plugins.missing(p) for p in plugins.catalogue().values()}
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
        if any(state.values()):
            console.say("the quantizers' libraries come with: pip install 'peftopt[quantize]'")
    if state["eager"] or state["merge"]:
        raise typer.Exit(ENVIRONMENT)


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


def _run_folder(given: Path | None, results: Path) -> Path:
    """The run the user names, or the newest one."""
    if given is not None:
        return given
    runs = sorted(f for f in (results / "runs").glob("*") if (f / "plan.json").exists())
    if not runs:
        raise BadInput(f"no runs in {results / 'runs'}", "run a recipe first: peftopt run RECIPE")
    return runs[-1]


def _conclude(folder: Path, console: Any, as_json: bool) -> None:
    """Decide from the run folder's files, write the reports, print the table, exit with the outcome."""
    from peftopt import render, store
    from peftopt.decide import decide as judge

    plan = store.read_plan(folder / "plan.json")
    measurements = store.read(folder / "measurements.jsonl", console.warn)
    decision: Decision = judge(plan, measurements, json.loads(_read(folder / "machine.json")))
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
        **({"adapter": f"{model.adapters[0]}, kept apart"} if found["model"]["adapters"] else {}),
    }
    _print(f"wrote {out}", lines, found, as_json)


def _certified(found: dict[str, Any]) -> dict[str, str]:
    if "certificate" not in found:
        return {"weights": "all finite"}
    from peftopt.merging import certificate

    return {"certificate": certificate.summary(found["certificate"])}


def _print(title: str, lines: dict[str, str], found: dict[str, Any], as_json: bool) -> None:
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
