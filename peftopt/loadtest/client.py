"""One request to a server over HTTP, streamed, every token's arrival timed. A fault is a Reply with its reason.

Nothing a server does makes `ask` raise or hang: refusals, resets, stalls and garbage are answers too, and are counted.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from peftopt.errors import BROKEN, BadInput, MissingEnvironment
from peftopt.loadtest import events, protocols
from peftopt.loadtest.http import Head, Http, Lost, Streaming, TooLong, Unreachable, beginning, check_no_password
from peftopt.loadtest.protocols import Event, Prompt, Target
from peftopt.records import Json
from peftopt.redaction import api_key

METRICS_S = 5.0
"""The longest wait for a server's metrics, which a load can do without."""


@dataclass
class Reply:
    """An answer, whole or not. Times are perf_counter_ns; `times` has one for each message that brought a token.

    `error` is "" for an answer that is complete. `new_tokens` is the server's count, else that of ids or of messages;
    `proposed` and `accepted` are of a server that tells what it proposed of them, `reused` of one that tells how much
    of the prompt was in its prefix cache.
    `leave_after`: messages with a token after which its client goes away, 0 = it stays; `begun`, where given, is set
    with the first.
    """

    sent: int
    done: int = 0
    times: list[int] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str = ""
    prompt_tokens: int | None = None
    counted: int | None = None
    proposed: int | None = None
    accepted: int | None = None
    reused: int | None = None
    status: int = 0
    error: str = ""
    leave_after: int = 0
    begun: asyncio.Event | None = None

    @property
    def new_tokens(self) -> int:
        """The server's count, else the number of ids, else of messages that brought a token."""
        return self.counted or len(self.ids) or len(self.times)

    @property
    def guessed(self) -> bool:
        """Whether `new_tokens` is the number of messages, each of which may have brought several."""
        return bool(self.times) and not (self.counted or self.ids)

    def fail(self, error: str) -> None:
        """What happens after the answer is complete is no failure of the request."""
        self.error = "" if self.done else error

    def add(self, event: Event, now: int) -> None:
        """Take in a message that arrived at `now`, in perf_counter_ns."""
        if event.is_token:
            self.times.append(now)
            if self.begun:
                self.begun.set()
        self.text += event.text
        self.ids += event.ids
        self.finish = event.finish or self.finish
        self.error = event.error or self.error
        self.prompt_tokens = self.prompt_tokens if event.prompt_tokens is None else event.prompt_tokens
        self.counted = self.counted if event.new_tokens is None else event.new_tokens
        self.proposed = self.proposed if event.proposed is None else event.proposed
        self.accepted = self.accepted if event.accepted is None else event.accepted
        self.reused = self.reused if event.reused is None else event.reused


