"""OpenAI's routes over the scheduler: plain ASGI, so that a client that leaves is noticed at once."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable

import orjson
import uvicorn
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from peftopt.records import Json
from peftopt.server.answer import Piece
from peftopt.server.asked import Asked, Problem, read, wrong
from peftopt.server.replies import Reply
from peftopt.server.scheduler import Job, Scheduler

MOST_BYTES = 32 * 2**20
QUEUE_S = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
CLOSE_S = 5
"""So long answers that are over may take to be sent when the server ends."""


class Service:
    """The routes. `draining`: what is under way goes on, and nothing new is taken."""

    def __init__(self, scheduler: Scheduler, key: str = "") -> None:
        """With a `key`, whoever does not send it is refused, but for /health and /metrics, as at vLLM's."""
        self.scheduler, self.draining = scheduler, False
        self._registry = CollectorRegistry()
        self._registry.register(_Counts(scheduler))
        # vLLM's names where its meaning is the same: the time from arrival to the first computation.
        name, what = "vllm:request_queue_time_seconds", "Time that a request waited for a row."
        self._queue = Histogram(name, what, buckets=QUEUE_S, registry=self._registry)
        scheduler.scheduled = self._queue.observe
        routes = Starlette(
            routes=[
                Route("/v1/chat/completions", _Answering(self, chat=True), methods=["POST"]),
                Route("/v1/completions", _Answering(self, chat=False), methods=["POST"]),
                Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            exception_handlers={Problem: _refuse, HTTPException: _no_route, Exception: _broken},
        )
        self.app: ASGIApp = _Guarded(routes, key) if key else routes

    def check(self) -> None:
        """Raises Problem where nothing new is taken."""
        if self.draining:
            raise Problem(503, "the server is about to end and takes no new requests", "server_ends")

    async def _models(self, _: Request) -> Response:
        served = self.scheduler.served.items()
        data = [
            {
                "id": name,
                "object": "model",
                "created": known.since,
                "owned_by": "peftopt",
                "root": known.folder,
                "parent": None if name == self.scheduler.name else self.scheduler.name,
                "max_model_len": self.scheduler.context or None,
            }
            for name, known in served
        ]
        return _json({"object": "list", "data": data})

    async def _health(self, _: Request) -> Response:
        reason = "draining" if self.draining else self.scheduler.broken
        return PlainTextResponse(reason, 503 if reason else 200)

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")

    async def _load(self, request: Request) -> Response:
        self.check()
        body = _parsed(await request.body())
        name, folder = _word(body, "lora_name"), _word(body, "lora_path")
        await self.scheduler.load(name, folder)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        name = _word(_parsed(await request.body()), "lora_name")
        await self.scheduler.unload(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


class _Guarded:
    """Routes of which those below /v1 are for who sends the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope.get("path", "").startswith("/v1/") and not hmac.compare_digest(sent, self._wanted):
            problem = Problem(401, "this server asks for its API key", "invalid_api_key")
            await _json(problem.body, problem.status)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _Answering:
    """The two routes that generate."""

    def __init__(self, service: Service, chat: bool) -> None:
        self._service, self._chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._service.check()
            asked = read(_parsed(await _body(receive)), self._chat)
            job = self._service.scheduler.submit(asked)
        except Problem as problem:
            await _json(problem.body, problem.status)(scope, receive, send)
            return
        except ConnectionError:
            return
        watch = asyncio.create_task(self._watch(receive, job))
        try:
            await self._answer(asked, job, scope, receive, send)
        finally:
            watch.cancel()
            self._service.scheduler.leave(job)

    async def _watch(self, receive: Receive, job: Job) -> None:
        """Give the request up when its client leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._service.scheduler.leave(job)

    async def _answer(self, asked: Asked, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        """Nothing is sent before the first token, so that what fails until then has a status of its own."""
        reply = Reply(job.answer, job.voice)
        pieces = _pieces(job)
        try:
            if not asked.stream:
                whole = reply.whole([piece async for piece in pieces])
                await _json(whole)(scope, receive, send)
                return
            first = await anext(pieces)
        except Problem as problem:
            await _json(problem.body, problem.status)(scope, receive, send)
            return
        except ConnectionError:
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _say(send, *reply.opening(), *reply.piece(first))
        with contextlib.suppress(ConnectionError):
            try:
                async for piece in pieces:
                    await _say(send, *reply.piece(piece))
                await _send(send, b"data: [DONE]\n\n", more=False)
            except Problem as problem:
                await _say(send, problem.body)
                await _send(send, b"data: [DONE]\n\n", more=False)


class _Counts:
    """The scheduler's state as Prometheus metrics; vLLM's names where its meaning is the same."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> list[Metric]:
        scheduler, counts = self._scheduler, self._scheduler.counts
        requests = CounterMetricFamily(
            "peftopt_server_requests", "Requests that are over, by how they ended.", labels=["outcome"]
        )
        for outcome in ("answered", "failed", "left"):
            requests.add_metric([outcome], counts[outcome])
        return [
            GaugeMetricFamily("vllm:num_requests_running", "Requests in batches.", scheduler.running),
            GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait for a row.", scheduler.waiting),
            GaugeMetricFamily("peftopt_server_adapters", "Adapters that are loaded.", len(scheduler.served) - 1),
            *_memory(),
            CounterMetricFamily("peftopt_server_computed_tokens", "New tokens, computed.", counts["computed"]),
            requests,
        ]


def _memory() -> list[Metric]:
    """What torch's allocator has given to tensors and holds of the GPU. Without a GPU, what this process holds of the
    machine's memory: how much of that tensors have, nobody counts."""
    import psutil
    import torch

    allocated, reserved = "peftopt_server_memory_allocated_bytes", "peftopt_server_memory_reserved_bytes"
    if not torch.cuda.is_available():
        return [GaugeMetricFamily(reserved, "Memory that the process holds.", psutil.Process().memory_info().rss)]
    return [
        GaugeMetricFamily(allocated, "Memory that tensors have.", torch.cuda.memory_allocated()),
        GaugeMetricFamily(reserved, "Memory that the allocator holds.", torch.cuda.memory_reserved()),
    ]


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn would close the door first, and then end by the signal."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


async def serve(
    scheduler: Scheduler,
    host: str,
    port: int,
    stop: asyncio.Event,
    drain_s: float,
    ready: Callable[[], None],
    key: str = "",
) -> None:
    """Serve until `stop` is set; then refuse what is new, finish what is under way within `drain_s`, and end. `key`:
    see Service."""
    service = Service(scheduler, key)
    config = uvicorn.Config(
        service.app,
        host=host,
        port=port,
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=CLOSE_S,
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve())
    while not (server.started or running.done()):
        await asyncio.sleep(0.01)
    if server.started:
        ready()
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
    service.draining = True
    limit = asyncio.get_running_loop().time() + drain_s
    while scheduler.running + scheduler.waiting and asyncio.get_running_loop().time() < limit:
        await asyncio.sleep(0.02)
    await scheduler.end("it was told to")
    server.should_exit = True
    await running
    stopping.cancel()


# ---- small parts -------------------------------------------------------------------------------


async def _pieces(job: Job) -> AsyncIterator[Piece]:
    """An answer's tokens as they come. Raises Problem where it fails, ConnectionError where its client has left."""
    while True:
        piece = await job.pieces.get()
        if isinstance(piece, Problem):
            raise piece
        if piece is None:
            raise ConnectionError
        yield piece
        if piece.finish:
            return


async def _body(receive: Receive) -> bytes:
    """The whole body. Raises Problem for one that is too long, ConnectionError where its client has left."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MOST_BYTES:
            raise Problem(413, f"the body is longer than {MOST_BYTES} bytes", "too_long")
    return body


def _parsed(body: bytes) -> Json:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem(400, f"the body is not JSON: {error}", "invalid_json") from error


def _word(body: Json, name: str) -> str:
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, str) or not value:
        raise wrong(name, f"{name} must be given, as a text")
    return value


def _json(body: Json, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _json(error.body, error.status)


async def _no_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json(Problem(error.status_code, error.detail, "no_route").body, error.status_code)


async def _broken(_: Request, error: Exception) -> Response:
    """A bug, or no memory; Starlette prints where."""
    return _json(Problem(500, f"{type(error).__name__}: {error}", "internal_error").body, 500)


async def _say(send: Send, *messages: Json) -> None:
    await _send(send, b"".join(b"data: " + orjson.dumps(message) + b"\n\n" for message in messages))


async def _send(send: Send, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
