"""check, new and doctor: what a user runs before a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import AsJson, NoForecast, Results, app
from peftopt.errors import ENVIRONMENT, BadInput, PeftoptError

if TYPE_CHECKING:
    from peftopt.cli.console import Console
    from peftopt.decision.duration import Duration
    from peftopt.records import Recipe, Step, Variant
    from peftopt.runner.forecast import Outlook
    from peftopt.store import Store


@dataclass(frozen=True)
class Checked:
    """The result of `check` for a recipe without mistakes."""

    recipe: str
    variants: Mapping[str, str]
    """Each variant's chain of steps, in words."""
    baseline: str
    artifacts: int
    """The number of artifacts that the run builds or reuses."""
    notes: Sequence[str]
    warnings: Sequence[str]
    undecidable: Sequence[str]
    """What the run cannot decide with its prompts and blocks."""
    skipped: Mapping[str, str]
    """The variants that this machine cannot run, and what they need. The run decides among the others."""


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    results: Results = Path("results"),
    no_forecast: NoForecast = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with a recipe and what will be slower; times the first layers of variants, builds nothing."""
    from peftopt import environments, store
    from peftopt.cli.console import Console, print_json
    from peftopt.recipe import plan as planning
    from peftopt.runner import judged, preflight, starting

    parsed, _ = judged.read_recipe(recipe)
    preflight.check(parsed)
    home = store.Store(results.resolve())
    home.check_writable()
    console = Console()
    plan = planning.plan(parsed, dict.fromkeys(("base", "adapter", "calibration"), ""), environments.versions())
    checked = Checked(
        recipe=str(recipe),
        variants={variant.name: _chain(variant) for variant in parsed.variants.values()},
        baseline=parsed.baseline,
        artifacts=len(plan.builds),
        notes=[
            *preflight.origins(parsed),
            *preflight.prompts(parsed),
            *preflight.repeats(parsed),
            *starting.proposals(parsed),
        ],
        warnings=[*preflight.warnings(parsed), *preflight.copies(parsed)],
        undecidable=preflight.foreseen(parsed),
        skipped={name: str(lack) for name, lack in preflight.skipped(parsed).items()},
    )
    if not as_json:
        _print(checked, console)
    expected = None if no_forecast else _outlook(parsed, home, console)
    if as_json:
        outlook, duration = expected or (None, None)
        forecasts = {
            "slower": outlook.warnings if outlook else [],
            "not_forecast": outlook.left_out if outlook else {},
            "takes": _takes(duration) if duration else None,
        }
        print_json({**vars(checked), **forecasts})
    elif expected:
        outlook, duration = expected
        _print_outlook(outlook, console)
        _print_duration(duration, console)


def _print_duration(duration: Duration, console: Console) -> None:
    """Print how long a run will take, and what makes a long run shorter."""
    from peftopt.decision import duration as durations

    for line in filter(None, (durations.sentence(duration), durations.shorter(duration))):
        console.say(line)


def _print(checked: Checked, console: Console) -> None:
    from peftopt.metrics import counted

    variants = counted(len(checked.variants), "variant")
    console.say(f"{checked.recipe}: {variants}, {counted(checked.artifacts, 'artifact')} to build or reuse")
    width = max(map(len, checked.variants))
    for name, chain in checked.variants.items():
        mark = "  (baseline)" if name == checked.baseline else ""
        console.say(f"  {name:<{width}}  {chain}{mark}")
    console.say(
        f"a second copy of {checked.baseline} is measured too: if the two differ, the machine is too noisy to decide"
    )
    for line in checked.notes:
        console.say(line)
    for line in checked.warnings:
        console.warn(line)
    for name, why in checked.skipped.items():
        console.warn(f"{name} will be skipped: {why}")
    for line in checked.undecidable:
        console.warn(f"cannot be decided: {line}")


def _chain(variant: Variant) -> str:
    chain = [_words(step) for step in (*variant.steps, *variant.policies)] or ["base + adapter"]
    return f"{' -> '.join(chain)}, on {_words(variant.engine)}"


def _outlook(recipe: Recipe, home: Store, console: Console) -> tuple[Outlook, Duration]:
    """The forecast of each variant's time per token, and how long the run will take."""
    from peftopt.runner import build, duration

    with build.bars(console.progress) as hear:
        return duration.foreseen(recipe, home, hear)


def _takes(duration: Duration) -> Mapping[str, object]:
    """How long a run will take, for programs: seconds, `least` and `most`, of the whole and of its parts."""
    known = bool(duration.parts)
    return {
        "least_s": duration.whole.least if known else None,
        "most_s": duration.whole.most if known else None,
        "parts": {name: {"least_s": span.least, "most_s": span.most} for name, span in duration.parts.items()},
        "not_counted": list(duration.not_counted),
        "unknown": duration.unknown,
        "busy": duration.busy,
    }


def _print_outlook(outlook: Outlook, console: Console) -> None:
    """Warn of variants that will be slower, and name those without a forecast."""
    for line in outlook.warnings:
        console.warn(line)
    if outlook.forecasts:
        console.done("forecast", f"of {len(outlook.variants)} variants", outlook.seconds)
    for reason in dict.fromkeys(outlook.left_out.values()):
        names = ", ".join(name for name, text in outlook.left_out.items() if text == reason)
        console.tell(f"no forecast of {names}: {reason}")