class Client:
    """Connections to one server. Use as an async context manager."""

    def __init__(self, target: Target) -> None:
        self.target = checked(target)
        self.protocol = protocols.module(target.protocol)
        self.extensions = self.usage = self.old_cap = True
        """Which fields are sent: those beyond OpenAI's, the wish for counts, and OpenAI's older name of the cap."""
        self.refused = ""
        """What the server said of such fields, where it refused them."""
        self.salts = True
        """Whether requests may have fields that keep them apart in a prefix cache; False once they were refused."""
        self.guessed = 0
        """Answers whose tokens were counted by message."""
        self.notes: list[str] = []
        """What was odd about the server, for a reader of what came of it."""
        headers = {"Content-Type": "application/json"}
        if target.key_env:
            headers["Authorization"] = f"Bearer {api_key(target.key_env)}"
        self._http = Http(self.target.url, headers, target.timeout_s, os.environ)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.close()

    async def hang_up(self) -> None:
        """Close the connections, so that the server holds none for this client; the next request opens new ones."""
        await self._http.close()

    # ---- what the server says of itself

    async def models(self) -> list[dict[str, Json]]:
        """The served models and adapters, as /v1/models lists them; [] for a protocol without such a list.

        Raises MissingEnvironment when no server answers, BadInput when what answers is no such server.
        """
        if self.target.protocol == "mii":
            return []
        models = await self._listed()
        if isinstance(models, BadInput):
            raise models
        return models

    async def _listed(self) -> list[dict[str, Json]] | BadInput:
        """The models, or why there is no list of them. Raises MissingEnvironment when no server answers, BadInput for
        an API key that it refuses."""
        url, address = self.target.url, f"{self.target.url}/v1/models"
        try:
            answer = await self._http.get("/v1/models")
        except (Unreachable, Lost, TimeoutError) as error:
            via = self._http.via
            through = f" through the proxy of {via.name}" if via else ""
            late = f"no whole list of models within {self.target.timeout_s:g} s"
            why = late if isinstance(error, TimeoutError) else _line(str(error))
            raise MissingEnvironment(f"no server at {url}{through}: {why}", "start it, or check the address") from error
        if answer.status == 401:
            raise BadInput(
                f"{url} refuses the API key (HTTP 401)", "name the environment variable that holds it: api_key_env"
            )
        if answer.status == 404 and self.target.protocol == "tgi":
            return []
        if answer.redirects_to:
            return BadInput(f"{address} redirects to {_to(answer)}", "give the server's own address")
        if answer.status != 200:
            why = f"HTTP {answer.status}: {_said(answer.text)}"
            hint = "name what it serves (--model, or model: in a recipe), or check the URL, which has no /v1"
            return BadInput(f"{address} lists no models: {why}", hint)
        try:
            return _models(json.loads(answer.body))
        except BROKEN as error:
            hint = "give the URL without /v1, of an OpenAI-compatible server; or name another protocol"
            return BadInput(f"the answer of {address} is not a list of models: {_named(error)}", hint)

    async def served(self, names: Sequence[str]) -> list[str]:
        """The names to send requests to: `names`, or else the only one that is served.

        A list of models may be missing or not tell all, such as aliases: a name that it lacks is tried, and what is
        odd is noted. Raises BadInput for one that is not served, and as `models` does.
        """
        if not names:
            known = [str(m["id"]) for m in await self.models()]
            if self.target.protocol == "tgi":
                return [""]  # a name would be an adapter's
            if len(known) > 1:
                raise BadInput(f"{self.target.url} serves several models", f"name one: {', '.join(known[:20])}")
            return known or [""]
        if self.target.protocol == "mii":
            return list(names)
        listed = await self._listed()
        if isinstance(listed, BadInput):
            self.notes.append(f"{listed.message}; {', '.join(names)} could not be looked up")
        elif listed and self.target.protocol != "tgi":
            known = [str(m["id"]) for m in listed]
            for name in dict.fromkeys(names):
                if name not in known:
                    await self._try(name, known)
        return list(names)

    async def _try(self, name: str, known: Sequence[str]) -> None:
        """Ask a name that the server does not list. Raises BadInput where that is no alias of what it serves."""
        hello = "Hello"
        reply = await self.ask(Prompt(({"role": "user", "content": hello},), hello), name, 1)
        if reply.error:
            hint = f"it serves: {', '.join(known[:20])}"
            raise BadInput(f"{self.target.url} serves no {name!r}: {reply.error}", hint)
        self.notes.append(f"the server does not list {name!r}, but answers to it: it may be an alias")

    async def metrics(self) -> str:
        """The engine's Prometheus metrics as text; "" where it has none."""
        try:
            answer = await self._http.get("/metrics", limit_s=min(METRICS_S, self.target.timeout_s))
        except (Unreachable, Lost, TimeoutError):
            return ""
        return answer.text if answer.status == 200 and "# TYPE" in answer.text else ""

    # ---- requests

    async def ask(self, prompt: Prompt, model: str, new_tokens: int, stop: bool = True) -> Reply:
        """One answer. Fields that not every server knows are left out from the first time on that it refuses them."""
        reply = await self.send(self.encoded(prompt, model, new_tokens, stop))
        if reply.status not in (400, 422) or not reply.error:
            return reply
        before = (self.extensions, self.usage, self.old_cap)
        error = reply.error
        while self._leave_out(error):
            fewer = await self.send(self.encoded(prompt, model, new_tokens, stop))
            if not fewer.error:
                self.refused = reply.error
                return fewer
            error = fewer.error
        self.extensions, self.usage, self.old_cap = before  # it was something else
        return reply

    def _leave_out(self, error: str) -> bool:
        """Leave out a field more: what the server's words name, else what is known least."""
        if self.old_cap and "max_completion_tokens" in error:
            self.old_cap = False
        elif self.usage and ("stream_options" in error or "include_usage" in error):
            self.usage = False
        elif self.extensions:
            self.extensions = False
        elif self.usage:
            self.usage = False
        else:
            return False
        return True

    def encoded(self, prompt: Prompt, model: str, new_tokens: int, stop: bool) -> bytes:
        """The body of a request, ready to send."""
        body = self.protocol.body(prompt, model, new_tokens, stop, self.extensions)
        if not self.usage:
            body.pop("stream_options", None)
        if not self.old_cap and "max_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_tokens")
        return json.dumps(body).encode()

    async def send(self, body: bytes, reply: Reply | None = None) -> Reply:
        """Send a body and follow its answer to the end, or for as long as its client stays. The answer is put into
        `reply`, which others may look at meanwhile, or else into a new one."""
        reply = reply or Reply(sent=time.perf_counter_ns())
        limit = self.target.timeout_s
        try:
            async with asyncio.timeout(limit):
                try:
                    await self._answered(body, reply)
                except Lost:
                    if reply.status:
                        raise
                    # A server may let go of a connection that it had kept just when it is used again (llama.cpp's
                    # does, after some requests): every client tries anew then, and what it took is in the times.
                    await self._answered(body, reply)
        except TimeoutError:
            n = len(reply.times)
            reply.fail(f"stalled after {n} tokens, for {limit:g} s in all" if n else f"no answer within {limit:g} s")
        except Unreachable as error:
            reply.fail(f"cannot connect: {_line(str(error))}")
        except TooLong as error:
            reply.fail(str(error))
        except Lost as error:
            reply.fail(f"connection lost after {len(reply.times)} tokens: {_line(str(error))}")
        except BROKEN as error:
            reply.fail(f"garbage in the answer: {_named(error)}")
        reply.done = reply.done or time.perf_counter_ns()
        reply.text = _whole_characters(reply.text)
        self.guessed += self.protocol.STREAMS and not reply.error and reply.guessed
        return reply

    async def _answered(self, body: bytes, reply: Reply) -> None:
        async with self._http.stream(self.protocol.PATH, body) as response:
            await self._follow(response, reply)

    async def post(self, path: str, body: bytes) -> Json:
        """A whole answer as parsed JSON, or as text what went wrong."""
        status, text = await self._whole(path, body)
        try:
            return json.loads(text) if status == 200 else f"HTTP {status}: {_said(text)}" if status else text
        except ValueError as error:
            return _named(error)

    async def lora(self, verb: str, name: str, folder: str = "") -> str:
        """ "load" an adapter from a folder that the server sees, or "unload" it, through vLLM's runtime API (SGLang has
        it too); "" when it is done, else what went wrong."""
        body = {"lora_name": name, **({"lora_path": folder} if folder else {})}
        status, text = await self._whole(f"/v1/{verb}_lora_adapter", json.dumps(body).encode())
        return "" if status == 200 else f"HTTP {status}: {_said(text)}" if status else text

    async def _whole(self, path: str, body: bytes) -> tuple[int, str]:
        """(status, text) of an answer; (0, reason) without one."""
        try:
            answer = await self._http.post(path, body)
        except TimeoutError:
            return 0, f"no answer within {self.target.timeout_s:g} s"
        except (Unreachable, Lost) as error:
            return 0, _line(str(error))
        return answer.status, answer.text

    async def _follow(self, response: Streaming, reply: Reply) -> None:
        reply.status = response.status
        if response.redirects_to:
            reply.error = f"HTTP {reply.status}: it redirects to {_to(response)}: give that address"
        elif reply.status != 200:
            text = (await response.beginning(events.MOST_BYTES)).decode(errors="replace")
            reply.error = f"HTTP {reply.status}: {_said(text)}"
        elif not self.protocol.STREAMS:
            reply.add(self.protocol.read(json.loads(await response.read())), time.perf_counter_ns())
        else:
            await self._stream(response, reply)

    async def _stream(self, response: Streaming, reply: Reply) -> None:
        kind = response.headers.get("content-type", "")
        pieces, head = response.pieces(), []
        if "event-stream" not in kind:  # some streams go by another name: the first bytes tell
            start = b""
            async for now, piece in pieces:
                head.append((now, piece))
                start += piece
                if len(start.lstrip()) >= events.TELLING:
                    break
            if not events.begin(start):
                text = start + await beginning(pieces, events.MOST_BYTES)
                why = _error_in(text.decode(errors="replace"))
                plain = f"does not stream: it answered {_line(kind) or 'without a content type'} to stream: true"
                reply.error = f"HTTP 200, and yet: {why}" if why else plain
                return
        async for now, message in events.messages(_joined(head, pieces)):
            if message is events.DONE:
                reply.done = now  # and on to the end of the response, so that its connection is used again
            elif not reply.done:
                reply.add(self.protocol.read(message), now)
                if reply.error or (reply.leave_after and len(reply.times) >= reply.leave_after):
                    return
        if not reply.finish and not (reply.done and reply.times):
            reply.error = f"the stream ended early, after {len(reply.times)} tokens"


