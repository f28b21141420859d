"""Running servers: load, serve, canary, import."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftopt.cli.shared import AsJson, BaseFolder, Quiet, Results, app, read_recipe
from peftopt.cli.techniques import weighted
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, INTERRUPTED, REJECTED, BadInput

if TYPE_CHECKING:
    from peftopt.canary.reloads import Prompts
    from peftopt.cli.console import Console
    from peftopt.loadtest.client import Target
    from peftopt.loadtest.protocols import Prompt
    from peftopt.records import Recipe, Workload


@app.command()
def load(
    target: Annotated[
        str, typer.Argument(help="URL of a server, or a recipe: its variants that are servers, in turn.")
    ],
    prompts: Annotated[Path | None, typer.Option(help="JSON-lines prompts; a recipe has its own.")] = None,
    model: Annotated[
        list[str],
        typer.Option(
            help="Served name of a model or an adapter, or NAME=WEIGHT; repeat for a mix; by default the only one."
        ),
    ] = [],  # noqa: B006
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second that come in, whatever has gone out.", show_default="1, or the recipe's"),
    ] = None,
    arrivals: Annotated[str, typer.Option(help="poisson, gamma (burstier) or constant.")] = "poisson",
    burstiness: Annotated[float, typer.Option(help="Shape of gamma gaps: 1 is Poisson, less is burstier.")] = 0.3,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Users in a closed loop instead: each asks when answered.", show_default="the recipe's"),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help='Replay JSON lines {"offset_s": 1.2, "id": "7"}, or with prompt_tokens.')
    ] = None,
    mix: Annotated[
        str, typer.Option(help="How requests fall on several names: uniform, round-robin or zipf.")
    ] = "uniform",
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds in which requests come in.", show_default="60, or the recipe's requests"),
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Send so many instead.")] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens every answer gets, exactly where the server can.", show_default="64, or the recipe's"
        ),
    ] = None,
    natural: Annotated[
        bool | None,
        typer.Option(
            "--natural/--fixed",
            help="Let answers end by themselves; new-tokens is a cap.",
            show_default="fixed, or the recipe's",
        ),
    ] = None,
    slo: Annotated[
        list[str], typer.Option(help="Service level of each request, such as 'ttft <= 500 ms'; repeat for several.")
    ] = [],  # noqa: B006
    find: Annotated[
        bool, typer.Option("--find-rate", help="Search the highest rate at which 95 % of requests meet every --slo.")
    ] = False,
    cliff: Annotated[
        bool,
        typer.Option("--find-cliff", help="Repeat with 1, 2, … of the --model names: where do users begin to wait?"),
    ] = False,
    protocol: Annotated[
        str | None, typer.Option(help="chat, completions, llamacpp, tgi or mii.", show_default="chat")
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the API key.")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that one request may take.", show_default="120, or the recipe's"),
    ] = None,
    slots: Annotated[
        int,
        typer.Option(help="Requests the engine runs at once (vLLM: max-num-seqs), for its fill; known of a recipe's."),
    ] = 0,
    patient: Annotated[bool, typer.Option("--patient", help="Do not stop a saturated run.")] = False,
    seed: Annotated[int | None, typer.Option(show_default="0, or the recipe's")] = None,
    out: Annotated[Path | None, typer.Option(help="Append the run to this measurements.jsonl.")] = None,
    variant: Annotated[
        str, typer.Option(help="The variant that is served, for `decide`; by default the URL. Of a recipe: only this.")
    ] = "",
    workload: Annotated[
        str,
        typer.Option(
            help="The recipe's workload that this was: `decide` takes it as a block of it. Of a recipe: the one to "
            "send, by default what it minimizes."
        ),
    ] = "",
    results: Results = Path("results"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Load a server, or a recipe's, and say what its users would see: TTFT, TPOT, throughput, goodput, failures."""
    from peftopt import report
    from peftopt.cli.console import Console
    from peftopt.loadtest import runs as loading
    from peftopt.loadtest import summary

    try:
        slos = [summary.slo(text) for text in slo]
    except ValueError as error:
        raise BadInput(f"--slo {error}") from error
    if find and not slos:
        raise BadInput("--find-rate needs a service level", "add --slo 'ttft <= 500 ms'")
    if find and (trace or concurrency):
        raise BadInput("--find-rate sets the rate itself", "leave out --trace and --concurrency")
    if cliff and (find or trace or len(model) < 2):
        raise BadInput("--find-cliff needs several adapters, at one rate or concurrency", "add --model NAME for each")
    shape = {"rate": rate, "concurrency": concurrency, "requests": requests, "duration_s": duration}
    shape |= {"new_tokens": new_tokens, "fixed": None if natural is None else not natural, "seed": seed}
    shape = {name: value for name, value in shape.items() if value is not None}
    names = {"protocol": protocol, "key_env": api_key_env, "timeout_s": timeout}
    names = {name: value for name, value in names.items() if value is not None}
    console, outcomes = Console(quiet), []
    if "://" not in target and not Path(target).exists():
        hint = "give a recipe's path, or a server's URL like http://localhost:8000"
        raise BadInput(f"{target} is no URL, and no recipe is there", hint)
    if "://" in target:
        found = _one_server(target, names, prompts, shape, variant, workload)
    else:
        if odd := [name for name, value in (("protocol", protocol), ("api-key-env", api_key_env)) if value is not None]:
            raise BadInput(f"--{odd[0]}: a recipe's variants say it themselves", "leave it out, or give a server's URL")
        if model:
            raise BadInput("--model: a recipe's variants name what they serve", "choose one of them: --variant NAME")
        recipe, sending = _chosen(Path(target), variant, workload)
        keep = workload or ("" if prompts or trace or find or shape.keys() - {"seed"} else sending.name)
        own = _own_shape(sending, recipe.seed, shape, bool(trace or find))
        found = _servers(recipe, sending, prompts, {**own, **shape}, names, keep, results, console)
    with contextlib.closing(found) as loads:
        for sent in loads:
            rest = {"rate": 1.0, "new_tokens": 64, **sent.shape}
            at = rest.pop("rate")
            kind = loading.Traffic(
                prompts=sent.prompts,
                trace=loading.read_trace(trace),
                weights=dict(map(weighted, model)) or ({sent.target.model: 1.0} if sent.target.model else {}),
                arrivals=arrivals,
                burstiness=burstiness,
                mix=mix,
                **rest,
            )
            kind.check(at)
            title = sent.variant or "load"
            with console.progress(title, kind.expected(at)) as show:
                if find:
                    seen = loading.find_rate(sent.target, kind, at, slos, show, lambda t: _tell_trial(console, t, slos))
                elif cliff:
                    seen = loading.find_cliff(sent.target, kind, at, show, lambda played: _tell_set(console, played))
                else:
                    seen = loading.run(sent.target, kind, at, show, patient)
            values = loading.as_json(seen, slos)
            if values["engine"] and (n := slots or sent.slots):
                values["engine"]["slots"] = n
            if out:
                loading.append(out, sent.variant or sent.target.url, values, sent.workload)
            if as_json:
                named = {"variant": sent.variant, "url": sent.target.url}
                print(json.dumps(report.as_json.plain({**named, **values}), allow_nan=False))
            else:
                console.table(report.load.HEADER, report.load.rows(values))
                console.pairs(title, report.load.lines(values))
                for note in seen.notes:
                    console.warn(note)
            outcomes.append(loading.outcome(seen, slos, find))
            if outcomes[-1] == INTERRUPTED:
                break
    raise typer.Exit(max(outcomes, key=[ACCEPTED, INCONCLUSIVE, REJECTED, ENVIRONMENT, INTERRUPTED].index))


