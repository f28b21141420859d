"""bench --soak: a server under load for a long time, while adapters come and go."""

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
"""Minutes; below it a window has no room for a request."""


@dataclass(frozen=True)
class Asked:
    """What the user asks of `bench --soak`."""

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


def soak(asked: Asked) -> NoReturn:
    """Soak a server, print what came of it, and exit with its outcome."""
    from peftopt import corpus, scratch
    from peftopt.cli.console import Console, print_json
    from peftopt.diagnose.unloading import soaked, soaking
    from peftopt.diagnose.unloading.cycles import Elsewhere, Server
    from peftopt.loadtest.protocols import Target

    _check(asked)
    console = Console()
    prompts: dict[str, soaking.Messages] = {text: [{"role": "user", "content": text}] for text in soaking.QUESTIONS}
    if asked.prompts:
        prompts = {row.id: row.messages for row in corpus.read(str(asked.prompts))}
    plan = soaking.Plan(60 * asked.minutes, asked.users, asked.new_tokens)
    with ExitStack() as stack:
        server: Server = Elsewhere(Target(asked.url))
        if asked.base:
            folder = scratch.folder(console.tell)
            with console.working(f"start {asked.engine}"):
                how = soaking.engine(asked.base, asked.adapters, asked.engine, asked.threads, folder)
                server = stack.enter_context(how)
        show = stack.enter_context(console.progress("soak", plan.windows, "windows"))
        run = soaking.soak(server, asked.adapters, prompts, plan, show)
    judged = soaked.judge(run)
    values = _values(asked, run, judged)
    if asked.out:
        _write(asked.out, values)
    if asked.as_json:
        print_json(values)
    else:
        _print(console, run, judged)
    raise typer.Exit(judged.outcome)


def _check(asked: Asked) -> None:
    """Raises BadInput for what does not go together."""
    if bool(asked.base) == bool(asked.url):
        raise BadInput("--soak needs a server", "give --base DIR with --adapter DIR, or --url URL of one that runs")
    if not asked.minutes >= SHORTEST:
        raise BadInput(f"--soak {asked.minutes:g} is too short", f"give {SHORTEST:g} minutes or more")
    if asked.users < 1 or asked.new_tokens < 1:
        raise BadInput("--users and --new-tokens must be 1 or more", "leave them out for 4 and 32")
    if asked.base and not asked.adapters:
        raise BadInput("--soak needs adapters that come and go", "give --adapter DIR; two, to tell their answers apart")


def _write(out: Path, values: Json) -> None:
    from peftopt import store

    store.write(out, json.dumps(values, indent=1, allow_nan=False) + "\n", hint="choose another --out")


def _values(asked: Asked, run: Soaked, judged: Judged) -> Json:
    """All of it for programs; a bound that is not known is null."""
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
            "engine": asked.engine if asked.base else asked.url,
            "minutes": asked.minutes,
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
        "right adapter": f"{counted(run.asked, 'answer')} told apart, {len(run.wrong)} of another's",
    }
    for name, tail in judged.tails.items():
        ratio, times = tail.ratio, [each for each in tail.by_window if each is not None]
        span = f"{min(times):.0f} to {max(times):.0f} ms in windows" if times else "no answers"
        late = f"; last third {ratio.estimate:.2f}x the first ({ratio.low:.2f}–{ratio.high:.2f})" if ratio.n else ""
        whole[f"TTFT {name.upper()}"] = span + late
    console.pairs("soak", whole)
    for error, times_ in list(judged.errors.items())[:5]:
        console.warn(f"{times_} requests failed: {error}")
    churn = soaked.errors_of_steps(run.churn) if run.churn else {}
    for error, times_ in list(churn.items())[:5]:
        console.warn(f"{times_} times {error}")
    for pair in run.alike:
        console.warn(f"no prompt tells {pair[0]} and {pair[1]} apart: wrong answers between them are not seen")
    if run.unclear:
        console.warn(f"{run.unclear} answers could not be told apart: they failed")
    for note in run.notes:
        console.warn(note)
    for wrong, times_ in Counter(map(str, run.wrong)).most_common(5):
        console.say(f"{times_} times {wrong}", "red")
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
