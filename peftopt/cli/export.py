"""export: write the files that start and monitor the model a run chose."""

from __future__ import annotations

import enum
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftopt.cli import serve
from peftopt.cli.shared import AsJson, app, named
from peftopt.errors import BadInput, unwritable
from peftopt.redaction import redacted

if TYPE_CHECKING:
    from peftopt.deploy.chosen import Chosen
    from peftopt.deploy.deployed import Deployed, Exported, File
    from peftopt.deploy.flags import Flag


IMAGE = r"[a-z0-9]+(?:[._/:@-]+[A-Za-z0-9]+)*"
"""The name of an image, with a registry, a tag or a digest."""


class Target(enum.StrEnum):
    """Which program starts the model."""

    PEFTOPT = "peftopt"
    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMACPP = "llamacpp"
    SYSTEMD = "systemd"
    COMPOSE = "compose"
    K8S = "k8s"
    GUNICORN = "gunicorn"
    MONITORING = "monitoring"


class Metrics(enum.StrEnum):
    """The program whose metrics monitor production."""

    GATEWAY = "gateway"
    VLLM = "vllm"


ENGINES = (Target.VLLM, Target.SGLANG, Target.LLAMACPP)
"""Targets without the gateway."""
WORDS = (
    "TARGET: peftopt, vllm, sglang, llamacpp, systemd, compose, k8s, gunicorn or monitoring; by default, all that fit. "
    "Then RUN, a finished run; or -- and the options of `serve`, for a target with the gateway."
)