@dataclass(frozen=True)
class _Sent:
    """Where one load goes and what it is made of: `shape` are fields of a load.Traffic, and its `rate`."""

    target: Target
    prompts: Mapping[str, Prompt]
    shape: Mapping[str, Any]
    variant: str
    workload: str
    slots: int = 0


def _one_server(
    url: str, names: dict[str, Any], prompts: Path | None, shape: dict[str, Any], variant: str, workload: str
) -> Generator[_Sent]:
    from peftopt import corpus
    from peftopt.loadtest.client import Target
    from peftopt.loadtest.protocols import Prompt

    rows = corpus.read(str(prompts)) if prompts else []
    asked = {row.id: Prompt(messages=row.messages) for row in rows}
    yield _Sent(Target(url, **names), asked, shape, variant, workload)


def _chosen(file: Path, variant: str, workload: str) -> tuple[Recipe, Workload]:
    """The recipe with only the variants to load, and the workload to send."""
    from peftopt import plugins
    from peftopt.recipe.reader import nearest

    recipe, _ = read_recipe(file)
    known = plugins.catalogue()
    serving = {name: v for name, v in recipe.variants.items() if known[v.engine.plugin].serves}
    if not serving:
        kinds = " or ".join(p.name for p in known.values() if p.serves)
        raise BadInput(f"{file} has no variant on a server", f"give one an engine that serves: {kinds}")
    if variant and variant not in serving:
        raise BadInput(f"--variant {variant}: {file} has no such variant on a server", nearest(variant, serving))
    if workload and workload not in recipe.workloads:
        raise BadInput(f"--workload {workload}: {file} has no such workload", nearest(workload, recipe.workloads))
    chosen = {variant: serving[variant]} if variant else serving
    return replace(recipe, variants=chosen), recipe.workloads[workload or recipe.minimize.workload]


