"""The subject of a diagnosis, and the abilities of its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OURS, VLLM, LLAMACPP = "eager", "vllm", "llamacpp_server"
STARTED = (OURS, VLLM, LLAMACPP)
"""Engines whose servers a diagnosis starts; any other is the URL of a server that runs."""


@dataclass(frozen=True)
class Setting:
    """A base, its adapters by served name, and the engine's name or a URL. `base_name`: the base's served name.
    Requests have `prompt_tokens`, or the prompts of a file. A usual answer has `new_tokens`; a timed one has only
    `steps` of them, since each token takes about the same time. `slo`: the service levels, () for a level that is
    derived from a lone request. `threads` of a server, 0 = all cores."""

    base: str
    adapters: Mapping[str, str]
    engine: str = OURS
    base_name: str = "base"
    prompts: str = ""
    prompt_tokens: int = 24
    new_tokens: int = 64
    steps: int = 4
    slo: tuple[str, ...] = ()
    threads: int = 0

    @property
    def first(self) -> str:
        """The adapter that is examined first."""
        return next(iter(self.adapters))

    @property
    def runs_elsewhere(self) -> bool:
        """Whether the server is not ours, so that it cannot be started in another way."""
        return "://" in self.engine


@dataclass(frozen=True)
class Abilities:
    """What an engine's servers can do: be started here (`starts`), choose adapters by name (`apart`), load them while
    they run (`loads`), serve virtual tokens (`virtual`), reuse a prefix if they are told to (`prefixes`); and whether
    they must be told at their start that they will serve adapters (`told`), and compute several in one batch
    (`mixes`)."""

    starts: bool = True
    apart: bool = True
    loads: bool = True
    virtual: bool = False
    prefixes: bool = False
    told: bool = False
    mixes: bool = False


ABILITIES: Mapping[str, Abilities] = {
    OURS: Abilities(virtual=True),
    VLLM: Abilities(prefixes=True, told=True, mixes=True),
    LLAMACPP: Abilities(apart=False, loads=False, prefixes=True),
}


def abilities(engine: str) -> Abilities:
    """Those of an engine; for a server elsewhere, only those that requests need."""
    return ABILITIES.get(engine, Abilities(starts=False, mixes=True))
