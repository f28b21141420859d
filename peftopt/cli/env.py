"""env: separate environments for plug-ins whose pinned versions conflict with peftopt's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import AsJson, app, print_lines

if TYPE_CHECKING:
    from peftopt.environments import Environment

environment_verbs = typer.Typer(
    no_args_is_help=True, help="Environments of plug-ins whose pinned versions need one of their own."
)
app.add_typer(environment_verbs, name="env")
EnvironmentName = Annotated[str, typer.Argument(help="A name that `peftopt env list` shows.")]


@environment_verbs.command("list")
def env_list(as_json: AsJson = False) -> None:
    """List the environments: their state, their size and what they are for."""
    from peftopt import environments
    from peftopt.cli.console import Console, print_json

    known = environments.known()
    if as_json:
        print_json({"environments": known})
        return
    state = {"missing": "not installed", "ready": "installed", "outdated": "outdated: install it with --force"}
    rows = [[e.name, state[e.state], _size(e), e.help] for e in known]
    Console().table(["name", "state", "size", "what it is for"], rows)


def _size(environment: Environment) -> str:
    """The size on disk; an estimate for an environment that is not installed."""
    from peftopt.metrics import format_value

    size = format_value("size", environment.size_bytes)
    return f"about {size}" if environment.state == "missing" else size


@environment_verbs.command("install")
def env_install(
    name: EnvironmentName,
    force: Annotated[bool, typer.Option("--force", help="Build it again, even if it is installed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build an environment in the user's cache. The folder appears whole or not at all."""
    from peftopt import environments
    from peftopt.cli.console import Console

    with Console().working(f"env {name}") as tell:
        environment = environments.install(name, force, tell)
    lines = {"at": str(environment.path), "size": f"{environment.size_bytes / 1e6:.0f} MB"}
    print_lines(f"environment {name}", lines, environment, as_json)


@environment_verbs.command("remove")
def env_remove(name: EnvironmentName, as_json: AsJson = False) -> None:
    """Delete an environment."""
    from peftopt import environments

    size = environments.remove(name)
    print_lines(f"removed {name}", {"size": f"{size / 1e6:.0f} MB"}, {"name": name, "size_bytes": size}, as_json)