def _words(step: Step) -> str:
    """The name of a step's plug-in, and the parameters that differ from the defaults."""
    from peftopt import plugins

    usual = vars(plugins.catalogue()[step.plugin].params())
    chosen = ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in step.params.items()
        if value != usual[name]
    )
    return f"{step.plugin} ({chosen})" if chosen else step.plugin


def starters() -> Mapping[str, Path]:
    """The recipes that come with peftopt, by name."""
    folder = Path(__file__).parent.parent / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml")) if file.stem != "tradeoffs"}


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The recipe to write; must not exist.")] = Path("recipe.yaml"),
    like: Annotated[
        str,
        typer.Option(
            help=f"Copy this recipe instead, with your paths in it: {', '.join(starters())}.",
            autocompletion=lambda: [*starters()],
        ),
    ] = "",
    base: Annotated[Path | None, typer.Option(help="Base model folder.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Evaluation prompts.")] = None,
    results: Results = Path("results"),
    no_forecast: NoForecast = False,
    as_json: AsJson = False,
) -> None:
    """Write a recipe for a model, an adapter, prompts and this machine, ready to run. Then time the first layers of
    variants and say how long a run takes; `check` and `run` reuse these times."""
    from peftopt import schema, store
    from peftopt.cli.console import print_json, print_text
    from peftopt.recipe import starter

    known = starters()
    if like and like not in known:
        raise BadInput(f"no recipe to copy is named {like!r}", f"known: {', '.join(known)}")
    if file.exists():
        raise BadInput(f"{file} exists already", "choose another name")
    mode_line = schema.mode_line(schema.file("recipe").as_uri())
    if base and adapter and prompts and not like:
        from peftopt.runner import starting

        text = mode_line + starter.recipe(starting.facts(base, adapter, prompts, file))
        first = ""
    elif like:
        _, starter_text = known[like].read_text(encoding="utf-8").split("\n", 1)  # without its own mode line
        text = mode_line + _adapt(starter_text, base, adapter, prompts)
        first = "edit it, then "
    else:
        lacking = [
            f"--{name}" for name, given in (("base", base), ("adapter", adapter), ("prompts", prompts)) if not given
        ]
        raise BadInput(f"a recipe of your own needs {', '.join(lacking)}", "or copy one of ours: --like quick")
    store.write(file, text, hint="choose another place")
    if as_json:
        print_json({"path": file, "next": [f"peftopt check {file}", f"peftopt run {file}"]})
    else:
        print_text(f"wrote {file}; next: {first}peftopt check {file}, then peftopt run {file}")
    if not like and not no_forecast and not as_json:
        _print_how_long(file, results)


def _print_how_long(file: Path, results: Path) -> None:
    """Print how long a run of a new recipe will take. `check` reports mistakes of the recipe: here, they are a
    warning."""
    from peftopt import store
    from peftopt.cli.console import Console
    from peftopt.runner import judged

    console = Console()
    try:
        recipe, _ = judged.read_recipe(file)
        home = store.Store(results.resolve())
        home.check_writable()
        _print_duration(_outlook(recipe, home, console)[1], console)
    except PeftoptError as error:
        console.warn(f"how long a run takes is not known: {error.message}")


DEMOS = re.compile(r", (slice: short|schema: [^,}\s]+)")
"""Keys of a starter recipe that fit only the demo's prompts."""


def _adapt(text: str, base: Path | None, adapter: Path | None, prompts: Path | None) -> str:
    """A starter recipe with the user's own paths: base and adapter under `model:`, prompts everywhere. Keys that fit
    only the demo's prompts are removed."""

    def own(line: str) -> str:
        if line.startswith("#"):
            return line
        for key, value in (("base", base), ("adapter", adapter), ("prompts", prompts)):
            if value and (key == "prompts" or line.startswith("model:")):
                line = re.sub(rf"\b{key}: [^,}}\s]+", f"{key}: {value}".replace("\\", r"\\"), line)
        return DEMOS.sub("", line) if prompts else line

    return "\n".join(map(own, text.split("\n")))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Describe this machine: which plug-ins can run here, and what to install for the others."""
    from peftopt import environments, machine, plugins
    from peftopt.cli.console import Console, print_json

    facts = machine.describe()
    known = plugins.catalogue()
    needs = {p.name: environments.lacking(p) for p in known.values()}
    state = {name: what for name, (what, _) in needs.items()}
    others = {}
    for other in plugins.OTHERS:
        if other.offered:
            device = machine.lacks(other.device)
            others[other.name] = [device] if device else state[other.through]
    if as_json:
        print_json({**facts, "missing": state, "others": others})
    else:
        console = Console()
        versions = facts.pop("versions")
        gpu = facts.pop("gpu") or ["none: measurements are of the CPU"]
        console.pairs("machine", {**facts, "gpu": ", ".join(gpu)})
        console.pairs("versions", versions)
        console.say("plug-ins", "bold")
        header = ["name", "kind", "state", "what it does"]
        console.table(header, [[p.name, p.kind, _ready(state[p.name]), p.help] for p in known.values()])
        console.say("other formats and engines: through a plug-in, or not offered", "bold")
        met = [[o.name, o.kind, _ready(others[o.name]) if o.offered else "not offered", o.help] for o in plugins.OTHERS]
        console.table([*header[:3], "what peftopt would run"], met)
        for how in sorted({how for _, how in needs.values() if how}):
            console.say(f"install what is missing with: {how}")
    if state["eager"] or state["merge"]:
        raise typer.Exit(ENVIRONMENT)


def _ready(lacking: list[str]) -> str:
    return f"needs {', '.join(lacking)}" if lacking else "ready"
