"""diagnose: measure where a deployment loses time and memory."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import AsJson, Quiet, Results, app, beside, named, options_from
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, REJECTED, BadInput

if TYPE_CHECKING:
    from peftopt.cli.console import Console
    from peftopt.diagnose.records import Bottleneck, Diagnosis
    from peftopt.diagnose.setting import Setting

MINUTES = 4.5
NAMES = "unfused, choice, prompts, batching, unloading"


@dataclass(frozen=True)
class Options:
    """The options of `diagnose`."""

    base: Annotated[Path | None, typer.Option("--base", help="Folder of the base model (safetensors).")] = None
    adapter: Annotated[
        list[str], typer.Option(help="Adapter folder, or NAME=FOLDER; repeat for several. The first is measured most.")
    ] = field(default_factory=list)
    engine: Annotated[
        str, typer.Option(help="eager, vllm, llamacpp_server, or the URL of a server that runs already.")
    ] = "eager"
    base_name: Annotated[str, typer.Option(help="Name of the base on a running server.")] = "base"
    prompts: Annotated[Path | None, typer.Option(help="Prompts to send (JSON lines); made-up words by default.")] = None
    prompt_tokens: Annotated[int, typer.Option(help="Approximate tokens of a made-up prompt.")] = 24
    new_tokens: Annotated[
        int,
        typer.Option(help="Tokens of a usual answer. Shares refer to such a request; few of its tokens are computed."),
    ] = 64
    slo: Annotated[
        list[str],
        typer.Option(
            help="Service level of a request, such as 'ttft <= 500 ms'; repeat for several.",
            show_default="five times a lone request's TTFT",
        ),
    ] = field(default_factory=list)
    threads: Annotated[int, typer.Option(help="Threads per server; 0 = all cores.")] = 0
    minutes: Annotated[float, typer.Option(help="Approximate time limit; what is open at the end is undecided.")] = (
        MINUTES
    )
    more: Annotated[str, typer.Option(help=f"Add blocks to one bottleneck of a diagnosis before (--out): {NAMES}.")] = (
        ""
    )
    plan: Annotated[
        str,
        typer.Option(
            help="Say whether to merge or to keep adapters apart for this traffic, such as "
            "\"adapters=40 zipf=1.1 rps=12 slo='ttft <= 500 ms' reload=1/day\"; also prompt=, new=, memory=, gpus=."
        ),
    ] = ""
    plan_from: Annotated[
        Path | None,
        typer.Option(help="The same for the traffic in a log of peftopt serve; --plan adds or overrides values."),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the diagnosis.", show_default="results/diagnoses/TIME; with --more the newest"),
    ] = None
    run: Annotated[
        Path | None, typer.Option(help="A finished run; its report then shows the diagnosis.", show_default=False)
    ] = None
    results: Results = Path("results")
    as_json: AsJson = False
    quiet: Quiet = False


@app.command()
@options_from(Options)
def diagnose(options: Options) -> None:
    """Measure where a PEFT deployment loses time and memory, and say what to do, the most expensive first.

    Exit codes: 0 done, 1 something does not work, 3 nothing could be decided, 4 nothing could be measured.
    """
    from peftopt.cli.console import Console, print_json
    from peftopt.diagnose import diagnosing, keeping

    console = Console(options.quiet)
    if options.run and not (options.run / "decision.json").exists():
        raise BadInput(f"--run {options.run}: no decision there", "give the folder of a finished run")
    if options.plan or options.plan_from:
        raise typer.Exit(_plan(options, console))
    more = _bottleneck(options.more)
    folder = _folder(options)
    setting = keeping.read_setting(folder) if more and not options.base else _setting(options)
    diagnosis = diagnosing.diagnose(setting, folder, options.minutes, more, console.tell)
    _write(diagnosis, folder, options.run, console)
    if options.as_json:
        print_json(json.loads(keeping.text(diagnosis)))
    else:
        _print(diagnosis, folder, console)
    raise typer.Exit(outcome(diagnosis))


def _plan(options: Options, console: Console) -> int:
    """Plan whether to merge or to keep apart, and print the plan. Returns the exit code."""
    from peftopt.cli.console import print_json
    from peftopt.diagnose.planning import planning, words
    from peftopt.runner import judged

    if options.more:
        raise BadInput("--plan and --more do not go together", "plan first, then add blocks to a diagnosis")
    setting = _setting(options)
    traffic = planning.read(options.plan, options.plan_from)
    folder = options.out or options.results / "diagnoses" / time.strftime("%Y-%m-%d-%H%M%S")
    planned = planning.run(setting, traffic, folder, console.tell)
    if options.run:
        planning.write(planned.values, options.run)
        judged.report_again(options.run, console.warn, beside(options.run))
    if options.as_json:
        print_json(planned.values)
    else:
        console.table(words.HEADER, words.rows(planned.evaluated))
        console.pairs("merge or keep apart", words.sentences(planned.evaluated, planned.breakevens))
        console.say(f"kept in {folder}; another plan with --out {folder} reuses these measurements")
    if planned.evaluated.best is None:
        return REJECTED
    return ACCEPTED if planned.evaluated.sure else INCONCLUSIVE


def _write(diagnosis: Diagnosis, folder: Path, run: Path | None, console: Console) -> None:
    """Write the pages of a diagnosis, and the reports of its run again."""
    from peftopt import store
    from peftopt.diagnose import keeping, page
    from peftopt.runner import judged

    for name, text in page.pages(diagnosis).items():
        store.write(folder / name, text)
    if run:
        keeping.write(diagnosis, run)
        judged.report_again(run, console.warn, beside(run))


def outcome(diagnosis: Diagnosis) -> int:
    """The exit code. A diagnosis without a measurement is never "done"."""
    findings = {row.finding for row in diagnosis.rows}
    if "fault" in findings:
        return REJECTED
    if findings & {"costs", "no cost"}:
        return ACCEPTED
    return INCONCLUSIVE if "undecided" in findings else ENVIRONMENT


def _bottleneck(name: str) -> Bottleneck | None:
    """The bottleneck of --more. Raises BadInput for a name that is not one."""
    from peftopt.diagnose.diagnosing import MODULES
    from peftopt.recipe.reader import nearest

    if not name:
        return None
    for known in MODULES:
        if name == known:
            return known
    raise BadInput(f"--more {name}: no such bottleneck", nearest(name, MODULES))


def _folder(options: Options) -> Path:
    """Where the diagnosis is kept, or is kept already. Raises BadInput where there is none to go on with, and for a
    folder that holds one."""
    from peftopt.diagnose.keeping import DIAGNOSIS

    home = options.results / "diagnoses"
    if not options.more:
        folder = options.out or home / time.strftime("%Y-%m-%d-%H%M%S")
        if (folder / DIAGNOSIS).exists():
            raise BadInput(
                f"{folder} holds a diagnosis already", "add blocks to it with --more NAME, or choose another --out"
            )
        return folder
    if options.out:
        return options.out
    kept: Sequence[Path] = sorted(file.parent for file in home.glob(f"*/{DIAGNOSIS}"))
    if not kept:
        raise BadInput(
            f"--more {options.more}: no diagnosis in {home}", "diagnose first, or name its folder with --out"
        )
    return kept[-1]


def _setting(options: Options) -> Setting:
    """What to diagnose. Raises BadInput for options that are missing or conflict."""
    from peftopt.diagnose.setting import STARTED, Setting
    from peftopt.loadtest import summary
    from peftopt.recipe.reader import nearest

    if options.base is None or not options.adapter:
        raise BadInput("diagnose needs --base and --adapter", "give a base and one adapter or more")
    if not 0 < options.minutes < float("inf") or options.new_tokens < 2 or options.prompt_tokens < 1:
        raise BadInput("--minutes and --prompt-tokens must be more than 0, and --new-tokens at least 2")
    if options.engine not in STARTED and "://" not in options.engine:
        raise BadInput(f"no engine named {options.engine!r}", f"{nearest(options.engine, STARTED)}; or give a URL")
    adapters: dict[str, str] = {}
    for text in options.adapter:
        name, folder = named(text)
        if name in adapters:
            raise BadInput(f"two adapters are called {name}", "name each: --adapter NAME=FOLDER")
        adapters[name] = str(folder)
    for level in options.slo:
        try:
            summary.slo(level)
        except ValueError as error:
            raise BadInput(f"--slo {error}") from error
    return Setting(
        base=str(options.base),
        adapters=adapters,
        engine=options.engine,
        base_name=options.base_name,
        prompts=str(options.prompts or ""),
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        slo=tuple(options.slo),
        threads=options.threads,
    )


def _print(diagnosis: Diagnosis, folder: Path, console: Console) -> None:
    """Print one screen: the most expensive bottleneck first, and a line for those that cost nothing."""
    from peftopt.diagnose import screen

    rows = screen.shown(diagnosis)
    if rows:
        outcomes = [screen.OUTCOMES[row.finding] for row in rows]
        console.table(screen.HEADER, [screen.cells(row) for row in rows], outcomes)
    for line in screen.lines(diagnosis):
        console.say(line)
    console.say(f"report: {folder / 'diagnosis.html'}")
