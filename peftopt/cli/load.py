"""load: a server under load, as its users see it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftopt.cli.shared import AsJson, Quiet, Results, app, read_recipe, weighted
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, INTERRUPTED, REJECTED, BadInput

if TYPE_CHECKING:
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
                weights=dict(weighted(text, "--model") for text in model)
                or ({sent.target.model: 1.0} if sent.target.model else {}),
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
