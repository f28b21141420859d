"""Bound the length of answers by `max_new_tokens`, as a service does with the request parameter of that name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from peftopt import plugins
from peftopt.policies import Messages, Request


@dataclass(frozen=True)
class Params:
    """`max_new_tokens`: tokens after which an answer ends, whether or not it is complete."""

    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}")


PLUGIN = plugins.policy(Params, technique="shorten")


def apply(request: Request, params: Params, count: Callable[[Messages], int]) -> Request:
    """The request with no more new tokens than that."""
    return replace(request, new_tokens=min(request.new_tokens, params.max_new_tokens))