async def _joined(
    head: Sequence[tuple[int, bytes]], rest: AsyncIterator[tuple[int, bytes]]
) -> AsyncIterator[tuple[int, bytes]]:
    for piece in head:
        yield piece
    async for piece in rest:
        yield piece


def checked(target: Target) -> Target:
    """Raises BadInput for a target that cannot be one."""
    if target.protocol not in protocols.NAMES:
        raise BadInput(f"no protocol named {target.protocol!r}", f"known: {', '.join(protocols.NAMES)}")
    if not target.url.startswith(("http://", "https://")):
        raise BadInput(f"{target.url!r} is not the URL of a server", "write it as in http://localhost:8000")
    check_no_password(target.url)
    if target.url.rstrip("/").endswith("/v1"):
        raise BadInput(f"{target.url} ends in /v1", "write the URL without /v1: the protocol adds the path")
    if not target.timeout_s > 0:
        raise BadInput(f"the timeout must be more than 0 s, not {target.timeout_s:g}", "leave it out for 120 s")
    try:
        address = urlsplit(target.url)
        host, _ = address.hostname, address.port
    except ValueError as error:
        raise BadInput(f"{target.url!r} is not a URL: {error}", "write it as in http://localhost:8000") from error
    if not host:
        raise BadInput(f"{target.url!r} names no server", "write it as in http://localhost:8000")
    return replace(target, url=target.url.rstrip("/"))


