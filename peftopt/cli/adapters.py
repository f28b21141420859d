"""adapters: an operator's requests to a gateway."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from peftopt.cli.serve import STATE
from peftopt.cli.shared import AsJson, app, named, options_from, seconds
from peftopt.errors import ENVIRONMENT, BadInput, MissingEnvironment, WorkerFailed
from peftopt.redaction import api_key

adapters = typer.Typer(help="Put, promote, roll back and remove the adapters of a gateway.", no_args_is_help=True)
app.add_typer(adapters, name="adapters")

Admin = Annotated[
    str, typer.Option(help="Where the gateway listens to operators; by default serve-state/admin.sock here.")
]
KeyEnv = Annotated[str, typer.Option("--key-env", help="Environment variable with the operators' key.")]
LONGEST_S = 600.0
"""Most seconds for one operation, such as loading a large adapter."""
AWAY_S = 300.0
"""Most seconds without an answer of the gateway, as in a restart, while waiting for a trial's verdict."""
Name = Annotated[str, typer.Argument(help="The adapter's name.")]


@adapters.command("list")
def list_(admin: Admin = "", key_env: KeyEnv = "", as_json: AsJson = False) -> None:
    """List the adapters, their versions, and the share of users that each version answers."""
    from peftopt.cli.console import Console, print_json

    versions = _request("GET", "/adapters", admin, key_env)
    if as_json:
        print_json({"adapters": versions})
        return
    header = ("name", "arm", "version", "share", "in flight", "rank", "load s", "engine", "state")
    rows = [
        [
            str(row["name"]),
            str(row["arm"]),
            str(row["version"] or "—"),
            f"{row['weight']:.0%}",
            str(row["in_flight"]),
            "—" if row["rank"] is None else str(row["rank"]),
            "—" if row["load_s"] is None else f"{row['load_s']:.3f}",
            row["engine"] or "—",
            _state(row),
        ]
        for row in versions
    ]
    Console().table(header, rows)


def _state(row: Mapping[str, Any]) -> str:
    if row["failed"]:
        return f"failed: {row['failed']}"
    if row.get("doubted"):
        return f"does not answer as itself: {row['doubted']}"
    return "certified" if row["certified"] else "not certified"


@dataclass(frozen=True)
class Put:
    """The options of `adapters put`."""

    adapter: Annotated[str, typer.Argument(help="NAME=FOLDER of an adapter, or of a merged model.")]
    canary: Annotated[str, typer.Option(help="Share of users that the new version answers at first, such as 10%.")] = ""
    shadow: Annotated[
        str,
        typer.Option(help="Share of requests that both versions answer again, for comparison; users do not see it."),
    ] = ""
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, with expected and critical, for both versions to answer.")
    ] = None
    for_: Annotated[
        str,
        typer.Option("--for", help="Judge the version for at most this long, such as 30m, and wait for the verdict."),
    ] = ""
    then: Annotated[str, typer.Option(help="What to do with an accepted version: promote it, or hold it as it is.")] = (
        "hold"
    )
    slower: Annotated[float, typer.Option(help="Most of its median time, as a multiple of the live version's.")] = 1.10
    critical: Annotated[
        str, typer.Option(help="Most answers with a critical error beyond the live version's, as a share.")
    ] = "2%"
    changed: Annotated[
        str, typer.Option(help="Most greedy answers that may differ, such as 5%; by default, no limit.")
    ] = ""
    lost: Annotated[str, typer.Option(help="Most correct answers to --prompts that may be lost.")] = "2%"
    schema: Annotated[Path | None, typer.Option(help="JSON schema that every answer must match.")] = None
    new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer to --prompts.")] = 256
    window: Annotated[str, typer.Option(help="Length of the windows to compare.")] = "30s"
    engine: Annotated[str, typer.Option(help="Engine to start for a merged model; by default the gateway's.")] = ""
    certify: Annotated[
        str, typer.Option(help="auto: it must answer as itself, and a merged model as its adapter; none: no check.")
    ] = "auto"
    admin: Admin = ""
    key_env: KeyEnv = ""
    as_json: AsJson = False


@adapters.command()
@options_from(Put)
def put(options: Put) -> None:
    """Check an adapter, load it, check that it answers as itself, and let it answer users.

    A folder with a whole model gets an engine of its own, beside the first.
    """
    from peftopt.cli.console import Console

    name, folder = named(options.adapter)
    share = _share("--canary", options.canary)
    if options.certify not in ("auto", "none"):
        raise BadInput(f"--certify {options.certify!r} is not known", "write --certify auto or --certify none")
    body: dict[str, Any] = {"folder": str(folder.resolve()), "canary": share, "engine": options.engine}
    body["certify"] = options.certify == "auto"
    if options.for_:
        body["trial"] = _terms(options)
        body["prompts"] = _rows(options.prompts)
    elif options.shadow or options.prompts:
        raise BadInput("--shadow and --prompts are for a trial", "write --for 30m --then promote, or --then hold")
    reply = _request("PUT", f"/adapters/{name}", options.admin, options.key_env, body)
    if options.for_ and reply["exit_code"] == 0:
        Console().tell(reply["said"])
        reply = _await_verdict(f"/adapters/{name}/trial?version={reply['version']}", options.admin, options.key_env)
    _conclude(reply, options.as_json)


