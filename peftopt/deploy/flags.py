"""The words of a command line, with their reasons. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """Words of a command line, and where they come from; `bash` writes them where a variable stands for a part."""

    words: tuple[str, ...]
    why: str
    bash: str = ""

    @property
    def text(self) -> str:
        """The words as bash reads them."""
        return self.bash or shlex.join(self.words)


@dataclass(frozen=True)
class Variable:
    """A variable of the environment that a caller may set, and its value otherwise."""

    name: str
    value: str
    why: str


def grouped(words: Sequence[str]) -> list[tuple[str, ...]]:
    """The words of a command line, each option with what follows it up to the next."""
    groups: list[tuple[str, ...]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append((word,))
        else:
            groups[-1] = (*groups[-1], word)
    return groups
