"""A launch script: a command line in bash, with the reason of each option beside it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from peftopt.deploy.deployed import File
from peftopt.deploy.flags import Flag, Variable
from peftopt.deploy.rendering import rendered


@dataclass(frozen=True)
class Script:
    """`head`: lines about the whole; `program`: what is started, as bash reads it; `left`: options that stay at the
    program's own default, and why; `folder`: where it is started, "" for anywhere; `environment`: variables that the
    program itself reads."""

    name: str
    head: tuple[str, ...]
    program: str
    flags: tuple[Flag, ...]
    variables: tuple[Variable, ...] = ()
    environment: tuple[Variable, ...] = ()
    left: tuple[Flag, ...] = ()
    folder: str = ""

    @property
    def file(self) -> File:
        """The script to write."""
        return File(self.name, rendered("script.sh", script=self))


def address(host: str = "127.0.0.1", port: int = 8000) -> tuple[Variable, ...]:
    """The variables HOST and PORT."""
    return (
        Variable("HOST", host, "the address to listen on; no engine asks for a key by itself"),
        Variable("PORT", str(port), "its port"),
    )


LISTEN = Flag((), "where it listens: see HOST and PORT above", bash='--host "$HOST" --port "$PORT"')
"""The options of every engine for its address."""
