"""promtool and Prometheus, from the PATH or as `make prometheus` has fetched them; a Prometheus that runs."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from helpers.waiting import wait_until
from peftopt.engines._server import free_port

FETCHED = Path(__file__).parent.parent.parent / ".venv" / "prometheus" / "usr" / "bin"
BIG_S = 60.0


def tool(name: str) -> str:
    """The path of a program; "" where it is not here."""
    return shutil.which(name) or shutil.which(name, path=FETCHED) or ""


needs_promtool = pytest.mark.skipif(not tool("promtool"), reason="needs promtool: make prometheus")
needs_prometheus = pytest.mark.skipif(not tool("prometheus"), reason="needs Prometheus: make prometheus")


def promtool(folder: Path, *arguments: str) -> tuple[int, str]:
    """Its exit code and what it printed."""
    command = [tool("promtool"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10 * BIG_S)
    return done.returncode, done.stdout + done.stderr


@dataclass
class Prometheus:
    """A Prometheus that runs."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API; the test fails by what it says is wrong."""
        answer = httpx2.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=BIG_S).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def query(self, expr: str) -> list[Any]:
        """The samples that an expression has now."""
        return list(self.get("query", query=expr)["result"])


@contextlib.contextmanager
def scraping(folder: Path, target: str, *rules: str) -> Iterator[Prometheus]:
    """A Prometheus that reads a target, and rules in a folder, every second, until this ends."""
    every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    scrapes = [{"job_name": "test", "static_configs": [{"targets": [target]}]}]
    config = {"global": every, "rule_files": list(rules), "scrape_configs": scrapes}
    (folder / "scraping.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [tool("prometheus"), "--config.file=scraping.yml", f"--web.listen-address=127.0.0.1:{port}"]
    log = folder / "prometheus.log"
    with log.open("w") as said:
        storage = "--storage.tsdb.path=data"
        process = subprocess.Popen([*command, storage], cwd=folder, stdout=said, stderr=said)
        server = Prometheus(f"http://127.0.0.1:{port}")
        try:
            wait_until(lambda: process.poll() is None and _ready(server), log.read_text)
            yield server
        finally:
            process.kill()
            process.wait()


def _ready(server: Prometheus) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        return httpx2.get(f"{server.url}/-/ready", timeout=5.0).status_code == 200
    return False
