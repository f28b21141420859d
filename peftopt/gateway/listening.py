"""Serves applications on sockets: uvicorn, without its own signals and messages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftopt.errors import BadInput, MissingEnvironment
from peftopt.gateway.heads import READ_S, bounded

if TYPE_CHECKING:
    import uvicorn

Where = Path | tuple[str, int] | socket.socket
"""A path of a socket, a host and a port, or a socket that is bound already."""

CLOSE_S = 2
"""Seconds that connections have at the end, once their requests are over or cut off."""


@contextlib.asynccontextmanager
async def listening(app: Any, where: Where, read_s: float = READ_S) -> AsyncIterator[None]:
    """Serve the application until this context ends; a request may take `read_s` seconds to arrive, 0 = any. Raises
    MissingEnvironment for an address that is taken."""
    server = _server(app, where, read_s)
    task = asyncio.ensure_future(server.serve([where] if isinstance(where, socket.socket) else None))
    while not server.started:
        if task.done():
            task.result()
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def operated(app: Any, where: Path | tuple[str, int], read_s: float = READ_S) -> AsyncIterator[None]:
    """The same for operators: only this user may open the socket's path. Raises BadInput for a path where something
    else exists."""
    if not isinstance(where, Path):
        async with listening(app, where, read_s):
            yield
        return
    async with listening(app, private(where, "--admin unix:PATH"), read_s):
        yield
    where.unlink(missing_ok=True)


def private(path: Path, option: str) -> socket.socket:
    """A socket at a path that only this user can open, from its first moment on. A socket of an earlier process there
    is removed. Raises BadInput, which names the `option`, for a path where something else exists, MissingEnvironment
    for one that cannot be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_socket():
        raise BadInput(f"{path} is there, and it is not a socket", f"name another path: {option}")
    path.unlink(missing_ok=True)
    found = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        found.bind(str(path))
    except OSError as error:
        found.close()
        raise MissingEnvironment(f"cannot listen on {path}: {error}", f"choose another: {option}") from error
    finally:
        os.umask(before)
    return found


def settings(read_s: float = READ_S) -> dict[str, Any]:
    """Uvicorn's settings for all users' sockets."""
    return {"log_level": "error", "access_log": False, "server_header": False, "http": bounded(read_s), "ws": "none"}


def _server(app: Any, where: Where, read_s: float) -> uvicorn.Server:
    import uvicorn

    class Quiet(uvicorn.Server):
        """Signals are the gateway's business, and so is what to say of an address that is taken."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            try:
                await super().startup(sockets)
            except SystemExit:
                hint = "choose another: --port or --admin"
                raise MissingEnvironment(f"cannot listen on {_shown(self)}", hint) from None

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    place: dict[str, Any] = {"uds": str(where)} if isinstance(where, Path) else {}
    if isinstance(where, tuple):
        place = {"host": where[0], "port": where[1]}
    return Quiet(uvicorn.Config(app, **place, **settings(read_s), lifespan="off", timeout_graceful_shutdown=CLOSE_S))


def _shown(server: uvicorn.Server) -> str:
    return server.config.uds or f"{server.config.host}:{server.config.port}"


def address(text: str) -> Path | tuple[str, int]:
    """The operators' address. Raises BadInput if it is neither a socket nor a port."""
    if text.startswith("unix:"):
        return Path(text.removeprefix("unix:"))
    host, _, port = text.rpartition(":")
    if not port.isdigit():
        raise BadInput(f"--admin {text!r} is no address", "write unix:PATH or 127.0.0.1:8001")
    return host or "127.0.0.1", int(port)


def socket_of(state: Path, name: str = "admin") -> str:
    """The default socket of operators (or workers): in the state's folder, or if that path is too long for one (108
    bytes on Linux), in the user's runtime folder."""
    path = state.resolve() / f"{name}.sock"
    if len(os.fsencode(path)) > 100:
        own = f"peftopt-{os.getuid()}-{os.getpid()}" + (f"-{name}" if name != "admin" else "")
        path = Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp")) / f"{own}.sock"  # nosec B108 # bound with the owner's mode
    return f"unix:{path}"
