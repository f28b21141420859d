"""One request to a server over HTTP, streamed, every token's arrival timed. A fault is a Reply with its reason.

Nothing a server does makes `ask` raise or hang: refusals, resets, stalls and garbage are answers too, and are counted.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftopt import protocols
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.protocols import Event, Prompt
from peftopt.records import Json

if TYPE_CHECKING:
    import httpx

MOST_BYTES = 1 << 20
"""A single message longer than this is no message."""


@dataclass(frozen=True)
class Target:
    """Where to send requests, and in which form. `model` is a served name, "" = the only one; `key_env` names the
    environment variable that holds the API key; a request takes at most `timeout_s`, whole."""

    url: str
    protocol: str = "chat"
    model: str = ""
    key_env: str = ""
    timeout_s: float = 120.0


@dataclass
class Reply:
    """An answer, whole or not. Times are perf_counter_ns; `times` has one for each message that brought a token.

    `error` is "" for an answer that is complete. `new_tokens` is the server's count, else the number of messages.
    """

    sent: int
    done: int = 0
    times: list[int] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str = ""
    prompt_tokens: int | None = None
    counted: int | None = None
    status: int = 0
    error: str = ""

    @property
    def new_tokens(self) -> int:
        return self.counted if self.counted is not None else len(self.ids) or len(self.times)

    def fail(self, error: str) -> None:
        """What happens after the answer is complete is no failure of the request."""
        self.error = "" if self.done else error

    def add(self, event: Event, now: int) -> None:
        if event.is_token:
            self.times.append(now)
        self.text += event.text
        self.ids += event.ids
        self.finish = event.finish or self.finish
        self.error = event.error or self.error
        self.prompt_tokens = self.prompt_tokens if event.prompt_tokens is None else event.prompt_tokens
        self.counted = self.counted if event.new_tokens is None else event.new_tokens


class Client:
    """Connections to one server. Use as an async context manager."""

    def __init__(self, target: Target) -> None:
        import httpx

        self.target = checked(target)
        self.protocol = protocols.module(target.protocol)
        self.extensions = True
        self.refused = ""
        """What the server said of the fields beyond OpenAI's, where it refused them."""
        headers = {"Content-Type": "application/json"}
        if target.key_env:
            headers["Authorization"] = f"Bearer {_key(target.key_env)}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(target.timeout_s, connect=min(10.0, target.timeout_s)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=not _is_here(target.url),  # a proxy is no way to this machine
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    # ---- what the server says of itself

    async def models(self) -> list[dict[str, Json]]:
        """The served models and adapters, as /v1/models lists them; [] for a protocol without such a list.

        Raises MissingEnvironment when no server answers, BadInput when what answers is no such server.
        """
        import httpx

        url = self.target.url
        if self.target.protocol == "mii":
            return []
        try:
            answer = await self._http.get(f"{url}/v1/models")
            if answer.status_code in (401, 403):
                raise BadInput(
                    f"{url} refuses the API key (HTTP {answer.status_code})", "name its variable: api_key_env"
                )
            if answer.status_code == 404 and self.target.protocol == "tgi":
                return []
            answer.raise_for_status()
            return [dict(m) for m in answer.json()["data"]]
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            hint = "give the URL without /v1, of an OpenAI-compatible server; or name another protocol"
            raise BadInput(f"{url}/v1/models is no list of models: {_named(error)}", hint) from error
        except httpx.HTTPError as error:
            raise MissingEnvironment(
                f"no server at {url}: {_named(error)}", "start it, or check the address"
            ) from error

    async def served(self, names: Sequence[str]) -> list[str]:
        """The names to send requests to: `names`, each of which must be served, or else the only one there is."""
        known = [str(m["id"]) for m in await self.models()]
        if not names and self.target.protocol == "tgi":
            return [""]  # a name would be an adapter's
        if not names:
            if len(known) > 1:
                raise BadInput(f"{self.target.url} serves several models", f"name one: {', '.join(known[:20])}")
            return known or [""]
        for name in names:
            if known and name not in known and self.target.protocol != "tgi":
                raise BadInput(f"{self.target.url} serves no {name!r}", f"it serves: {', '.join(known[:20])}")
        return list(names)

    async def metrics(self) -> str:
        """The engine's Prometheus metrics as text; "" where it has none."""
        import httpx

        try:
            answer = await self._http.get(f"{self.target.url}/metrics", timeout=5.0)
        except httpx.HTTPError:
            return ""
        return answer.text if answer.status_code == 200 and "# TYPE" in answer.text else ""

    # ---- requests

    async def ask(self, prompt: Prompt, model: str, new_tokens: int, stop: bool = True) -> Reply:
        """One answer. The fields beyond OpenAI's are left out from the first time on that the server refuses them."""
        reply = await self.send(self.encoded(prompt, model, new_tokens, stop))
        if self.extensions and reply.status in (400, 422) and reply.error:
            plain = await self.send(self.encoded(prompt, model, new_tokens, stop, extensions=False))
            if not plain.error:
                self.extensions, self.refused = False, reply.error
                return plain
        return reply

    def encoded(self, prompt: Prompt, model: str, new_tokens: int, stop: bool, extensions: bool | None = None) -> bytes:
        """The body of a request, ready to send."""
        extensions = self.extensions if extensions is None else extensions
        return json.dumps(self.protocol.body(prompt, model, new_tokens, stop, extensions)).encode()

    async def send(self, body: bytes) -> Reply:
        """Send a body and follow its answer to the end."""
        import httpx

        reply = Reply(sent=time.perf_counter_ns())
        limit = self.target.timeout_s
        try:
            async with asyncio.timeout(limit):
                try:
                    await self._answered(body, reply)
                except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                    if reply.status:
                        raise
                    # A server may let go of a connection that it had kept just when it is used again (llama.cpp's
                    # does, after some requests): every client tries anew then, and what it took is in the times.
                    await self._answered(body, reply)
        except (TimeoutError, httpx.TimeoutException):
            n = len(reply.times)
            reply.fail(f"stalled after {n} tokens, for {limit:g} s in all" if n else f"no answer within {limit:g} s")
        except httpx.ConnectError as error:
            reply.fail(f"cannot connect: {_named(error)}")
        except httpx.HTTPError as error:
            reply.fail(f"connection lost after {len(reply.times)} tokens: {_named(error)}")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reply.fail(f"garbage in the answer: {_named(error)}")
        reply.done = reply.done or time.perf_counter_ns()
        return reply

    async def _answered(self, body: bytes, reply: Reply) -> None:
        async with self._http.stream("POST", self.target.url + self.protocol.PATH, content=body) as response:
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
        import httpx

        try:
            async with asyncio.timeout(self.target.timeout_s):
                answer = await self._http.post(self.target.url + path, content=body)
            return answer.status_code, answer.text
        except TimeoutError:
            return 0, f"no answer within {self.target.timeout_s:g} s"
        except httpx.HTTPError as error:
            return 0, _named(error)

    async def _follow(self, response: httpx.Response, reply: Reply) -> None:
        reply.status = response.status_code
        kind = response.headers.get("content-type", "")
        if reply.status != 200:
            text = (await response.aread())[:MOST_BYTES].decode(errors="replace")
            reply.error = f"HTTP {reply.status}: {_said(text)}"
        elif not self.protocol.STREAMS:
            reply.add(self.protocol.read(json.loads(await response.aread())), time.perf_counter_ns())
        elif "event-stream" not in kind:
            reply.error = f"does not stream: it answered {kind or 'without a content type'} to stream: true"
        else:
            async for now, message in _messages(response):
                if message == "[DONE]":
                    reply.done = now  # and on to the end of the response, so that its connection is used again
                elif not reply.done:
                    reply.add(self.protocol.read(json.loads(message)), now)
                    if reply.error:
                        return
            if not reply.finish:
                reply.error = f"the stream ended early, after {len(reply.times)} tokens"