def _own_shape(workload: Workload, seed: int, given: Mapping[str, Any], timed: bool) -> dict[str, Any]:
    """What the workload says of a load, as far as the options do not take its place: a rate, or what is `timed`
    otherwise, that of its users; a duration that of its number of requests."""
    from peftopt.loadtest import runs as loading

    own = loading.of_workload(workload, seed)
    instead = {
        "concurrency": timed or "rate" in given,
        "rate": "concurrency" in given,
        "requests": "duration_s" in given,
    }
    return {name: value for name, value in own.items() if not instead.get(name)}


def _servers(
    recipe: Recipe,
    workload: Workload,
    prompts: Path | None,
    shape: dict[str, Any],
    names: dict[str, Any],
    keep: str,
    results: Path,
    console: Console,
) -> Generator[_Sent]:
    """A recipe's servers, each up while its load is sent. `keep`: the workload that the loads are blocks of; one that
    the options make another is none, unless the user says so."""
    import tempfile

    from peftopt import corpus
    from peftopt.runner import servers

    rows = corpus.read(str(prompts)) if prompts else corpus.read(workload.prompts, workload.slice)
    run = servers.stage(recipe, results, Path(tempfile.mkdtemp(prefix="peftopt-")), console)
    for variant in run.recipe.variants.values():
        with servers.serving(run, variant, rows, shape["new_tokens"], not shape["fixed"]) as server:
            sent = {**shape, "new_tokens": server.new_tokens}
            yield _Sent(replace(server.target, **names), server.prompts, sent, variant.name, keep, server.slots)


def _tell_trial(console: Any, trial: Any, slos: Any) -> None:
    from peftopt.loadtest import summary

    share = summary.attained(trial.played.requests, slos)
    why = f", stopped: {trial.played.stopped}" if trial.played.stopped else ""
    word = "holds" if trial.held else "does not hold"
    console.done(
        "rate",
        f"{trial.rate:.3g}/s {word}: {share.estimate:.1%} of {share.n}{why}",
        max((r.done for r in trial.played.requests), default=0.0),
    )


def _tell_set(console: Any, played: Any) -> None:
    from peftopt.loadtest import summary
    from peftopt.metrics import counted

    names = len({r.model for r in played.requests})
    wait = summary.waited(played.requests)
    text = f"{counted(names, 'adapter')}: P50 {wait.estimate:,.0f} ms ({wait.low:,.0f} to {wait.high:,.0f})"
    console.done("load", text, max((r.done for r in played.requests), default=0.0))


