"""Machines that share artifacts, as processes: each has a results folder of its own.

`python -m helpers.nodes URL HOME PLAN` makes the machines of a plan (JSON), a list of lists: those of an inner list run
at once, the next list when they have ended. Prints what each has found, as JSON. They are forks of one process, which
has imported everything and has asked the place nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftopt import store
from peftopt.records import Build, Model, Step
from peftopt.runner import lease, objects, remote

BUILD = Build("ab" + "0" * 62, "", Step("merge", "transform", "merge"))
FILES = 2
OPERATIONS = ("pipe_file", "put_file", "get_file", "cat_file", "info", "rm_file", "mv", "open")
"""What a machine asks the place for."""


@dataclass(frozen=True)
class Node:
    """A machine: its `name`, which is that of its results folder. `dies_at`: the operation of the place before which it
    is killed, 0 for none; in the middle of the one that carries a file. `builds_s`: how long it builds. Without
    `leases` it builds although others do. `place` is added to the URL. It takes over a lease that is silent for
    `stale_s`."""

    name: str
    dies_at: int = 0
    builds_s: float = 0.0
    leases: bool = True
    place: str = ""
    stale_s: float = 60.0


@dataclass(frozen=True)
class Found:
    """What a machine has in the end: the hash of its artifact, whether it built it, what it said, and how many
    operations there were. `content` is "" for one that was killed."""

    content: str = ""
    built: bool = False
    said: tuple[str, ...] = ()
    operations: int = 0


def nodes(url: str, home: Path, plan: Sequence[Sequence[Node]]) -> list[list[Found]]:
    """What the machines of a plan have found."""
    text = json.dumps([[asdict(node) for node in together] for together in plan])
    words = [sys.executable, "-m", "helpers.nodes", url, str(home), text]
    ended = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [[Found(**each) for each in together] for together in json.loads(ended.stdout)]


def make(folder: Path) -> tuple[Model, dict[str, Any]]:
    """Build a model as nobody else does, so that what two have built cannot be mixed unnoticed."""
    unique = uuid.uuid4().hex
    (folder / "parts").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for number in range(FILES):
        (folder / "parts" / f"{number}.safetensors").write_bytes(f"{number} of {unique} ".encode() * 100)
    return Model(str(folder)), {"seconds": 1.0, "tier0": []}


def tear(operation: str, source: Any, target: Any = "", *_: Any) -> None:
    """Do the first half of an operation that writes a file; nothing of others."""
    if operation in ("put_file", "get_file"):
        content = Path(source).read_bytes()
        Path(target).write_bytes(content[: len(content) // 2])
    elif operation == "pipe_file":
        Path(source).write_bytes(target[: len(target) // 2])


@dataclass
class Dying:
    """A file system on which this process is killed at its `at`-th operation."""

    fs: Any
    at: int
    count: int = field(default=0)

    def __getattr__(self, name: str) -> Any:
        work = getattr(self.fs, name)
        return self._counted(name, work) if name in OPERATIONS else work

    def _counted(self, name: str, work: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count != self.at:
                return work(*arguments, **options)
            if "file" in self.fs.protocol:  # a bucket's objects appear whole
                tear(name, *arguments)
            return os.kill(os.getpid(), signal.SIGKILL)

        return counted


def obtained(url: str, home: Path, node: Node) -> Found:
    """What a machine has, in its own process. A lease that is held for a moment alone has no beats, which would be
    operations of their own."""
    said: list[str] = []
    lease.STALE_S, lease.LOOK_S = node.stale_s, 0.05
    lease.BEAT_S = 0.1 if node.builds_s else 60.0
    place = remote.opened(url, said.append, said.append)
    dying = Dying(place.objects.fs, node.dies_at)
    place = remote.Remote(objects.Objects(dying, place.objects.root, url), said.append, said.append)
    if not node.leases:
        objects.Objects.create = lambda self, name, content: True  # type: ignore[method-assign]

    def slowly(folder: Path) -> tuple[Model, dict[str, Any]]:
        time.sleep(node.builds_s)
        return make(folder)

    results = store.Store(home / node.name, said.append)
    with results.locked(BUILD):
        artifact = place.obtain(results, BUILD, slowly, home, lambda reached: None)
    assert results.find(BUILD), "what it has is not whole"
    return Found(artifact.content, not artifact.cached, tuple(said), dying.count)


def forked(url: str, home: Path, node: Node) -> int:
    """The id of a new process that is this machine. What it has found lies in its file."""
    process = os.fork()
    if process:
        return process
    found = obtained(url + node.place, home, node)
    (home / f"{node.name}.json").write_text(json.dumps(asdict(found)))
    os._exit(0)


def main(url: str, home: Path, plan: Sequence[Sequence[Node]]) -> list[list[Found]]:
    """Make all machines, one list after the other."""
    found = []
    for together in plan:
        for process in [forked(url, home, node) for node in together]:
            _, status = os.waitpid(process, 0)
            assert os.WIFSIGNALED(status) or status == 0, "its traceback is above"
        files = [home / f"{node.name}.json" for node in together]
        found.append([Found(**json.loads(file.read_text())) if file.exists() else Found() for file in files])
        for file in files:
            file.unlink(missing_ok=True)
    return found


if __name__ == "__main__":
    asked = [[Node(**node) for node in together] for together in json.loads(sys.argv[3])]
    ended = main(sys.argv[1], Path(sys.argv[2]), asked)
    sys.stdout.write(json.dumps([[asdict(each) for each in together] for together in ended]))
