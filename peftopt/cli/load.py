"""load: send load to a server, and measure what its users see."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftopt.cli.shared import AsJson, Quiet, Results, app, options_from, weighted
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, INTERRUPTED, REJECTED, BadInput
from peftopt.metrics import percent

if TYPE_CHECKING:
    from peftopt.cli.console import Console
    from peftopt.loadtest.protocols import Prompt, Target
    from peftopt.loadtest.runs import Loaded, Traffic, Trial
    from peftopt.loadtest.sender import Played, Show
    from peftopt.loadtest.summary import LoadSummary, Slo
    from peftopt.records import Recipe, Workload

BEST_TO_WORST = (ACCEPTED, INCONCLUSIVE, REJECTED, ENVIRONMENT, INTERRUPTED)


@dataclass(frozen=True)
class Options:
    """The options of `load`. None is an option that was not given: the recipe's value or the default applies."""

    target: Annotated[str, typer.Argument(help="URL of a server, or a recipe: its variants on servers, in turn.")]
    prompts: Annotated[Path | None, typer.Option(help="Prompts; a recipe has its own.")] = None
    model: Annotated[
        list[str],
        typer.Option(
            help="Name of a served model or adapter, or NAME=WEIGHT; repeat for a mix; by default the only one."
        ),
    ] = field(default_factory=list)
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests sent per second, whether earlier ones are answered or not.",
            show_default="1, or the recipe's",
        ),
    ] = None
    arrivals: Annotated[str, typer.Option(help="poisson, gamma (burstier) or constant.")] = "poisson"
    burstiness: Annotated[float, typer.Option(help="Shape of gamma gaps: 1 is Poisson, less is burstier.")] = 0.3
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="Instead of a rate: users in a closed loop, who ask again when answered.", show_default="the recipe's"
        ),
    ] = None
    trace: Annotated[
        Path | None, typer.Option(help='Replay JSON lines {"offset_s": 1.2, "id": "7"}, or with prompt_tokens.')
    ] = None
    mix: Annotated[
        str, typer.Option(help="How requests are spread over several names: uniform, round-robin or zipf.")
    ] = "uniform"
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds in which requests are sent.", show_default="60, or the recipe's requests"),
    ] = None
    requests: Annotated[int | None, typer.Option(help="Instead of a duration: the number of requests.")] = None
    new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of every answer: exactly, if the server can.", show_default="64, or the recipe's"),
    ] = None
    natural: Annotated[
        bool | None,
        typer.Option(
            "--natural/--fixed",
            help="Let answers end by themselves; --new-tokens is then the maximum.",
            show_default="fixed, or the recipe's",
        ),
    ] = None
    slo: Annotated[
        list[str], typer.Option(help="Service level of a request, such as 'ttft <= 500 ms'; repeat for several.")
    ] = field(default_factory=list)
    find_rate: Annotated[
        bool,
        typer.Option("--find-rate", help="Search for the highest rate at which 95 % of requests meet every --slo."),
    ] = False
    find_cliff: Annotated[
        bool,
        typer.Option(
            "--find-cliff", help="Repeat with 1, 2, … of the --model names, to see from how many on users wait."
        ),
    ] = False
    protocol: Annotated[
        str | None, typer.Option(help="chat, completions, llamacpp, tgi or mii.", show_default="chat")
    ] = None
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the API key.")] = None
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that one request may take.", show_default="120, or the recipe's"),
    ] = None
    slots: Annotated[
        int,
        typer.Option(
            help="Requests the engine runs at once (vLLM: max-num-seqs), for its batch fill; a recipe's are known."
        ),
    ] = 0
    patient: Annotated[bool, typer.Option("--patient", help="Do not stop a saturated run.")] = False
    seed: Annotated[int | None, typer.Option(show_default="0, or the recipe's")] = None
    out: Annotated[Path | None, typer.Option(help="Append the run to this measurements.jsonl.")] = None
    variant: Annotated[
        list[str],
        typer.Option(
            help="The variant that this server serves, for `decide`; by default the URL. With a recipe: load only this "
            "variant; repeat for several."
        ),
    ] = field(default_factory=list)
    workload: Annotated[
        str,
        typer.Option(
            help="The recipe's workload that this load is a block of, for `decide`. With a recipe: the workload to "
            "send, by default the one it minimizes."
        ),
    ] = ""
    results: Results = Path("results")
    as_json: AsJson = False
    quiet: Quiet = False

    def traffic(self) -> dict[str, Any]:
        """The given fields of a Traffic, and its `rate`."""
        return _given(
            rate=self.rate,
            concurrency=self.concurrency,
            requests=self.requests,
            duration_s=self.duration,
            new_tokens=self.new_tokens,
            fixed=None if self.natural is None else not self.natural,
            seed=self.seed,
        )

    def connection(self) -> dict[str, Any]:
        """The given fields of a Target."""
        return _given(protocol=self.protocol, key_env=self.api_key_env, timeout_s=self.timeout)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Source:
    """A server that is up, and what to send to it. `fields` are the fields of a Traffic and its `rate`. The load is
    kept under the names in `variant` and `workload`."""

    target: Target
    prompts: Mapping[str, Prompt]
    fields: Mapping[str, Any]
    variant: str
    workload: str
    slots: int = 0


