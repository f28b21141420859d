"""The users' side as an ASGI application, for a server that starts the workers itself, such as gunicorn.

The worker joins the supervisor, `peftopt serve --join PATH`, by the socket that the environment variable PEFTOPT_JOIN
names. `peftopt export gunicorn` writes a configuration that starts both.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from peftopt.errors import BadInput, PeftoptError
from peftopt.gateway.app import App
from peftopt.gateway.exchange import Receive, Scope, Send
from peftopt.gateway.workers.joined import Joined

JOIN = "PEFTOPT_JOIN"


class Application:
    """Joins at its lifespan's startup, and leaves at its shutdown (asgi.readthedocs.io, Lifespan)."""

    def __init__(self) -> None:
        self._answers: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request of ASGI's, or live through a lifespan."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._answers:
            await self._answers(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        joined = Joined(0)
        try:
            await joined.connect(_socket())
        except PeftoptError as error:
            await send({"type": "lifespan.startup.failed", "message": f"{error.message}; {error.hint}"})
            return
        async with joined.answering() as shared:
            self._answers = App(shared)
            await send({"type": "lifespan.startup.complete"})
            leaving = asyncio.ensure_future(_leave(joined))
            await receive()  # lifespan.shutdown
            leaving.cancel()
        await send({"type": "lifespan.shutdown.complete"})


def _socket() -> Path:
    """Raises BadInput where the variable is not set."""
    if not (path := os.environ.get(JOIN)):
        raise BadInput(f"the environment variable {JOIN} is not set", "set it to the socket of peftopt serve --join")
    return Path(path)


async def _leave(joined: Joined) -> None:
    """End this process when the supervisor is gone: who has started it starts another."""
    await joined.ended.wait()
    os.kill(os.getpid(), signal.SIGTERM)


app = Application()