@app.command()
def serve(
    base: BaseFolder,
    adapter: Annotated[list[str], typer.Option(help="Adapter folder, or NAME=FOLDER; repeat for several.")] = [],  # noqa: B006
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 8000,
    slots: Annotated[int, typer.Option(help="Adapters in one batch (vLLM: max-loras); 0 = all.")] = 0,
    compile_: Annotated[bool, typer.Option("--compile", help="Let vLLM compile the model: a slower start.")] = False,
    prefix_caching: Annotated[bool, typer.Option("--prefix-caching", help="Keep prompts' keys and values.")] = False,
    args: Annotated[str, typer.Option(help="More of `vllm serve`'s own options, as on its command line.")] = "",
) -> None:
    """Serve a base and its adapters with vLLM until Ctrl-C, as the engine `vllm` does: for load and canary."""
    import os

    from peftopt import environments
    from peftopt.cli.console import Console
    from peftopt.engines import vllm
    from peftopt.engines._server import check_port
    from peftopt.records import Model
    from peftopt.runner import preflight

    preflight.check_base(base, quantized=True, ours=False)
    named = dict(_named(text) for text in adapter)
    if len(named) < len(adapter) or vllm.BASE in named:
        raise BadInput(f"two adapters, or an adapter and the base ({vllm.BASE}), have one name", "give NAME=FOLDER")
    for folder in named.values():
        preflight.check_adapter(folder, base, [])
    model = Model(str(base.resolve()), tuple(map(str, named.values())))
    params = vllm.Params(compile=compile_, prefix_caching=prefix_caching, max_loras=slots, args=args)
    python = environments.python(vllm.PLUGIN.environment)
    check_port(port)
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
        typer.Option(
            help="Adapter folder; give two, to be loaded in turn under one name and path (vLLM). The --model names, or "
            "all that are served, are watched meanwhile."
        ),
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
    from peftopt.cli.console import Console
    from peftopt.loadtest.client import Target

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
        outcomes.append(_watch_reloads(console, target, (swap[0], swap[1]), model, asked, rounds, as_json))
    raise typer.Exit(max(outcomes, key=(ACCEPTED, INCONCLUSIVE, ENVIRONMENT, REJECTED).index))


def _watch_mixed(
    console: Console, target: Target, names: list[str], prompts: Prompts, rounds: int, as_json: bool
) -> int:
    """Every model alone and in mixed batches, printed; the exit code."""
    from peftopt.canary import mixed as watching

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
    console: Console,
    target: Target,
    folders: tuple[Path, Path],
    model: list[str],
    prompts: Prompts,
    rounds: int,
    as_json: bool,
) -> int:
    """Two adapters in turn under one name, printed; the exit code."""
    from peftopt import stats
    from peftopt.canary import mixed as watching
    from peftopt.canary import reloads

    residents = reloads.residents(target, list(dict.fromkeys(model)))
    with console.progress("reloads", watching.ALONE * (2 + len(residents)) + 2 * rounds) as show:
        found = reloads.live(target, folders, residents, prompts, rounds, show)
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
            "watched beside them": ", ".join(found.residents),
            "answers": f"{found.asked} in all",
            "stale": f"{len(found.stale)} of the reloaded name, not of the weights just loaded",
            "wrong": f"{len(found.wrong)} of another model that is served",
        },
    )
    for pair in found.alike:
        console.warn(f"no prompt tells {pair[0]} and {pair[1]} apart: nothing can be said of them")
    if found.failed:
        console.warn(f"{found.failed} requests failed")
    if found.kept:
        console.say(f"still served after its unload: {found.kept} times", "red")
    for title, answers in (("stale", found.stale), ("wrong", found.wrong)):
        for answer in list(dict.fromkeys(map(str, answers)))[:10]:
            console.say(f"{title}: {answer}", "red")
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
    variant: Annotated[str, typer.Option(help="The variant they measured; by default the file's name.")] = "",
    workload: Annotated[
        str, typer.Option(help="The recipe's workload that this was: `decide` takes it as a block of it.")
    ] = "",
    task: Annotated[
        str,
        typer.Option(help="The task that samples of lm-evaluation-harness are of; by default the file's name says."),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Append them to this measurements.jsonl.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read other meters' results into the same records, and say what they lack."""
    from peftopt import report
    from peftopt.cli.console import Console
    from peftopt.loadtest import importers
    from peftopt.loadtest import runs as loading

    console, raw, answered = Console(), True, True
    for path in file:
        for found in importers.read(path, task):
            answered = answered and not found.failed
            kept = loading.keep(out, found, variant or path.stem, workload)
            raw = raw and found.raw
            if as_json:
                print(json.dumps(report.as_json.plain(kept), allow_nan=False))
                continue
            console.say(f"{path}: {found.source}, {found.title}", "bold")
            if found.requests:
                console.table(report.load.HEADER, report.load.rows(importers.as_loaded(found)))
            else:
                shown = found.reported or {k: v for k, v in found.values.items() if k != "samples"}
                console.pairs("as it reports", {k: v for k, v in shown.items() if v is not None})
            for what in found.lacks:
                console.warn(f"it lacks {what}")
            if found.failed:
                console.warn("nothing was answered: every request failed")
    raise typer.Exit(ENVIRONMENT if not answered else ACCEPTED if raw else INCONCLUSIVE)
