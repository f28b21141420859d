"""Engines, one file each: ways of running a Model. The file's name is its name in recipes.

An engine file has a one-line docstring (its help), a frozen dataclass `Params`, `PLUGIN = plugins.engine(Params, …)`
and

    def prepare(model: Model) -> None                       # imports what `open` needs, and no more
    def open(model: Model, params: Params) -> Engine

and, where something can be told to be impossible before anything is built, `check` as transforms have it. One that
speculates takes an argument more in `open`: `speculation: Speculation | None = None`; one that reuses prefixes
`reuse: Reuse | None = None`. Heavy imports stay inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from peftopt.records import Json


@dataclass(frozen=True)
class Generation:
    """One request's answer. `times` are perf_counter_ns at which each new token was at hand, the first included.

    Where several tokens may come of a step: the `steps` after the prompt, the tokens that were `proposed` in them, and
    those `accepted`, which a step gave beyond its one. 0 steps elsewhere, and where they are not told.
    """

    tokens: list[int]
    times: list[int]
    stopped: bool
    """True when an end-of-sequence token ended it, False when `new_tokens` did."""
    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    reused: int | None = None
    """First tokens of the prompt whose keys and values an earlier request had left; None where that is not told."""


@dataclass(frozen=True)
class Scores:
    """A given answer under the model, teacher-forced; position i is the prediction of answer token i.

    `logprobs` of the given tokens (nats); `best` the arg-max token; `top_ids`, `top_logprobs` the TOP_K most likely
    tokens and their log-probabilities, most likely first; `finite` False when any logit was not finite.
    Shapes: [n], [n], [n, k], [n, k] for an answer of n tokens, the end-of-sequence token included.
    """

    logprobs: list[float]
    best: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]
    finite: bool


TOP_K = 64
"""Tokens whose log-probability is kept for the KL divergence; the rest counts as one bucket (a lower bound)."""


class Engine(ABC):
    """A model that is loaded and answers. One request may hold several prompts: a batch.

    What an engine need not have stands here with what holds for most: it computes in this process, says nothing of
    how it got ready, and has nothing to compile.
    """

    scores: bool
    """Whether `score` works; an endpoint may only generate."""

    device: str
    """Where it computes, in torch's words: "cpu", "cuda"."""

    threads: int
    """How many threads of the CPU it uses."""

    adapter_switch_time: float | None
    """Seconds it took to attach the adapters; None when there are none."""

    eos: frozenset[int]
    """Ids that end an answer."""

    remote: bool = False
    """Whether its processes are not ours to look at: time, memory and CPU are then what a client sees."""

    slots: int = 0
    """How many requests a server works on at once; 0 where that is not known."""

    positions: int = 0
    """The most tokens of a prompt and its answer together; 0 where that is not known."""

    speculates: bool = False
    """Whether several tokens may come of a step, so that only what it generates shows what it answers."""

    reuses: bool = False
    """Whether prompts may start from what earlier ones have left, so that only what it generates shows that."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer, as transformers opens it."""

    @property
    @abstractmethod
    def special_tokens(self) -> frozenset[int]:
        """Ids that must not appear in an answer, except EOS at its end."""

    @abstractmethod
    def encode(self, messages: Sequence[Mapping[str, str]], answer: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids of the prompt (chat template and generation prompt applied) and of the answer with its EOS."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the new tokens, special tokens kept out; a leaked one is visible in the ids."""

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """Greedy answers of one batch, KV cache on. `stop=False` generates exactly `new_tokens` (EOS disabled)."""

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """Score one batch of given answers. Raises NotImplementedError where `scores` is False."""
        raise NotImplementedError("this engine only generates")

    @abstractmethod
    def close(self) -> None:
        """Free the model's memory."""

    def processes(self) -> Sequence[int]:
        """Ids of the processes that serve it in this one's place: their memory is the model's."""
        return ()

    def facts(self) -> Mapping[str, Json]:
        """How it got ready, asked for at the end of a worker's life. Numbers by name ("compile_time" and "warm_start"
        in seconds, "prefix_bytes", "graphs", "graph_breaks", "recompiles", "uncompiled" requests, "eager_prompts")
        become metrics of the report; the sentences under "log" are shown with them."""
        return {}

    def warm(self, lengths: Sequence[int], rows: int, new_tokens: int, timed: bool) -> None:
        """Compile for whatever batches of so many `rows`, out of prompts of those lengths, may need: every shape where
        they are `timed`, else one that holds them all."""
        return

    def remember(self, answers: Sequence[Sequence[int]]) -> None:
        """Look up what to propose in these answers too. NotImplementedError for most engines."""
        raise NotImplementedError("this engine looks up nothing in other answers")

    def switch(self, adapter: str) -> float:
        """Put another adapter in the place of its own; the seconds it took. NotImplementedError for most engines."""
        raise NotImplementedError("this engine cannot switch adapters")

    def without_adapters(self) -> AbstractContextManager[None] | None:
        """Leave the adapters out for a while; None where that cannot be done."""
        return None

    def load(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool, at: Sequence[float], users: int
    ) -> Any:
        """Send prompts under load, for an engine that serves: see engines/endpoint.py."""
        raise NotImplementedError("this engine is not a server")