@app.command()
@options_from(Options)
def load(options: Options) -> None:
    """Load a server, or a recipe's servers, and measure what users see: TTFT, TPOT, throughput, goodput, failures."""
    from peftopt.cli.console import Console
    from peftopt.loadtest import runs

    slos = runs.service_levels(options.slo)
    _check_modes(options)
    console = Console(options.quiet)
    sources = _one_server(options) if "://" in options.target else _recipe_servers(options, console)
    outcomes = []
    with contextlib.closing(sources) as servers:
        for source in servers:
            outcomes.append(_load_one(options, source, slos, console))
            if outcomes[-1] == INTERRUPTED:
                break
    raise typer.Exit(max(outcomes, key=BEST_TO_WORST.index))


def _check_modes(options: Options) -> None:
    """Raises BadInput for options that conflict."""
    if options.find_rate and not options.slo:
        raise BadInput("--find-rate needs a service level", "add --slo 'ttft <= 500 ms'")
    if options.find_rate and (options.trace or options.concurrency):
        raise BadInput("--find-rate sets the rate itself", "leave out --trace and --concurrency")
    if options.find_cliff and (options.find_rate or options.trace):
        raise BadInput("--find-cliff needs one rate or concurrency", "leave out --find-rate and --trace")
    if options.find_cliff and len(options.model) < 2:
        raise BadInput("--find-cliff needs several adapters", "add --model NAME for each")


# ---- where a load goes -------------------------------------------------------------------------


def _one_server(options: Options) -> Generator[Source]:
    """A server that runs already."""
    from peftopt import corpus
    from peftopt.loadtest.protocols import Prompt, Target

    if len(options.variant) > 1:
        raise BadInput(
            f"--variant is given {len(options.variant)} times, and one server is one variant", "give it once"
        )
    rows = corpus.read(str(options.prompts)) if options.prompts else []
    prompts = {row.id: Prompt(messages=row.messages) for row in rows}
    target = Target(options.target, **options.connection())
    variant = options.variant[0] if options.variant else ""
    yield Source(target, prompts, options.traffic(), variant, options.workload)


def _recipe_servers(options: Options, console: Console) -> Generator[Source]:
    """A recipe's servers, each up while its load is sent."""
    from peftopt import corpus, scratch
    from peftopt.runner import servers

    file = Path(options.target)
    if not file.exists():
        hint = "give the path of a recipe, or the URL of a server, such as http://localhost:8000"
        raise BadInput(f"{file} is not a URL, and there is no recipe at this path", hint)
    _check_recipe_options(options)
    recipe, workload = chosen(file, options)
    given = options.traffic()
    fields = {**_workload_fields(workload, recipe.seed, options), **given}
    # A load that the options change is not a block of the workload, unless the user says so.
    changed = options.prompts or options.trace or options.find_rate or given.keys() - {"seed"}
    kept_as = options.workload or ("" if changed else workload.name)

    rows = corpus.read(str(options.prompts)) if options.prompts else corpus.read(workload.prompts, workload.slice)
    run = servers.stage(recipe, options.results, scratch.folder(console.tell), console)
    for variant in run.recipe.variants.values():
        with servers.serving(run, variant, rows, fields["new_tokens"], not fields["fixed"]) as server:
            target = replace(server.target, **options.connection())
            sent = {**fields, "new_tokens": server.new_tokens}
            yield Source(target, server.prompts, sent, variant.name, kept_as, server.slots)


def _check_recipe_options(options: Options) -> None:
    """Raises BadInput for options whose values a recipe's variants hold."""
    for option, value in (("--protocol", options.protocol), ("--api-key-env", options.api_key_env)):
        if value is not None:
            raise BadInput(
                f"{option} is for a URL: the variants of a recipe have their own",
                f"leave {option} out, or give a server's URL",
            )
    if options.model:
        raise BadInput(
            "--model is for a URL: the variants of a recipe name what they serve",
            "to load only some of them, give --variant NAME",
        )