def _models(data: Json) -> list[dict[str, Json]]:
    """The models in an answer: OpenAI's {"data": […]}, or a bare list. Raises TypeError for another shape."""
    listed = data.get("data", data.get("models")) if isinstance(data, Mapping) else data
    if listed is None and isinstance(data, Mapping) and "data" in data:
        return []
    if not isinstance(listed, list):
        raise TypeError(f"it is {_error_in(json.dumps(data)) or type(data).__name__}")
    return [dict(m) for m in listed if isinstance(m, Mapping) and isinstance(m.get("id"), str)]


def _to(answer: Head) -> str:
    """Where an answer redirects to, in words that can be printed."""
    return repr(answer.redirects_to)[1:-1][:200]


def _said(text: str) -> str:
    """A server's own words about an error, in a line."""
    return _error_in(text) or _line(text) or "(no reason given)"


def _error_in(text: str) -> str:
    """The error that a JSON text tells of, in a line; "" = none, or no JSON."""
    try:
        return _line(protocols.error_of(json.loads(text)))
    except (ValueError, RecursionError):
        return ""


def _line(text: str) -> str:
    """At most 200 characters in one line, all of which can be written."""
    return " ".join(_whole_characters(text).split())[:200]


def _whole_characters(text: str) -> str:
    """Halves of a character (lone surrogates) joined where they are a pair, else replaced: they cannot be written."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _named(error: BaseException) -> str:
    return _line(f"{type(error).__name__}: {error}") if str(error) else type(error).__name__


def labels(models: Sequence[Mapping[str, Json]]) -> str:
    """Who made this server, by what it calls the owner of its models: "vllm", "sglang", "llamacpp", …; "" unknown."""
    return str(models[0].get("owned_by", "")) if models else ""