async def _messages(response: httpx.Response) -> AsyncIterator[tuple[int, str]]:
    """The data of each server-sent event with the time its bytes arrived; comments and other fields are skipped.

    Source: html.spec.whatwg.org, section 9.2.6 (one line of data each, as all these servers send it).
    """
    rest = b""
    async for piece in response.aiter_bytes():
        now = time.perf_counter_ns()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line[5:].strip().decode()
            elif line.strip() and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                raise ValueError(f"{line[:80]!r} is no server-sent event")
        if len(rest) > MOST_BYTES:
            raise ValueError(f"a message longer than {MOST_BYTES} bytes")


def checked(target: Target) -> Target:
    """Raises BadInput for a target that cannot be one."""
    if target.protocol not in protocols.NAMES:
        raise BadInput(f"no protocol named {target.protocol!r}", f"known: {', '.join(protocols.NAMES)}")
    if not target.url.startswith(("http://", "https://")):
        raise BadInput(f"{target.url!r} is no URL of a server", "give it like http://localhost:8000")
    if "@" in target.url.split("/")[2]:
        raise BadInput("the URL holds a password", "take it out, and name the variable of an API key: api_key_env")
    if target.url.rstrip("/").endswith("/v1"):
        raise BadInput(f"{target.url} ends in /v1", "give it without: the protocol knows its path")
    if not target.timeout_s > 0:
        raise BadInput(f"timeout_s: {target.timeout_s} is no time", "give seconds, more than 0")
    return Target(target.url.rstrip("/"), target.protocol, target.model, target.key_env, target.timeout_s)


def _key(variable: str) -> str:
    try:
        return os.environ[variable]
    except KeyError:
        raise BadInput(f"the environment has no {variable}", f"export {variable}=…, then run this again") from None


def _is_here(url: str) -> bool:
    host = url.split("/")[2].rpartition(":")[0] or url.split("/")[2]
    return host.strip("[]") in ("localhost", "127.0.0.1", "::1")


def _said(text: str) -> str:
    """A server's own words about an error, in a line."""
    try:
        data: Any = json.loads(text)
    except ValueError:
        data = None
    return protocols.error_of(data) or " ".join(text.split())[:200] or "(no reason given)"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200] if str(error) else type(error).__name__


def labels(models: Sequence[Mapping[str, Json]]) -> str:
    """Who made this server, by what it calls the owner of its models: "vllm", "sglang", "llamacpp", …; "" unknown."""
    return str(models[0].get("owned_by", "")) if models else ""
