"""The operators' side: lists, puts, promotes, rolls back and removes adapters, over HTTP with OpenAPI docs at /docs.

It listens on a separate socket, never on the users' port, and opens only folders below the allowed ones.
"""

# No `annotations` of the future here: FastAPI reads them, and could not find what is imported inside a function.

import dataclasses
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from peftopt import corpus
from peftopt.corpus import Row
from peftopt.errors import BAD_INPUT, BadInput, PeftoptError
from peftopt.gateway import standing
from peftopt.gateway.lives import Lives
from peftopt.gateway.outcome import Outcome
from peftopt.gateway.registry import shown
from peftopt.gateway.trial import Terms
from peftopt.measurements import structured

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse


def application(
    lives: Lives, exposition: Callable[[], Awaitable[bytes]], allowed: Sequence[Path], key: str = ""
) -> "FastAPI":
    """The application. `exposition`: the metrics as text; `allowed`: folders that adapters may come from; `key`: the
    operators' key, "" for none."""
    from fastapi import Body
    from fastapi.responses import JSONResponse, Response

    roots = [folder.resolve() for folder in allowed]
    app = _guarded(key)

    @app.get("/metrics", summary="Prometheus' metrics: the same as on the users' port, where users may read them")
    async def metrics() -> Response:
        return Response(await exposition(), media_type="text/plain; version=0.0.4")

    @app.get("/adapters", summary="Routes and the versions behind them")
    async def listed() -> list[dict[str, Any]]:
        return standing.rows(lives)

    @app.put("/adapters/{name}", summary="Put an adapter or a merged model: check it, load it, ask it, route it")
    async def put(
        name: str,
        folder: Annotated[str, Body()],
        canary: Annotated[float, Body()] = 0.0,
        trial: Annotated[dict[str, Any] | None, Body()] = None,
        prompts: Annotated[list[Any] | None, Body()] = None,
        engine: Annotated[str, Body()] = "",
        certify: Annotated[bool, Body()] = True,
    ) -> JSONResponse:
        rows = _rows(prompts or [])
        terms = _terms(trial) if trial else None
        if rows and not terms:
            raise BadInput("prompts are for a trial", "write --prompts FILE --for 30m")
        return _answered(await lives.put(name, _within(folder, roots), canary, terms, rows, engine, certify))

    @app.get("/adapters/{name}/trial", summary="What came of a version's trial: 204 while it goes on")
    async def trial(name: str, version: str = "") -> Response:
        if version and (ended := lives.trials.replaced(name, version)):
            return _answered(ended)
        return Response(status_code=204) if name in lives.trials else _answered(_report(lives, name))

    @app.get("/adapters/{name}/report", summary="How a version's trial stands, or what came of it: rule by rule")
    async def report(name: str) -> JSONResponse:
        return _answered(_report(lives, name))

    @app.post("/adapters/{name}/promote", summary="Let the canary answer everybody")
    async def promote(name: str) -> JSONResponse:
        return _answered(await lives.promote(name))

    @app.post("/adapters/{name}/rollback", summary="Drop the canary, or go back to the version before")
    async def rollback(name: str) -> JSONResponse:
        return _answered(await lives.rollback(name))

    @app.delete("/adapters/{name}", summary="Answer for it no more, and unload it")
    async def remove(name: str) -> JSONResponse:
        return _answered(await lives.remove(name))

    return app


def _guarded(key: str) -> "FastAPI":
    """An application that asks for the key, and answers for what operators did wrong."""
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse

    def known(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        digests = [hashlib.sha256(text.encode()).digest() for text in (given, key)]
        if key and not hmac.compare_digest(*digests):
            raise HTTPException(401, "send the operators' key: Authorization: Bearer KEY")

    app = FastAPI(title="peftopt serve: adapters", dependencies=[Depends(known)])

    @app.exception_handler(PeftoptError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, PeftoptError)
        status = 400 if error.exit_code == BAD_INPUT else 503
        told = {"exit_code": error.exit_code, "said": error.message, "hint": error.hint}
        return JSONResponse(told, status)

    return app


def _answered(outcome: Outcome) -> "JSONResponse":
    from fastapi.responses import JSONResponse

    told = {"exit_code": outcome.exit_code, "said": outcome.said, "version": outcome.version}
    if outcome.rules:
        told |= {"rules": shown(outcome.rules)}
    return JSONResponse(told, 200 if outcome.exit_code == 0 else 409)


def _report(lives: Lives, name: str) -> Outcome:
    found = lives.trials.report(name)
    if found is None:
        raise BadInput(f"{name} is not and was not on trial", "put a version with --canary 10% --for 30m")
    return found


def _terms(trial: dict[str, Any]) -> Terms:
    known = [field.name for field in dataclasses.fields(Terms)]
    if unknown := set(trial) - set(known):
        raise BadInput(f"a trial has no {', '.join(sorted(unknown))}", f"known: {', '.join(known)}")
    return structured(Terms, trial, "trial")


def _rows(prompts: Sequence[Any]) -> list[Row]:
    rows = []
    for number, value in enumerate(prompts, 1):
        try:
            rows.append(corpus.row_from(value, number))
        except ValueError as error:
            raise BadInput(f"prompt {number} is not one: {error}", f"each looks like {corpus.SHAPE}") from error
    if len({row.id for row in rows}) < len(rows):
        raise BadInput("two prompts have the same id", "make ids unique")
    return rows


def _within(folder: str, roots: Sequence[Path]) -> Path:
    path = Path(folder).resolve()
    if not any(path == root or root in path.parents for root in roots):
        hint = f"allowed: {', '.join(map(str, roots)) or 'none'}; name more with --adapters-from"
        raise BadInput(f"{folder} is outside the folders that adapters may come from", hint)
    return path
