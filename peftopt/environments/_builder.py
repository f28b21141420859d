"""What an environment's file declares: a `Builder`, with pins from a lock file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Module = Callable[..., None]
"""`module("pip", *arguments, **variables)` runs a module in the new environment, with variables."""


def install_pins(builder: Builder, folder: Path, module: Module) -> None:
    """Install the pins, with whatever they ask for."""
    module("pip", "install", *builder.pins)


def nothing_to_check() -> None:
    """Any machine can build it."""


@dataclass(frozen=True)
class Builder:
    """How an environment is built.

    `megabytes` is about what it takes on the disk. `tools` are pins of what is there only while it is built.
    `check` raises MissingEnvironment when this machine lacks what the build takes. `build` gets the new environment's
    folder, and installs where `pip install` alone is not enough.
    """

    pins: tuple[str, ...]
    megabytes: int
    tools: tuple[str, ...] = ()
    check: Callable[[], None] = nothing_to_check
    build: Callable[[Builder, Path, Module], None] = install_pins

    def identity(self) -> list[str]:
        """What an installed environment is compared with: one that was built from other pins is outdated."""
        return [*self.pins, *self.tools]

    def pin(self, library: str) -> str:
        """The pin of one library, for pip."""
        return f"{library}=={self.versions()[library]}"

    def versions(self) -> dict[str, str]:
        """The pinned version of each library."""
        return dict(pin.split("==", 1) for pin in self.pins)


def locked(name: str) -> tuple[str, ...]:
    """The pins of a lock file beside this module, in the file's order."""
    lines = (Path(__file__).parent / f"{name}.lock").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))
