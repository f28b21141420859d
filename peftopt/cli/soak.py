"""bench --soak: load a server for a long time, while adapters are loaded and unloaded."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from peftopt.errors import BadInput
from peftopt.metrics import counted, format_value, percent

if TYPE_CHECKING:
    from peftopt.cli.console import Console
    from peftopt.diagnose.unloading.soaked import Judged, Soaked, Trend
    from peftopt.records import Json

SHORTEST = 0.2
"""The least minutes: in fewer, a window is too short for a request."""


@dataclass(frozen=True)
class Options:
    """The options of `bench --soak`."""

    minutes: float
    base: Path | None
    url: str
    adapters: tuple[Path, ...]
    engine: str
    prompts: Path | None
    users: int
    new_tokens: int
    threads: int
    out: Path | None
    as_json: bool


def soak(options: Options) -> NoReturn:
    """Soak a server, print the result, and exit with the outcome."""
    from peftopt import corpus, scratch
    from peftopt.cli.console import Console, print_json
    from peftopt.diagnose.unloading import soaked, soaking
    from peftopt.diagnose.unloading.cycles import Elsewhere, Server
    from peftopt.loadtest.protocols import Target

    _check(options)
    console = Console()
    prompts: dict[str, soaking.Messages] = {text: [{"role": "user", "content": text}] for text in soaking.QUESTIONS}
    if options.prompts:
        prompts = {row.id: row.messages for row in corpus.read(str(options.prompts))}
    plan = soaking.Plan(60 * options.minutes, options.users, options.new_tokens)
    with ExitStack() as stack:
        server: Server = Elsewhere(Target(options.url))
        if options.base:
            folder = scratch.folder(console.tell)
            with console.working(f"start {options.engine}"):
                how = soaking.engine(options.base, options.adapters, options.engine, options.threads, folder)
                server = stack.enter_context(how)
        show = stack.enter_context(console.progress("soak", plan.windows, "windows"))
        run = soaking.soak(server, options.adapters, prompts, plan, show)
    judged = soaked.judge(run)
    values = _values(options, run, judged)
    if options.out:
        _write(options.out, values)
    if options.as_json:
        print_json(values)
    else:
        _print(console, run, judged)
    raise typer.Exit(judged.outcome)


def _check(options: Options) -> None:
    """Raises BadInput for options that conflict or are too small."""
    if bool(options.base) == bool(options.url):
        raise BadInput(
            "--soak needs one server", "give --base DIR with --adapter DIR, or --url URL of a running server"
        )
    if not options.minutes >= SHORTEST:
        raise BadInput(f"--soak {options.minutes:g} is too short", f"give {SHORTEST:g} minutes or more")
    if options.users < 1 or options.new_tokens < 1:
        raise BadInput("--users and --new-tokens must be 1 or more", "leave them out for 4 and 32")
    if options.base and not options.adapters:
        raise BadInput(
            "--soak needs adapters to load and unload", "give --adapter DIR; two, to tell their answers apart"
        )


def _write(out: Path, values: Json) -> None:
    from peftopt import store

    store.write(out, json.dumps(values, indent=1, allow_nan=False) + "\n", hint="choose another --out")


def _values(options: Options, run: Soaked, judged: Judged) -> Json:
    """The whole result for programs. A bound that is not known is null."""
    from peftopt.diagnose.unloading import soaked
    from peftopt.measurements import as_json
    from peftopt.report.as_json import plain

    churn = run.churn
    windows = [
        {
            "requests": len(w.requests),
            "cycles": w.cycles,
            "seconds": w.seconds,
            "held": as_json(w.held) if w.held else None,
        }
        for w in run.windows
    ]
    return plain(
        {
            "engine": options.engine if options.base else options.url,
            "minutes": options.minutes,
            "stopped": run.stopped,
            **as_json(judged),
            "before": as_json(run.before) if run.before else None,
            "windows": windows,
            "cycles": churn.cycles if churn else 0,
            "churn_errors": soaked.errors_of_steps(churn) if churn else {},
            "asked": run.asked,
            "wrong": [str(wrong) for wrong in run.wrong],
            "unclear": run.unclear,
            "alike": run.alike,
            "notes": run.notes,
        }
    )


def _print(console: Console, run: Soaked, judged: Judged) -> None:
    from peftopt.diagnose.unloading import soaked

    whole = {
        "soaked": f"{60 * judged.hours:.1f} minutes in {counted(len(run.windows), 'window')}, "
        f"{counted(judged.requests, 'request')}, {counted(run.churn.cycles if run.churn else 0, 'cycle')} of adapters",
        **{name: _trend(name, trend) for name, trend in judged.trends.items()},
        "errors": f"{sum(judged.errors.values())} of {judged.requests}; "
        f"first third {percent(judged.early.estimate, 1)}, last third {percent(judged.late.estimate, 1)}",
        "right adapter": f"{counted(run.asked, 'answer')} told apart, {len(run.wrong)} of another adapter",
    }
    for name, tail in judged.tails.items():
        ratio, times = tail.ratio, [ms for ms in tail.by_window if ms is not None]
        span = f"{min(times):.0f} to {max(times):.0f} ms in windows" if times else "no answers"
        late = f"; last third {ratio.estimate:.2f}x the first ({ratio.low:.2f}–{ratio.high:.2f})" if ratio.n else ""
        whole[f"TTFT {name.upper()}"] = span + late
    console.pairs("soak", whole)
    for error, count in list(judged.errors.items())[:5]:
        console.warn(f"{count} requests failed: {error}")
    churn = soaked.errors_of_steps(run.churn) if run.churn else {}
    for error, count in list(churn.items())[:5]:
        console.warn(f"{count} times {error}")
    for pair in run.alike:
        console.warn(f"no prompt tells {pair[0]} and {pair[1]} apart: wrong answers between them are not seen")
    if run.unclear:
        console.warn(f"{run.unclear} answers could not be told apart: they failed")
    for note in run.notes:
        console.warn(note)
    for wrong, count in Counter(map(str, run.wrong)).most_common(5):
        console.say(f"{count} times {wrong}", "red")
    if run.stopped:
        console.warn(f"it ended early: {run.stopped}")
    colour = {0: "green", 1: "red"}.get(judged.outcome, "yellow")
    console.say("clean" if not judged.reasons else "; ".join(judged.reasons), colour)


def _trend(name: str, trend: Trend) -> str:
    per = trend.per_hour

    def text(value: float) -> str:
        return format_value("bytes", value) if "memory" in name.lower() else format_value("count", value)

    word = {True: "grows", False: "does not grow", None: "not decided"}[trend.grows]
    between = f"{text(per.estimate)} an hour ({text(per.low)} to {text(per.high)})"
    return f"{word}: {between}; {text(trend.first)} at first, {text(trend.last)} at last"
