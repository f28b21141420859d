"""Answer a large batch in parts of prompts of like length, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftopt import plugins
from peftopt.policies import Messages, Request


@dataclass(frozen=True)
class Params:
    """`tokens`: the most that a part takes, padding included: its rows times the longest prompt with its answer."""

    tokens: int = 4096

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be 1 or more, not {self.tokens}")


PLUGIN = plugins.policy(Params, technique="pack")


def apply(request: Request, params: Params, count: Callable[[Messages], int]) -> Request:
    """The request as it is: only which prompts are computed together changes."""
    return request


def parts(lengths: Sequence[int], new_tokens: int, params: Params) -> list[list[int]]:
    """The prompts that are answered together, by their numbers: the shortest first, as many as the budget has room for.
    A prompt that is longer than the budget is a part of its own. `lengths` are tokens."""
    packed: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if packed and (len(packed[-1]) + 1) * (lengths[row] + new_tokens) <= params.tokens:
            packed[-1].append(row)
        else:
            packed.append([row])
    return packed