def _terms(options: Put) -> dict[str, Any]:
    if not (options.canary or options.shadow or options.prompts) or options.then not in ("promote", "hold"):
        hint = "write --canary 10%, --shadow 5% or --prompts FILE, and --for 30m --then promote, or --then hold"
        raise BadInput("--for judges a canary, a shadow or answers to prompts", hint)
    return {
        "shadow": _share("--shadow", options.shadow),
        "slower": options.slower,
        "critical": _share("--critical", options.critical),
        "changed": _share("--changed", options.changed) if options.changed else None,
        "lost": _share("--lost", options.lost),
        "schema": _schema(options.schema),
        "new_tokens": options.new_tokens,
        "window_s": seconds(options.window),
        "for_s": seconds(options.for_),
        "then": options.then,
    }


def _schema(path: Path | None) -> Any:
    """The JSON schema in a file. Raises BadInput for a file that holds none."""
    from jsonschema import Draft202012Validator, SchemaError

    from peftopt import store

    if path is None:
        return None
    try:
        schema = json.loads(store.read_text(path))
        Draft202012Validator.check_schema(schema)
    except (ValueError, SchemaError) as error:
        raise BadInput(f"{path} is not a JSON schema: {str(error).splitlines()[0]}", "see json-schema.org") from error
    return schema


def _rows(path: Path | None) -> list[dict[str, Any]]:
    from peftopt import corpus

    return [asdict(row) for row in corpus.read(str(path))] if path else []


def _await_verdict(path: str, admin: str, key_env: str) -> Any:
    """Wait for a trial's verdict. A gateway that restarts meanwhile goes on with the trial. Raises MissingEnvironment
    where no gateway answers for AWAY_S."""
    heard = time.monotonic()
    while True:
        try:
            if (reply := _request("GET", path, admin, key_env)) is not None:
                return reply
            heard = time.monotonic()
        except MissingEnvironment:
            if time.monotonic() - heard > AWAY_S:
                raise
        time.sleep(1.0)


@adapters.command()
def report(name: Name, admin: Admin = "", key_env: KeyEnv = "", as_json: AsJson = False) -> None:
    """Show a version's running trial, or the result of the last one: every rule with its numbers."""
    from peftopt.cli.console import Console

    reply = _request("GET", f"/adapters/{name}/report", admin, key_env)
    if reply.get("rules") and not as_json:
        rows = [[rule["rule"], rule["outcome"], rule["reason"]] for rule in reply["rules"]]
        Console().table(("rule", "outcome", "why"), rows)
    _conclude(reply, as_json)


@adapters.command()
def promote(name: Name, admin: Admin = "", key_env: KeyEnv = "", as_json: AsJson = False) -> None:
    """Let the canary answer everybody."""
    _conclude(_request("POST", f"/adapters/{name}/promote", admin, key_env), as_json)


@adapters.command()
def rollback(name: Name, admin: Admin = "", key_env: KeyEnv = "", as_json: AsJson = False) -> None:
    """Drop the canary, or go back to the previous version, which is still loaded."""
    _conclude(_request("POST", f"/adapters/{name}/rollback", admin, key_env), as_json)


@adapters.command()
def remove(name: Name, admin: Admin = "", key_env: KeyEnv = "", as_json: AsJson = False) -> None:
    """Stop answering for an adapter, and unload it."""
    _conclude(_request("DELETE", f"/adapters/{name}", admin, key_env), as_json)


def _share(option: str, text: str) -> float:
    try:
        value = float(text.removesuffix("%")) if text else 0.0
    except ValueError:
        raise BadInput(f"{option} {text!r} is not a share", "write 10% or 0.1") from None
    return value / 100 if text.endswith("%") else value


def _request(method: str, path: str, admin: str, key_env: str, body: Any = None) -> Any:
    """The gateway's reply. Raises MissingEnvironment where no gateway answers, BadInput where it refuses."""
    import aiohttp

    where = admin or f"unix:{Path(STATE).resolve()}/admin.sock"
    headers = {"Authorization": f"Bearer {api_key(key_env)}"} if key_env else {}
    try:
        status, text = asyncio.run(_send(where, method, path, body, headers))
    except (aiohttp.ClientError, OSError) as error:
        raise MissingEnvironment(f"no gateway answers at {where}: {error}", "start one, or name it: --admin") from error
    if status == 204:
        return None
    try:
        reply = json.loads(text)
    except ValueError:
        detail = f"the gateway answered HTTP {status}: {text[:200]}"
        raise WorkerFailed("the gateway failed", detail, "see the gateway's own output of that moment") from None
    if status in (401, 404, 422):
        raise BadInput(f"the gateway refuses: {reply.get('detail')}", "see peftopt adapters --help")
    if status in (400, 503):
        kind = MissingEnvironment if reply["exit_code"] == ENVIRONMENT else BadInput
        raise kind(reply["said"], reply["hint"])
    return reply


async def _send(where: str, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, str]:
    """(status, text) of the gateway's reply, through its socket or its port."""
    import aiohttp

    socket = where.removeprefix("unix:") if where.startswith("unix:") else ""
    connector = aiohttp.UnixConnector(path=socket) if socket else aiohttp.TCPConnector()
    url = "http://gateway" if socket else f"http://{where}"
    limit = aiohttp.ClientTimeout(total=LONGEST_S)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=limit, trust_env=False) as session,
        session.request(method, url + path, json=body, headers=headers) as answer,
    ):
        return answer.status, await answer.text()


def _conclude(reply: Any, as_json: bool) -> None:
    from peftopt.cli.console import Console, print_json

    if as_json:
        print_json(reply)
    else:
        Console().say(reply["said"], "red" if reply["exit_code"] else "")
    raise typer.Exit(reply["exit_code"])
