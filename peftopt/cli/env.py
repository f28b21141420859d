"""env: the environments of plug-ins whose pins need their own."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from peftopt.cli.shared import AsJson, app, plain, print_lines

environment_verbs = typer.Typer(no_args_is_help=True, help="Environments of the plug-ins whose pins need their own.")
app.add_typer(environment_verbs, name="env")
EnvironmentName = Annotated[str, typer.Argument(help="A name that `peftopt env list` shows.")]


@environment_verbs.command("list")
def env_list(as_json: AsJson = False) -> None:
    """The environments: which there are, which are installed, how large they are, what they are for."""
    from peftopt import environments
    from peftopt.cli.console import Console
    from peftopt.metrics import format_value

    found = environments.known()
    if as_json:
        print(json.dumps([asdict(e) for e in found], default=plain))
        return
    about = {e.name: "about " * (e.state == "missing") + format_value("size", e.size_bytes) for e in found}
    state = {"missing": "not installed", "ready": "installed", "outdated": "outdated: install it with --force"}
    rows = [[e.name, state[e.state], about[e.name], e.help] for e in found]
    Console().table(["name", "state", "size", "what it is for"], rows)


@environment_verbs.command("install")
def env_install(
    name: EnvironmentName,
    force: Annotated[bool, typer.Option("--force", help="Build it again though it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build an environment in the user's cache; it appears whole or not at all."""
    from peftopt import environments
    from peftopt.cli.console import Console

    with Console().working(f"env {name}") as tell:
        made = environments.install(name, force, tell)
    print_lines(f"environment {name}", {"at": str(made.path), "size": f"{made.size_bytes / 1e6:.0f} MB"}, made, as_json)


@environment_verbs.command("remove")
def env_remove(name: EnvironmentName) -> None:
    """Delete an environment."""
    from peftopt import environments

    print(f"removed {name}: {environments.remove(name) / 1e6:.0f} MB")