def chosen(file: Path, options: Options) -> tuple[Recipe, Workload]:
    """The recipe with only the variants to load, and the workload to send. Raises BadInput where it has neither."""
    from peftopt import plugins
    from peftopt.recipe.reader import nearest
    from peftopt.runner import judged

    recipe, _ = judged.read_recipe(file)
    known = plugins.catalogue()
    serving = {name: v for name, v in recipe.variants.items() if known[v.engine.plugin].serves}
    if not serving:
        kinds = " or ".join(p.name for p in known.values() if p.serves)
        raise BadInput(f"{file} has no variant on a server", f"give one an engine that serves: {kinds}")
    for name in options.variant:
        if name not in serving:
            raise BadInput(f"--variant {name}: {file} has no such variant on a server", nearest(name, serving))
    name = options.workload
    if name and name not in recipe.workloads:
        raise BadInput(f"--workload {name}: {file} has no such workload", nearest(name, recipe.workloads))
    chosen = {name: serving[name] for name in options.variant or serving}
    return replace(recipe, variants=chosen), recipe.workloads[name or recipe.minimize.workload]


def _workload_fields(workload: Workload, seed: int, options: Options) -> dict[str, Any]:
    """The workload's fields of a Traffic, without those that an option replaces: a rate, a trace or a search replaces
    the number of users; a number of users replaces the rate; a duration replaces the number of requests."""
    from peftopt.loadtest import runs

    timed_by_option = options.rate is not None or options.trace is not None or options.find_rate
    replaced = {
        "concurrency": timed_by_option,
        "rate": options.concurrency is not None,
        "requests": options.duration is not None,
    }
    fields = runs.of_workload(workload, seed)
    return {name: value for name, value in fields.items() if not replaced.get(name)}


# ---- one load ----------------------------------------------------------------------------------


def _load_one(options: Options, source: Source, slos: Sequence[Slo], console: Console) -> int:
    """Load one server, print the result and append it to --out. Returns the exit code."""
    from peftopt.loadtest import runs

    fields = {"rate": 1.0, "new_tokens": 64, **source.fields}
    rate = fields.pop("rate")
    only = {source.target.model: 1.0} if source.target.model else {}
    traffic = runs.Traffic(
        prompts=source.prompts,
        trace=runs.read_trace(options.trace),
        weights=dict(weighted(text, "--model") for text in options.model) or only,
        arrivals=options.arrivals,
        burstiness=options.burstiness,
        mix=options.mix,
        **fields,
    )
    traffic.check(rate)
    title = source.variant or "load"
    with console.progress(title, traffic.expected(rate), "requests") as show:
        if options.find_rate:
            loaded = _find_rate(source.target, traffic, rate, slos, show, console)
        elif options.find_cliff:
            loaded = _find_cliff(source.target, traffic, rate, show, console)
        else:
            loaded = runs.run(source.target, traffic, rate, show, options.patient)
    summary = runs.summarized(loaded, slos, options.slots or source.slots)
    if options.out:
        runs.append(options.out, source.variant or source.target.url, summary, source.workload)
    _print(options, source, title, summary, console)
    return runs.outcome(loaded, slos, options.find_rate)


def _find_rate(
    target: Target, traffic: Traffic, rate: float, slos: Sequence[Slo], show: Show, console: Console
) -> Loaded:
    """Search for the highest rate, and print a line for each trial."""
    from peftopt.loadtest import runs, summary

    def tell(trial: Trial) -> None:
        share = summary.attained(trial.played.requests, slos)
        why = f", stopped: {trial.played.stopped}" if trial.played.stopped else ""
        word = "holds" if trial.held else "does not hold"
        text = f"{trial.rate:.3g}/s {word}: {percent(share.estimate, 1)} of {share.n}{why}"
        console.done("rate", text, _last_answer_s(trial.played))

    return runs.find_rate(target, traffic, rate, slos, show, tell)


def _find_cliff(target: Target, traffic: Traffic, rate: float, show: Show, console: Console) -> Loaded:
    """Search for the number of adapters from which on users wait, and print a line for each number."""
    from peftopt.loadtest import runs, summary
    from peftopt.metrics import counted

    def tell(played: Played) -> None:
        names = len({r.model for r in played.requests})
        wait = summary.waited(played.requests)
        text = f"{counted(names, 'adapter')}: P50 {wait.estimate:,.0f} ms ({wait.low:,.0f} to {wait.high:,.0f})"
        console.done("load", text, _last_answer_s(played))

    return runs.find_cliff(target, traffic, rate, show, tell)


def _last_answer_s(played: Played) -> float:
    return max((r.done for r in played.requests), default=0.0)


def _print(options: Options, source: Source, title: str, summary: LoadSummary, console: Console) -> None:
    from peftopt import report
    from peftopt.cli.console import print_json
    from peftopt.measurements import as_json

    if options.as_json:
        print_json({"variant": source.variant, "url": source.target.url, **as_json(summary)})
        return
    console.table(report.load.HEADER, report.load.rows(summary))
    console.pairs(title, report.load.lines(summary))
    for note in summary.notes:
        console.warn(note)