@app.command()
def export(
    words: Annotated[list[str], typer.Argument(help=WORDS, metavar="[TARGET] RUN")],
    to: Annotated[Path, typer.Option(help="Folder for the files; existing files are not overwritten.")],
    variant: Annotated[str, typer.Option(help="Export this variant of the run, not the chosen one.")] = "",
    image: Annotated[str, typer.Option(help="Name of the image (compose, k8s).")] = "peftopt:latest",
    gpus: Annotated[int, typer.Option(help="GPUs of the container (compose, k8s).", min=0)] = 0,
    cpus: Annotated[float, typer.Option(help="Cores that the container requests (k8s).", min=0.1)] = 2.0,
    memory: Annotated[float, typer.Option(help="Memory of the container in GiB (compose, k8s).", min=0.5)] = 8.0,
    metrics: Annotated[
        Metrics, typer.Option(help="Which metrics to monitor: the gateway's, or vLLM's own (monitoring).")
    ] = Metrics.GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Write the files that start the model a run chose: launch scripts, a systemd unit, manifests. Each says which
    measurement an option comes from. Write the files that monitor it too: alert rules, a dashboard. Without TARGET,
    write all that fit the run."""
    from peftopt.cli.console import Console, print_json, print_text

    def contained(what: Deployed) -> Deployed:
        return replace(what, image=image, gpus=gpus, cpus=cpus, memory_gib=memory)

    if not re.fullmatch(IMAGE, image) or not math.isfinite(cpus + memory):
        raise BadInput("--image, --cpus or --memory is not valid", "such as --image peftopt:latest --memory 8")
    request = replace(_request(words, variant), metrics=metrics)
    console = Console()
    exported = _exported(request, request.target, contained) if request.target else _all(request, contained)
    written = _write(to, exported.files)
    if as_json:
        print_json({"files": written, "use": exported.use, "notes": exported.notes})
    else:
        print_text(f"wrote {', '.join(map(str, written))}")
        if exported.use:
            console.say(exported.use)
    for note in exported.notes:
        console.warn(note)


@dataclass(frozen=True)
class Request:
    """What to export: a `target`, None for all; the `words` for `serve`; their run, None where they name another
    source; and which metrics to monitor."""

    target: Target | None
    words: tuple[str, ...]
    run: Chosen | None
    metrics: Metrics = Metrics.GATEWAY


def _request(words: Sequence[str], variant: str) -> Request:
    """Raises BadInput for options of `serve` without a target, and for a variant without a run."""
    from peftopt.deploy import reading

    target = Target(words[0]) if words[0] in list(Target) else None
    if target is None and not Path(words[0]).exists() and not words[0].startswith("-"):
        known = ", ".join(Target)
        raise BadInput(f"{words[0]} is neither a target nor a run", f"targets: {known}; runs lie below results/runs")
    given = (*words[bool(target) :], *(("--variant", variant) if variant else ()))
    if not given:
        raise BadInput(f"export {target} needs a model", "name a finished run, or give the options of serve after --")
    options = parsed(given)
    if options.run is None and (variant or target is None):
        raise BadInput("export without a run takes a target and no variant", "name a run: peftopt export RUN --to DIR")
    return Request(target, given, reading.chosen(options.run, options.variant) if options.run else None)


def _exported(request: Request, target: Target, contained: Callable[[Deployed], Deployed]) -> Exported:
    """The files of one target. Raises BadInput for a target that cannot serve the chosen model."""
    from peftopt.deploy import files, gateway, llamacpp, sglang, vllm

    if target == Target.MONITORING:
        return _monitoring(request)
    if target not in ENGINES:
        what = contained(deployed(request.words, target, here(), request.run))
        return gateway.exported(what) if target == Target.PEFTOPT else files.TARGETS[target](what)
    if request.run is None or (request.target and parsed(request.words) != _only_the_run(request.words)):
        hint = f"name a finished run: peftopt export {target} RUN --to DIR; or take the target peftopt"
        raise BadInput(f"the target {target} takes a run and no options of serve", hint)
    scripts = {Target.VLLM: vllm.exported, Target.SGLANG: sglang.exported, Target.LLAMACPP: llamacpp.exported}
    return scripts[target](request.run)


def _monitoring(request: Request) -> Exported:
    """The files that monitor the run's decision. Raises BadInput without a run, since the limits are the run's."""
    from peftopt.deploy import monitoring
    from peftopt.watch import promised

    options = parsed(request.words)
    if options.run is None:
        raise BadInput("monitoring needs the limits of a run", "name one: peftopt export monitoring RUN --to DIR")
    return monitoring.exported(promised.load(options.run, options.variant), request.metrics.value)


def _only_the_run(words: Sequence[str]) -> serve.Options:
    """The options of `serve` with only the run and the variant of these words."""
    options = parsed(words)
    assert options.run
    return parsed([str(options.run), "--variant", options.variant])


def _all(request: Request, contained: Callable[[Deployed], Deployed]) -> Exported:
    """The files of every target that can serve the chosen model, each in a folder of its own, and a page on all of
    them. Raises BadInput where no target can."""
    from peftopt.deploy.deployed import Exported, File
    from peftopt.deploy.readme import readme

    assert request.run
    exports: dict[str, Exported] = {}
    refusals: dict[str, str] = {}
    for target in [target for target in Target if target != Target.MONITORING]:
        try:
            exports[target] = _exported(request, target, contained)
        except BadInput as error:
            refusals[target] = error.message
    if not exports:
        whys = "; ".join(dict.fromkeys(refusals.values()))
        raise BadInput(f"no target serves the chosen variant: {whys}", "name another variant of the run: --variant")
    exports[Target.MONITORING] = _monitoring(request)
    written = [
        File(f"{target}/{file.name}", file.text) for target, exported in exports.items() for file in exported.files
    ]
    notes = dict.fromkeys(note for target, exported in exports.items() for note in exported.notes)
    return Exported((readme(request.run, exports, refusals), *written), "", tuple(notes))


def _write(folder: Path, files: Sequence[File]) -> list[Path]:
    """Write the files and return their paths; scripts are executable. Raises BadInput where one exists already."""
    if there := [file.name for file in files if (folder / file.name).exists()]:
        raise BadInput(f"{folder} has {', '.join(there)} already", "name another folder: --to, or delete them")
    try:
        for file in files:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(redacted(file.text), encoding="utf-8")
            if path.suffix == ".sh":
                path.chmod(0o755)
    except OSError as error:
        raise unwritable(folder, error, "name another folder: --to") from error
    return [folder / file.name for file in files]


@dataclass(frozen=True)
class Here:
    """Where `serve` starts without a container: the `folder` that relative paths start from, the `python` that has
    peftopt, and the folder of the engines' `environments`."""

    folder: Path
    python: str
    environments: str


def here() -> Here:
    """Where this process runs."""
    from peftopt import environments

    return Here(Path.cwd(), sys.executable, str(environments.root()))


def deployed(words: Sequence[str], target: str, where: Here, run: Chosen | None = None) -> Deployed:
    """What a deployment of `serve` with these words needs. `run` is the run that they name. Raises BadInput for words
    that conflict, and for a model that the gateway cannot serve."""
    from peftopt.deploy.deployed import UPSTREAM, Deployed
    from peftopt.deploy.times import Times
    from peftopt.gateway import backends

    options = parsed(words)
    if options.join or options.engine_only:
        raise BadInput("--join and --engine-only are not for a deployment", "leave them out")

    def absolute(path: Path) -> str:
        return str(where.folder / path)

    engine = UPSTREAM if options.upstream else options.engine or (run.decided.engine if run else "")
    apart = len(options.adapter) + (len(run.decided.model.adapters) if run else 0)
    if engine not in ("", UPSTREAM):
        backends.check(engine, apart)
    flags, left = _flags(words, options, run)
    workers = max(2, options.workers) if target == Target.GUNICORN else options.workers
    return Deployed(
        flags=flags,
        left=left,
        decided=_lines(run) if run else (),
        folder=str(where.folder),
        python=where.python,
        times=Times(options.drain, options.whole, not options.upstream, workers),
        host=options.host,
        port=options.port,
        workers=workers,
        reads=tuple(map(absolute, _reads(options, run))),
        keys=absolute(options.keys) if options.keys else "",
        secret=options.admin_key_env,
        state=absolute(options.state),
        log="" if options.log in ("", "-") else absolute(Path(options.log).parent),
        engine=engine,
        environments="" if engine in (*backends.OURS, UPSTREAM) else where.environments,
    )


def parsed(words: Sequence[str]) -> serve.Options:
    """The options of `serve` from the words of its command line. Raises BadInput unless they name one model."""
    from typer.main import get_command

    command: Any = get_command(app)
    verb = command.commands["serve"]
    values = verb.make_context("peftopt serve", list(words)).params
    paths = {name: Path(values[name]) for name in ("run", "base", "keys", "canary", "state") if values[name]}
    folders = {"adapters_from": [Path(folder) for folder in values["adapters_from"]]}
    options = serve.Options(**{**values, **paths, **folders})
    serve.check_source(options)
    return options


def _flags(
    words: Sequence[str], options: serve.Options, run: Chosen | None
) -> tuple[tuple[Flag, ...], tuple[Flag, ...]]:
    """The options with their reasons, the run's decision among them, and the options that stay open."""
    from peftopt.deploy import gateway

    if run is None:
        return gateway.as_given(words), ()
    if Path(words[0]) != options.run:
        raise BadInput("options of serve stand behind the run", "write peftopt export TARGET RUN --to DIR -- OPTIONS")
    return gateway.options(run.decided, words[0], words[1:], options.engine)


def _lines(run: Chosen) -> tuple[str, ...]:
    """The lines on the run in each file."""
    from peftopt.deploy.chosen import another

    return (f"{run.name} is {run.decided.origin}, measured on {run.engine}", *another(run))


def _reads(options: serve.Options, run: Chosen | None) -> list[Path]:
    """The folders and files that `serve` reads."""
    given = [options.base, options.canary, *(named(text)[1] for text in options.adapter), *options.adapters_from]
    paths = [path for path in given if path]
    if run is None or options.run is None:
        return paths
    model = run.decided.model
    draft = [run.decided.draft] if run.decided.draft else []
    return [*paths, options.run.resolve().parent.parent, *map(Path, (model.path, *model.adapters, *draft))]
