"""Run a worker of `peftopt serve --workers`: python -m peftopt.gateway.workers --join PATH --index 1 --fd 5."""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
from pathlib import Path

from peftopt.errors import PeftoptError
from peftopt.gateway.app import App
from peftopt.gateway.listening import listening
from peftopt.gateway.workers.joined import Joined


async def worker(path: Path, index: int, users: socket.socket) -> None:
    """Answer until the supervisor says that it is over, or is gone."""
    joined = Joined(index)
    await joined.connect(path)
    async with joined.answering() as shared, listening(App(shared), users, shared.settings.read_s):
        await joined.ended.wait()


def main() -> None:
    """Run one worker. Its signals are the supervisor's business: all processes of a terminal get its signals."""
    import uvloop

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="peftopt.gateway.workers")
    parser.add_argument("--join", type=Path, required=True, help="the supervisor's socket")
    parser.add_argument("--index", type=int, required=True, help="which of the workers it is, from 1")
    parser.add_argument("--fd", type=int, required=True, help="the file descriptor of the socket that users come to")
    options = parser.parse_args()
    users = socket.socket(fileno=options.fd)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(worker(options.join, options.index, users))
    except PeftoptError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201 (the supervisor's terminal)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
