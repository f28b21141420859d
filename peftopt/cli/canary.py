"""canary: check that the right adapter answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import AsJson, Quiet, app
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, REJECTED, BadInput

if TYPE_CHECKING:
    from peftopt.canary.reloads import Prompts
    from peftopt.cli.console import Console
    from peftopt.loadtest.protocols import Target


@app.command()
def canary(
    url: Annotated[str, typer.Argument(help="URL of a server with several adapters.")],
    prompts: Annotated[Path, typer.Option(help="Prompts on which the models should differ.")],
    model: Annotated[
        list[str], typer.Option(help="Served name to tell apart, the base included; repeat for each.")
    ] = [],  # noqa: B006
    swap: Annotated[
        list[Path],
        typer.Option(
            help="Adapter folder; give two, to load in turn under one name and path (vLLM). Meanwhile, the --model "
            "names are checked, by default all served ones."
        ),
    ] = [],  # noqa: B006
    fingerprints: Annotated[int, typer.Option(help="Prompts to use, of the longest.")] = 8,
    rounds: Annotated[int, typer.Option(help="Mixed batches with all models, or loads of both adapters.")] = 3,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 120.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Catch answers of the wrong adapter, by log-probabilities: in turn, in mixed batches, after reloads (--swap)."""
    from peftopt import corpus
    from peftopt.cli.console import Console
    from peftopt.loadtest.protocols import Target

    if not swap and len(set(model)) < 2:
        raise BadInput("a canary tells models apart: it needs two or more", "add --model for the base and each adapter")
    if swap and len(swap) != 2:
        raise BadInput(f"--swap takes two adapters, and {len(swap)} were given", "give --swap FOLDER --swap OTHER")
    # The longest, but for the tenth that is longest of all: a prefix cache keeps whole blocks of tokens.
    rows = sorted(corpus.read(str(prompts)), key=lambda row: -sum(len(m["content"]) for m in row.messages))
    asked = {row.id: row.messages for row in rows[len(rows) // 10 :][:fingerprints]}
    console = Console(quiet)
    target = Target(url, key_env=api_key_env, timeout_s=timeout)
    outcomes = []
    if len(set(model)) > 1:
        outcomes.append(_watch_mixed(console, target, list(dict.fromkeys(model)), asked, rounds, as_json))
    if swap:
        outcomes.append(_watch_reloads(console, target, (swap[0], swap[1]), model, asked, rounds, as_json))
    raise typer.Exit(max(outcomes, key=(ACCEPTED, INCONCLUSIVE, ENVIRONMENT, REJECTED).index))


def _watch_mixed(
    console: Console, target: Target, names: list[str], prompts: Prompts, rounds: int, as_json: bool
) -> int:
    """Ask every model alone, after the others and in mixed batches, and print the result. Returns the exit code."""
    from peftopt.canary import mixed as watching
    from peftopt.cli.console import print_json

    turns = watching.ALONE * len(names) + watching.IN_TURN + rounds
    with console.progress("canary", turns, "rounds") as show:
        watched = watching.watch(target, names, prompts, rounds, show)
    if as_json:
        values = {"asked": watched.asked, "failed": watched.failed, "alike": watched.alike}
        values |= {"in_turn": watched.in_turn, "apart": watched.apart}
        print_json({**values, "noise": watched.known.noise, "wrong": watched.wrong})
        return watched.outcome
    noise = ", ".join(f"{name} {nats:.3f}" for name, nats in watched.known.noise.items())
    turn = watched.in_turn
    told = "" if turn.reused is None else f"; {turn.reused} prompt tokens reused"
    lines = {
        "own noise": f"{noise} nats",
        "after one another": f"{turn.asked} in all, {len(turn.borrowed)} with another's prefix{told}",
        "mixed answers": f"{watched.asked} in all, {len(watched.wrong)} wrong",
    }
    console.pairs("canary", lines)
    if not watched.apart:
        what = "the server refuses fields that keep a request out of its prefix cache (cache_salt, cache_prompt)"
        console.warn(f"{what}: an adapter that always answers from another's prefix is not seen")
    for pair in watched.alike:
        console.warn(f"no prompt tells {pair[0]} and {pair[1]} apart: wrong answers between them are not seen")
    if watched.failed:
        console.warn(f"{watched.failed} requests failed")
    for wrong in list(dict.fromkeys(map(str, turn.borrowed)))[:10]:
        console.say(f"after another's request with the same prompt: {wrong}", "red")
    for wrong in list(dict.fromkeys(map(str, watched.wrong)))[:10]:
        console.say(wrong, "red")
    return watched.outcome


def _watch_reloads(
    console: Console,
    target: Target,
    folders: tuple[Path, Path],
    model: list[str],
    prompts: Prompts,
    rounds: int,
    as_json: bool,
) -> int:
    """Load two adapters in turn under one name, and print the result. Returns the exit code."""
    from peftopt import stats
    from peftopt.canary import mixed as watching
    from peftopt.canary import reloads
    from peftopt.cli.console import print_json

    residents = reloads.residents(target, list(dict.fromkeys(model)))
    with console.progress("reloads", watching.ALONE * (2 + len(residents)) + 2 * rounds, "rounds") as show:
        reloaded = reloads.live(target, folders, residents, prompts, rounds, show)
    if as_json:
        print_json(reloaded)
        return reloaded.outcome

    def times(seconds: Sequence[float]) -> str:
        return f"{1e3 * stats.median(seconds):.0f} ms (first {1e3 * seconds[0]:.0f}, last {1e3 * seconds[-1]:.0f})"

    console.pairs(
        "reloads",
        {
            "loads": f"{len(reloaded.load_s)} of two adapters in turn, under one name and path",
            "load": times(reloaded.load_s),
            "first request": times(reloaded.first_s),
            "the same again": times(reloaded.warm_s),
            "unload": times(reloaded.unload_s),
            "watched beside them": ", ".join(reloaded.residents),
            "answers": f"{reloaded.asked} in all",
            "stale": f"{len(reloaded.stale)} of the reloaded name, not of the weights just loaded",
            "wrong": f"{len(reloaded.wrong)} of another model that is served",
        },
    )
    for pair in reloaded.alike:
        console.warn(f"no prompt tells {pair[0]} and {pair[1]} apart: wrong answers between them are not seen")
    if reloaded.failed:
        console.warn(f"{reloaded.failed} requests failed")
    if reloaded.kept:
        console.say(f"still served after its unload: {reloaded.kept} times", "red")
    for title, answers in (("stale", reloaded.stale), ("wrong", reloaded.wrong)):
        for answer in list(dict.fromkeys(map(str, answers)))[:10]:
            console.say(f"{title}: {answer}", "red")
    return reloaded.outcome
