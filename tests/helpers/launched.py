"""A server that a test starts by a command line, and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx2

from helpers.waiting import wait_until


@contextlib.contextmanager
def launched(
    command: Sequence[object], port: int, folder: Path | None = None, variables: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The URL of the server on that port, once it answers; ended as by Ctrl-C. One that ends by itself, or that does
    not answer within five minutes, fails."""
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, **(variables or {})}
    words = [str(word) for word in command]
    with httpx2.Client(trust_env=False) as client, subprocess.Popen(words, cwd=folder, env=environment) as process:

        def answers() -> bool:
            assert process.poll() is None, "the server has ended"
            with contextlib.suppress(httpx2.HTTPError):
                return client.get(f"{url}/health").status_code == 200
            return False

        try:
            wait_until(answers, seconds=300)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
