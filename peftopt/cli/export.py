"""export: the files that others start a gateway by."""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftopt.cli import serve
from peftopt.cli.shared import app, named
from peftopt.errors import BadInput, MissingEnvironment

if TYPE_CHECKING:
    from peftopt.deploy.deployed import Deployed


class Target(enum.StrEnum):
    """Who starts the gateway."""

    GUNICORN = "gunicorn"
    SYSTEMD = "systemd"
    COMPOSE = "compose"
    K8S = "k8s"


@app.command()
def export(
    target: Annotated[Target, typer.Argument(help="Who starts the gateway.")],
    arguments: Annotated[list[str], typer.Argument(help="RUN, or the options of `serve` after --.")],
    out: Annotated[Path, typer.Option(help="Folder to write the files to; those that are there stay.")],
    image: Annotated[str, typer.Option(help="Name of the image (compose, k8s).")] = "peftopt:latest",
    gpus: Annotated[int, typer.Option(help="GPUs of the container (compose, k8s).")] = 0,
    cpus: Annotated[float, typer.Option(help="Cores that the container asks for (k8s).")] = 2.0,
    memory: Annotated[float, typer.Option(help="Memory of the container in GiB (compose, k8s).")] = 8.0,
) -> None:
    """Write what gunicorn, systemd, Compose or Kubernetes starts a gateway by, with times to end that add up."""
    from peftopt.cli.console import Console
    from peftopt.deploy import files

    what = replace(deployed(arguments, target, here()), image=image, gpus=gpus, cpus=cpus, memory_gib=memory)
    exported = files.TARGETS[target](what)
    if there := [file.name for file in exported.files if (out / file.name).exists()]:
        raise BadInput(f"{out} has {', '.join(there)} already", "name another folder: --out, or delete them")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in exported.files:
            (out / file.name).write_text(file.text, encoding="utf-8")
    except OSError as error:
        raise MissingEnvironment(f"cannot write {out}: {error.strerror}", "name another folder: --out") from error
    console = Console()
    print(f"wrote {', '.join(str(out / file.name) for file in exported.files)}")
    console.say(exported.use)
    for note in exported.notes:
        console.warn(note)


@dataclass(frozen=True)
class Here:
    """Where `serve` is started without a container: the `folder` that relative paths start from, the `python` that has
    peftopt, and the folder of the engines' `environments`."""

    folder: Path
    python: str
    environments: str


def here() -> Here:
    """Where this process runs."""
    from peftopt import environments

    return Here(Path.cwd(), sys.executable, str(environments.root()))


def deployed(arguments: Sequence[str], target: str, where: Here) -> Deployed:
    """What `serve` with these arguments needs. Raises BadInput for arguments that do not go together."""
    from peftopt.deploy.deployed import UPSTREAM, Deployed
    from peftopt.deploy.times import Times
    from peftopt.gateway.backends import OURS

    options = parsed(arguments)
    if options.join or options.engine_only:
        raise BadInput("--join and --engine-only are not for a deployment", "leave them out")

    def absolute(path: Path) -> str:
        return str(where.folder / path)

    engine, reads = _needs(options)
    workers = max(2, options.workers) if target == Target.GUNICORN else options.workers
    return Deployed(
        arguments=tuple(arguments),
        folder=str(where.folder),
        python=where.python,
        times=Times(options.drain, options.whole, not options.upstream, workers),
        host=options.host,
        port=options.port,
        workers=workers,
        reads=tuple(map(absolute, reads)),
        keys=absolute(options.keys) if options.keys else "",
        secret=options.admin_key_env,
        state=absolute(options.state),
        log="" if options.log in ("", "-") else absolute(Path(options.log).parent),
        engine=engine,
        environments="" if engine in (*OURS, UPSTREAM) else where.environments,
    )


def parsed(arguments: Sequence[str]) -> serve.Options:
    """The options of `serve` in its arguments. Raises BadInput for a model that is not named once."""
    from typer.main import get_command

    command: Any = get_command(app)
    verb = command.commands["serve"]
    values = verb.make_context("peftopt serve", list(arguments)).params
    paths = {name: Path(values[name]) for name in ("run", "base", "keys", "canary", "state") if values[name]}
    folders = {"adapters_from": [Path(folder) for folder in values["adapters_from"]]}
    options = serve.Options(**{**values, **paths, **folders})
    serve.check_source(options)
    return options


def _needs(options: serve.Options) -> tuple[str, list[Path]]:
    """The engine by its name, "" for the default, and the folders and files that `serve` reads."""
    from peftopt.deploy.deployed import UPSTREAM

    given = [options.base, options.canary, *(named(text)[1] for text in options.adapter), *options.adapters_from]
    found = [path for path in given if path]
    if options.upstream:
        return UPSTREAM, found
    if options.run is None:
        return options.engine, found
    from peftopt.gateway import decided

    run = decided.of_run(options.run, options.variant)
    found += [options.run.resolve().parent.parent, *map(Path, (run.model.path, *run.model.adapters))]
    return options.engine or run.engine, found
