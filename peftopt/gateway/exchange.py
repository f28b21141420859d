"""One request of a user: it is checked, admitted, routed, forwarded, and logged.

The answer's bytes are forwarded unchanged. When the client disconnects, the request to the engine is cancelled,
streaming or not, and before its first byte too. (ASGI: asgi.readthedocs.io, HTTP; `receive` gives http.disconnect.)
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from peftopt.gateway import texts
from peftopt.gateway.admission import Refused, Ticket
from peftopt.gateway.errors import Problem, without_places
from peftopt.gateway.frames import Ended, Frames
from peftopt.gateway.keys import Key
from peftopt.gateway.lines import NO_ORIGIN, Line
from peftopt.gateway.routes import Route, Version
from peftopt.gateway.shared import Shared
from peftopt.gateway.tracing import Trace
from peftopt.gateway.upstream import Answer, Fault, unless
from peftopt.records import Json

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PASSED_HEADERS = ("traceparent", "tracestate", "x-request-id")
OUT_OF_MEMORY = ("out of memory", "outofmemory", "cuda oom", "oom")
GONE = 499
"""The status in the log of a request whose client went away (nginx's word for it; nothing is sent)."""


class Unread(Exception):
    """The client does not read its answer."""


class Exchange:
    """One request of a user, from its first byte to its line in the log."""

    def __init__(self, shared: Shared, scope: Scope, receive: Receive, send: Send) -> None:
        self.shared, self.path, self.receive, self._out = shared, scope["path"], receive, send
        self.headers = headers_of(scope)
        self.raw: bytearray | None = None
        """The start of the answer, where its text is logged."""
        self.trace: Trace | None = None
        self.streams = False
        self.served = ""
        own = self.headers.get("x-request-id", "")
        self.line = Line(
            request_id=own if own.isprintable() and 0 < len(own) <= 128 else uuid.uuid4().hex,
            arrived=time.perf_counter(),
            at=time.time(),
            trace_id=_trace_id(self.headers.get("traceparent", "")),
        )
        self.asked: Mapping[str, Json] = {}
        """The request, once it goes to the engine."""
        self.sticky = ""
        """What keeps a user at an arm: the request's `user`, else the key, else the request itself."""
        self.begun = False
        """Whether the answer's head has been sent."""

    async def run(self) -> None:
        """Answer it, or cancel it when its client disconnects."""
        line = self.line
        self.shared.here += 1
        if self.shared.traces:
            self.trace = self.shared.traces.begin(self.headers, line)
        try:
            try:
                body = await self._body()
                if not await unless(self._gone(), self._answer(body)):
                    line.kind, line.error, line.status = "cancelled", "the client went away", GONE
                    self.shared.metrics.cancelled.labels(line.adapter, "client").inc()
            except Problem as problem:
                await self._problem(problem)
            except Fault as fault:
                await self._problem(_of_fault(fault))
        except Unread as unread:
            line.kind, line.error, line.status = line.kind or "cancelled", line.error or str(unread), GONE
            self.shared.metrics.cancelled.labels(line.adapter, "client").inc()
        except asyncio.CancelledError:
            line.kind, line.error = "cancelled", "the gateway was stopped"
            raise
        except Exception as error:
            line.kind, line.error = "gateway", f"{type(error).__name__}: {error}"[:200]
            line.status = line.status if self.begun else 500
            raise
        finally:
            self.shared.here -= 1
            self._over()

    async def _gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            continue

    # ---- what is asked

    async def _body(self) -> bytes:
        limit = self.shared.settings.read_s
        try:
            async with asyncio.timeout(limit or None):
                return await self._whole_body()
        except TimeoutError:
            said = f"the request's body did not come in within {limit:g} s"
            raise Problem(408, said, "request_timeout", headers={"connection": "close"}) from None

    async def _whole_body(self) -> bytes:
        most, pieces, size = self.shared.settings.most_body_bytes, [], 0
        told = self.headers.get("content-length", "")
        if told.isdigit() and int(told) > most:
            raise Problem(413, f"the body has {told} bytes, and {most} are allowed", "body_too_large")
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Problem(400, "the client went away before its request was whole", "cut_off")
            piece = message.get("body", b"")
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise Problem(413, f"the body has more than the {most} bytes that are allowed", "body_too_large")
            if not message.get("more_body"):
                return b"".join(pieces)

    def _asked(self, body: bytes) -> dict[str, Json]:
        """The request as JSON, with a model's name in it that is served."""
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Problem(400, f"the body is not JSON: {error}"[:300], "invalid_json") from None
        if not isinstance(asked, dict):
            raise Problem(400, "the body is not a JSON object", "invalid_json")
        name = asked.get("model")
        if not isinstance(name, str) or not name:
            raise Problem(400, "the body names no model", "missing_model", param="model")
        return asked

    def _key(self, name: str) -> Key:
        """Whose request it is. Raises Problem for who may not ask, or not now."""
        key = self.shared.keys.of(self.headers.get("authorization", ""))
        if key is None:
            raise unknown_key()
        self.line.key = key.name
        if not key.may_ask(name):
            raise Problem(
                403, f"this API key may not ask {name!r}; it may ask {', '.join(key.adapters)}", "forbidden_model"
            )
        if wait := key.wait_s(time.monotonic()):
            self.line.adapter = name if name in self.shared.table.routes else ""
            raise self._turned_away(Refused("rate", wait, f"this API key may ask {key.rate:g} times a second"))
        return key

    async def _answer(self, body: bytes) -> None:
        line, shared = self.line, self.shared
        asked = self._asked(body)
        name = str(asked["model"])
        key = self._key(name)
        if name not in shared.table.routes:
            known = [n for n in shared.table.routes if key.may_ask(n)]
            raise Problem(404, f"there is no model {name!r}; there are: {', '.join(known)}", "model_not_found", "model")
        line.adapter = name
        if not (shared.open and shared.lives.ready):
            reason = "not_ready" if shared.open else "draining"
            why = "the gateway is not ready" if shared.open else "the gateway is being stopped"
            shared.metrics.refused.labels(name, reason).inc()
            raise Problem(503, why, reason, headers={"retry-after": "5"}, kind="refused")
        self.streams = bool(asked.get("stream"))
        if shared.settings.log_text:
            line.text["prompt"] = texts.redacted(texts.prompt(asked))
            self.raw = bytearray()
        ticket = Ticket(name, key.name, line.arrived)
        line.running_at_start, line.waiting_at_start = shared.admission.running, shared.admission.waiting
        began = time.perf_counter()
        try:
            await self._turn(ticket)
        finally:
            line.waited = time.perf_counter() - began
        try:
            self.sticky = str(asked.get("user") or key.name or line.request_id)
            await self._routed(asked, body)
        finally:
            tokens = line.new_tokens + (line.prompt_tokens or 0)
            shared.let_in(shared.admission.leave(ticket, tokens, time.perf_counter()))

    async def _turn(self, ticket: Ticket) -> None:
        """Wait until it may go on. Raises Problem when it is refused."""
        shared, line = self.shared, self.line
        shared.let_in(shared.admission.arrive(ticket, time.perf_counter()))
        if ticket.waits:
            await self._its_turn(ticket)
        if ticket.refused:
            raise self._turned_away(ticket.refused)
        line.batch_fill = shared.fill

    async def _its_turn(self, ticket: Ticket) -> None:
        """Wait until its fate is known, as long as it may."""
        shared = self.shared
        turn = shared.turns[ticket] = asyncio.get_running_loop().create_future()
        may_wait = shared.admission.may_wait_s(ticket, time.perf_counter())
        try:
            async with asyncio.timeout(may_wait if may_wait < math.inf else None):
                await turn
        except TimeoutError:
            shared.let_in(shared.admission.give_up(ticket, time.perf_counter()))
        except BaseException:
            shared.let_in(shared.admission.leave(ticket, 0, time.perf_counter()))
            raise
        finally:
            shared.turns.pop(ticket, None)

    def _turned_away(self, refused: Refused) -> Problem:
        self.shared.metrics.refused.labels(self.line.adapter, refused.reason).inc()
        return _refused(refused)

    # ---- what is answered

    async def _routed(self, asked: dict[str, Json], body: bytes) -> None:
        """Ask the version that the route has now, and none other to the end."""
        shared, line = self.shared, self.line
        self.asked = asked
        route = shared.table.routes.get(line.adapter)
        if route is None:
            raise Problem(404, f"the model {line.adapter!r} was removed meanwhile", "model_not_found", "model")
        version = self._chosen(route)
        line.origin = shared.settings.origins.get(version.served, NO_ORIGIN)
        line.adapter_switch_time = shared.lives.switched.pop(version.served, None)
        if version.url:  # an engine of its own
            upstream = shared.upstream.at(version.url)
            line.model_loading_time = shared.lives.loading_s(version.served)
            line.sampled = shared.samples.get(version.served)
        else:
            upstream = shared.upstream
            line.model_loading_time, line.sampled = shared.settings.model_loading_time, shared.samples.get("")
        self.served = version.served
        if asked["model"] != version.served:
            body = json.dumps({**asked, "model": version.served}).encode()
        headers = {name: self.headers[name] for name in PASSED_HEADERS if name in self.headers}
        headers.setdefault("x-request-id", line.request_id)
        if self.trace:
            headers |= self.trace.headers()
        shared.lives.in_flight[version.served] += 1
        try:
            line.sent = time.perf_counter()
            async with asyncio.timeout(shared.upstream.timeouts.whole or None):
                async with upstream.ask(self.path, body, headers) as answer:
                    line.status = answer.status
                    await self._pass(answer)
        except TimeoutError:
            raise Fault("timeout", f"the answer took more than {shared.upstream.timeouts.whole:g} s") from None
        finally:
            shared.lives.in_flight[version.served] -= 1

    def _chosen(self, route: Route) -> Version:
        """The version that answers, noted in the line; a canary that has failed answers nobody. Raises Problem where
        the live version has failed."""
        line, failed = self.line, self.shared.lives.failed()
        arm, version = route.choose(self.sticky)
        if arm == "canary" and version.served in failed:
            arm, version = "live", route.live
        line.arm, line.version = arm, version.id
        line.certified = self.shared.lives.certified(version.served)
        if why := failed.get(version.served):
            said = f"{version.served} does not answer now: {why}; it is tried again, the other models are served"
            raise Problem(503, said, "adapter_failed", "model", headers={"retry-after": "5"}, kind="engine_dead")
        return version

    async def _pass(self, answer: Answer) -> None:
        if not 200 <= answer.status < 600:
            raise Fault("upstream", f"the engine answered with the status {answer.status}")
        if answer.streams and answer.status == 200:
            await self._stream(answer)
            return
        whole = await answer.whole(self.shared.settings.most_answer_bytes)
        self._take(_ended(whole), 0)
        self._keep(whole)
        if answer.status >= 400:
            self.line.kind = _kind(answer.status, whole)
            self.line.error = self.line.error or f"HTTP {answer.status} from the engine"
        told = whole if answer.status < 500 else without_places(whole)
        await self._whole(answer.status, told, answer.content_type)

    async def _stream(self, answer: Answer) -> None:
        line, frames, before = self.line, Frames(), 0.0
        try:
            async for piece in answer.pieces():
                now = time.perf_counter()
                frames.add(piece)
                self._keep(piece)
                if frames.first_token:
                    if line.first is None:
                        line.first = now
                    else:
                        line.gaps_ms.append(1e3 * (now - before))
                    line.last = before = now
                await self._piece(answer, piece)
            if not frames.done:
                raise Fault("upstream", "the engine's stream ended early")
        finally:
            self._take(frames.ended(), frames.messages)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _keep(self, piece: bytes) -> None:
        """Keep the start of the answer for the log, where it is asked for."""
        if self.raw is not None:
            self.raw += piece[: max(0, texts.MOST_BYTES - len(self.raw))]

    def _take(self, ended: Ended, messages: int) -> None:
        """Note what the answer's end says; without a count, each message is taken for a token."""
        line = self.line
        line.finish, line.engine = ended.finish, ended.metrics
        line.prompt_tokens = ended.prompt_tokens
        line.new_tokens = ended.new_tokens if ended.new_tokens is not None else max(0, messages - 1)
        line.sources["new_tokens"] = "engine" if ended.new_tokens is not None else "derived"
        if ended.error:
            line.error = ended.error
            line.kind = line.kind or _kind(500, ended.error.encode())

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        """Send to the client. Raises Unread for one that takes nothing: it would keep a place at the engine."""
        limit = self.shared.upstream.timeouts.gap
        try:
            async with asyncio.timeout(limit or None):
                await self._out(message)
        except TimeoutError:
            raise Unread(f"the client read nothing for {limit:g} s") from None

    async def _piece(self, answer: Answer, piece: bytes) -> None:
        if not self.begun:
            await self._head(answer.status, answer.content_type, streams=True)
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def _head(self, status: int, content_type: str, streams: bool = False, more: Mapping[str, str] = {}) -> None:
        self.begun = True
        headers = {"content-type": content_type, "x-request-id": self.line.request_id, **more}
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"} if streams else {}
        raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _whole(self, status: int, body: bytes, content_type: str, more: Mapping[str, str] = {}) -> None:
        await self._head(status, content_type, more={"content-length": str(len(body)), **more})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _problem(self, problem: Problem) -> None:
        """Tell the client what is wrong: as an answer, or as the last message of a stream that has begun."""
        line = self.line
        line.error = problem.logged
        line.kind = line.kind or problem.kind
        if not self.begun:
            line.status = problem.status
            await self._whole(problem.status, problem.body(), "application/json", problem.headers)
            return
        await self._send({"type": "http.response.body", "body": problem.event(), "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _over(self) -> None:
        """Count the request and write its line."""
        self.line.done = time.perf_counter()
        if self.raw is not None:
            self.line.text["answer"] = texts.redacted(texts.answer(bytes(self.raw), self.streams))
        if self.trace:
            self.trace.end(self.line, self.path, self.served, self.streams)
        self.shared.metrics.count(self.line)
        self.shared.lives.heard(self.line, self.sticky, self.path, self.asked)
        self.shared.write(self.line)


async def answer_whole(send: Send, status: int, body: bytes, content_type: str) -> None:
    """Send a whole ASGI answer."""
    headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def headers_of(scope: Scope) -> dict[str, str]:
    """A request's headers, their names in lower case."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _trace_id(traceparent: str) -> str:
    """The trace of a W3C header (w3.org/TR/trace-context), "" without one."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) == 4 and len(parts[1]) == 32 else ""


def _ended(whole: bytes) -> Ended:
    found = Ended()
    try:
        found.read(json.loads(whole))
    except (ValueError, RecursionError):
        return found
    return found


def _kind(status: int, body: bytes) -> str:
    """The kind of an error that the engine answered with."""
    if status < 500:
        return "request"
    text = body[:4096].decode(errors="replace").lower()
    return "oom" if any(words in text for words in OUT_OF_MEMORY) else "upstream"


def unknown_key() -> Problem:
    """The answer to a client without a key, or with an unknown one."""
    said = "this needs an API key that is known here: send Authorization: Bearer KEY"
    return Problem(401, said, "invalid_api_key", headers={"www-authenticate": "Bearer"})


def _refused(refused: Refused) -> Problem:
    headers = {"retry-after": str(max(1, round(refused.retry_s)))}
    return Problem(429, f"refused: {refused.said}", refused.reason, headers=headers, kind="refused")


def _of_fault(fault: Fault) -> Problem:
    status = 504 if fault.kind.startswith("timeout") else 503 if fault.kind == "engine_dead" else 502
    return Problem(status, str(fault), fault.kind, kind=fault.kind, detail=fault.detail)
