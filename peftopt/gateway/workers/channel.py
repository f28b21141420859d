"""Two processes that talk over a socket: JSON, one message a line. Either side asks, tells, and answers."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable

from peftopt.records import Json

MOST_BYTES = 64 * 2**20
"""The longest message: the metrics of many versions."""

Handle = Callable[[str, Json], Awaitable[Json]]


class Closed(Exception):
    """The other side is gone."""


class Channel:
    """One end. `handle` gets each message of the other side, by its kind; its result is the answer to a question.
    Messages are started in the order in which they were sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handle: Handle) -> None:
        self._reader, self._writer, self._handle = reader, writer, handle
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Json]] = {}
        self._handling: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Read until either side is gone. Raises what `handle` raises."""
        try:
            while (line := await self._reader.readline()).endswith(b"\n"):  # half a line is of one that was killed
                self._take(json.loads(line))
        except ConnectionError:
            return
        finally:
            self.close()
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(Closed())

    def close(self) -> None:
        """Let go of the socket: `run` ends."""
        self._writer.close()

    def tell(self, kind: str, value: Json = None, number: int = 0) -> None:
        """Send a message that nobody answers, unless it has a number. Raises Closed."""
        self._send({"kind": kind, "value": value, "number": number})

    async def ask(self, kind: str, value: Json = None) -> Json:
        """Send a message; the other side's answer. Raises Closed."""
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self.tell(kind, value, number)
            return await answer
        finally:
            del self._asked[number]

    def _take(self, message: Json) -> None:
        if "answers" in message:
            answer = self._asked.get(message["answers"])
            if answer and not answer.done():
                answer.set_result(message["value"])
            return
        task = asyncio.ensure_future(self._handled(message))
        self._handling.add(task)
        task.add_done_callback(self._over)

    async def _handled(self, message: Json) -> None:
        value = await self._handle(message["kind"], message["value"])
        if message["number"]:
            self._send({"answers": message["number"], "value": value})

    def _over(self, task: asyncio.Task[None]) -> None:
        self._handling.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception) and not isinstance(
            error, Closed
        ):  # a fault of ours: neither side may go on half told
            self._reader.set_exception(error)

    def _send(self, message: Json) -> None:
        if self._writer.is_closing():
            raise Closed
        self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
