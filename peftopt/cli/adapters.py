"""adapters: what operators ask of a gateway."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from peftopt.cli.serve import STATE
from peftopt.cli.shared import AsJson, app, named
from peftopt.errors import ENVIRONMENT, BadInput, MissingEnvironment, WorkerFailed

adapters = typer.Typer(help="Put, promote, roll back and remove the adapters of a gateway.", no_args_is_help=True)
app.add_typer(adapters, name="adapters")

Admin = Annotated[
    str, typer.Option(help="Where the gateway listens to operators; by default serve-state/admin.sock here.")
]
KeyEnv = Annotated[str, typer.Option("--key-env", help="Environment variable with the operators' key.")]
Name = Annotated[str, typer.Argument(help="The adapter's name.")]


@adapters.command("list")
def list_(admin: Admin = "", key_env: KeyEnv = "", as_json: AsJson = False) -> None:
    """The adapters, their versions, and who is answered by which."""
    from peftopt.cli.console import Console

    found = _asked("GET", "/adapters", admin, key_env)
    if as_json:
        print(json.dumps(found))
        return
    header = ("name", "arm", "version", "share", "in flight", "rank", "load s")
    rows = [
        [
            str(row["name"]),
            str(row["arm"]),
            str(row["version"] or "—"),
            f"{row['weight']:.0%}",
            str(row["in_flight"]),
            "—" if row["rank"] is None else str(row["rank"]),
            "—" if row["load_s"] is None else f"{row['load_s']:.3f}",
        ]
        for row in found
    ]
    Console().table(header, rows)


@adapters.command()
def put(
    adapter: Annotated[str, typer.Argument(help="NAME=FOLDER")],
    canary: Annotated[str, typer.Option(help="Share of users that it answers at first, such as 10%.")] = "",
    for_: Annotated[
        str, typer.Option("--for", help="Judge the canary, for so long at most, such as 30m; this waits for it.")
    ] = "",
    then: Annotated[str, typer.Option(help="promote an accepted canary, or hold it where it is.")] = "hold",
    slower: Annotated[float, typer.Option(help="The canary's median time may be this times the live one's.")] = 1.10,
    window: Annotated[str, typer.Option(help="Length of the windows that are compared.")] = "30s",
    admin: Admin = "",
    key_env: KeyEnv = "",
    as_json: AsJson = False,
) -> None:
    """Check an adapter, load it, ask whether it answers as itself, and let it answer users."""
    from peftopt.cli.console import Console

    name, folder = named(adapter)
    body: dict[str, Any] = {"folder": str(folder.resolve()), "canary": _share(canary)}
    if for_:
        if not canary or then not in ("promote", "hold"):
            raise BadInput("--for judges a canary", "write --canary 10% --for 30m --then promote, or --then hold")
        terms = {"for_s": _seconds(for_), "window_s": _seconds(window), "slower": slower, "then": then}
        body["trial"] = terms
    told = _asked("PUT", f"/adapters/{name}", admin, key_env, body)
    if for_ and told["exit_code"] == 0:
        Console().tell(told["said"])
        while (told := _asked("GET", f"/adapters/{name}/trial", admin, key_env)) is None:
            time.sleep(1.0)
    _told(told, as_json)


@adapters.command()
def promote(name: Name, admin: Admin = "", key_env: KeyEnv = "", as_json: AsJson = False) -> None:
    """Let the canary answer everybody."""
    _told(_asked("POST", f"/adapters/{name}/promote", admin, key_env), as_json)


@adapters.command()
def rollback(name: Name, admin: Admin = "", key_env: KeyEnv = "", as_json: AsJson = False) -> None:
    """Drop the canary, or go back to the version before, which is still loaded."""
    _told(_asked("POST", f"/adapters/{name}/rollback", admin, key_env), as_json)


@adapters.command()
def remove(name: Name, admin: Admin = "", key_env: KeyEnv = "", as_json: AsJson = False) -> None:
    """Answer for an adapter no more, and unload it."""
    _told(_asked("DELETE", f"/adapters/{name}", admin, key_env), as_json)


def _share(text: str) -> float:
    if not text:
        return 0.0
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise BadInput(f"--canary {text!r} is no share", "write 10% or 0.1") from None


def _seconds(text: str) -> float:
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        return float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        raise BadInput(f"{text!r} is not a length of time", "write 30s, 30m or 2h") from None


def _asked(method: str, path: str, admin: str, key_env: str, body: Any = None) -> Any:
    """The answer of the gateway. Raises MissingEnvironment where none answers, BadInput for what it refuses."""
    import httpx

    where = admin or f"unix:{Path(STATE).resolve()}/admin.sock"
    transport = httpx.HTTPTransport(uds=where.removeprefix("unix:")) if where.startswith("unix:") else None
    url = "http://gateway" if transport else f"http://{where}"
    headers = {"Authorization": f"Bearer {os.environ.get(key_env, '')}"} if key_env else {}
    try:
        with httpx.Client(transport=transport, trust_env=False, timeout=600.0) as http:
            answer = http.request(method, url + path, json=body, headers=headers)
    except httpx.HTTPError as error:
        raise MissingEnvironment(f"no gateway answers at {where}: {error}", "start one, or name it: --admin") from error
    if answer.status_code == 204:
        return None
    try:
        told = answer.json()
    except ValueError:
        said = f"the gateway answered HTTP {answer.status_code}: {answer.text[:200]}"
        raise WorkerFailed("the gateway failed", said, "what it wrote at that moment tells why") from None
    if answer.status_code in (401, 404, 422):
        raise BadInput(f"the gateway refuses: {told.get('detail')}", "see peftopt adapters --help")
    if answer.status_code in (400, 503):
        kind = MissingEnvironment if told["exit_code"] == ENVIRONMENT else BadInput
        raise kind(told["said"], told["hint"])
    return told


def _told(told: Any, as_json: bool) -> None:
    from peftopt.cli.console import Console

    if as_json:
        print(json.dumps(told))
    else:
        Console().say(told["said"], "red" if told["exit_code"] else "")
    raise typer.Exit(told["exit_code"])
