"""An engine of another environment as a test sees it: calls go to a process of that environment's Python, as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peftopt import environments, plugins
from peftopt.engines import Generation, Scores
from peftopt.engines._prefix import Reuse
from peftopt.engines._speculation import Speculation
from peftopt.records import Model

ASKED = {"speculation": Speculation, "reuse": Reuse}
"""What an engine is opened with besides its parameters, by argument of `open`."""


class Remote:
    """Speaks the contract of `peftopt.engines.Engine`; `special_tokens` and `eos` are sets again on this side."""

    def __init__(
        self,
        name: str,
        model: Model,
        speculation: Speculation | None = None,
        reuse: Reuse | None = None,
        **params: object,
    ) -> None:
        python = environments.interpreter(plugins.catalogue()[name])
        variables = {**os.environ, "PYTHONPATH": str(Path(plugins.__file__).parent.parent)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.folder = tempfile.TemporaryDirectory()  # as in a run, servers leave their logs where they stand
        self.process = subprocess.Popen([python, __file__], text=True, env=variables, cwd=self.folder.name, **pipes)
        beside = {"speculation": speculation, "reuse": reuse}
        told = {argument: dataclasses.asdict(how) for argument, how in beside.items() if how}
        self._call(name, dataclasses.asdict(model), params, told)

    def _call(self, *message: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if isinstance(answer, dict) and "raised" in answer:
            raise RuntimeError(answer["raised"])
        return answer

    def __getattr__(self, name: str) -> Any:
        if name in ("eos", "special_tokens"):
            return frozenset(self._call("get", name))
        if name in ("scores", "threads", "device", "adapter_switch_time"):
            return self._call("get", name)
        if name == "close_engine":
            return lambda: self._call("call", "close")
        return lambda *arguments: self._call("set" if name == "pretend_eos" else "call", name, *arguments)

    def encode(self, *arguments: Any) -> tuple[list[int], list[int]]:
        return tuple(self._call("call", "encode", *arguments))

    def generate(self, *arguments: Any) -> list[Generation]:
        return [Generation(**each) for each in self._call("call", "generate", *arguments)]

    def score(self, *arguments: Any) -> list[Scores]:
        return [Scores(**each) for each in self._call("call", "score", *arguments)]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()
        self.folder.cleanup()


def plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else sorted(value)


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        kind, *rest = json.loads(line)
        try:
            if engine is None:
                module, (folder, params, told), answer = plugins.module("engine", kind), rest, None
                beside = {argument: ASKED[argument](**how) for argument, how in told.items()}
                model = Model(folder["path"], tuple(folder["adapters"]))
                engine = module.open(model, module.Params(**params), **beside)
            elif kind == "get":
                answer = getattr(engine, rest[0])
            elif kind == "set":
                engine.eos, answer = frozenset(rest[1]), None
            else:
                answer = getattr(engine, rest[0])(*rest[1:])
        except Exception as error:  # noqa: BLE001 (the test's to judge)
            answer = {"raised": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer, default=plain) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
