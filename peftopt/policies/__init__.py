"""Policies, one file each: what is changed of a request before an engine sees it. The file's name is its recipe name.

A policy file has a one-line docstring (its help), a frozen dataclass `Params`, `PLUGIN = plugins.policy(Params, …)` and

    def apply(request: Request, params: Params, count: Callable[[Messages], int]) -> Request

where `count` gives the tokens of a prompt, chat template included. A request that needs no change comes back as it is.
`speculate` and `prefix` change none: the engine is opened with their parameters. `pack` changes none either: it says
which prompts of a batch are answered together, by

    def parts(lengths: Sequence[int], new_tokens: int, params: Params) -> list[list[int]]
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftopt import plugins
from peftopt.engines import Engine, Generation
from peftopt.records import Step

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Request:
    """One prompt and the most tokens that its answer may take."""

    messages: Messages
    new_tokens: int


class Policed:
    """An engine behind policies. What they say of lengths holds for answers that stop by themselves: where exactly so
    many tokens are asked for, to compare speed, every variant generates them."""

    def __init__(self, engine: Engine, policies: Sequence[Step]) -> None:
        """`policies` are applied in order."""
        sources = [(plugins.module("policy", policy.plugin), policy.params) for policy in policies]
        self._policies = [(source.apply, source.Params(**params)) for source, params in sources]
        packers = (
            functools.partial(source.parts, params=source.Params(**params))
            for source, params in sources
            if hasattr(source, "parts")
        )
        self._parts = next(packers, _together)
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def encode(self, messages: Messages, answer: str | None = None) -> tuple[list[int], list[int]]:
        """The engine's ids of the prompt as the policies leave it."""
        return self._engine.encode(self._policed(Request(messages, 0)).messages, answer)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """The engine's answers, of at most `most` tokens, in the order of the prompts."""
        most = self.most(new_tokens, stop)
        answers: dict[int, Generation] = {}
        for rows in self._parts([len(prompt) for prompt in prompts], most):
            answers |= zip(rows, self._engine.generate([prompts[row] for row in rows], most, stop), strict=True)
        return [answers[row] for row in range(len(prompts))]

    def load(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool, **arrivals: Any) -> Any:
        """The engine's answers under load, of at most `most` tokens."""
        return self._engine.load(prompts, self.most(new_tokens, stop), stop, **arrivals)

    def most(self, new_tokens: int, stop: bool) -> int:
        """The most tokens that an answer may have."""
        return self._policed(Request((), new_tokens)).new_tokens if stop else new_tokens

    def uncut(self, messages: Messages) -> int | None:
        """How many tokens a prompt had before it was cut; None for one that is not."""
        if self._policed(Request(messages, 0)).messages == messages:
            return None
        return len(self._engine.encode(messages)[0])

    def _policed(self, request: Request) -> Request:
        for apply, params in self._policies:
            request = apply(request, params, lambda messages: len(self._engine.encode(messages)[0]))
        return request


def _together(lengths: Sequence[int], new_tokens: int) -> list[list[int]]:
    """All prompts of a batch as one part."""
    return [list(range(len(lengths)))]


OPENED_WITH = {"speculate": "speculation", "prefix": "reuse"}
"""Techniques of policies that change how an engine answers: the argument of its `open` that takes their parameters."""


def opened_with(policies: Sequence[Step]) -> dict[str, Any]:
    """What an engine is opened with besides its own parameters: a `Speculation`, a `Reuse`, by argument."""
    asked = [step for step in policies if step.technique in OPENED_WITH]
    return {OPENED_WITH[s.technique]: plugins.module("policy", s.plugin).Params(**s.params) for s in asked}


def most(engine: Engine, new_tokens: int, stop: bool) -> int:
    """`Policed.most`, of any engine: one without policies bounds nothing."""
    return engine.most(new_tokens, stop) if isinstance(engine, Policed) else new_tokens


def uncut(engine: Engine, messages: Messages) -> int | None:
    """`Policed.uncut`, of any engine: one without policies cuts nothing."""
    return engine.uncut(messages) if isinstance(engine, Policed) else None
