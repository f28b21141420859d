"""Engines, one file each: ways of running a Model. The file's name is its name in recipes.

An engine file has a one-line docstring (its help), `TECHNIQUE` ("" or "compile"), `NEEDS`, where it runs in an
environment of its own `ENVIRONMENT`, where it opens other weights than safetensors their `FORMAT`, where not every
machine will do its `DEVICE` ("cuda"), a frozen dataclass `Params`, and

    def prepare(model: Model) -> None                       # imports what `open` needs, and no more
    def open(model: Model, params: Params) -> Engine

and, where something can be told to be impossible before anything is built, `check` as transforms have it. Heavy imports
stay inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peftopt.records import Json


@dataclass(frozen=True)
class Generation:
    """One request's answer. `times` are perf_counter_ns at which each new token was at hand, the first included."""

    tokens: list[int]
    times: list[int]
    stopped: bool
    """True when an end-of-sequence token ended it, False when `new_tokens` did."""


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


class Engine(Protocol):
    """A model that is loaded and answers. One request may hold several prompts: a batch."""

    scores: bool
    """Whether `score` works; an endpoint may only generate."""

    device: str
    """Where it computes, in torch's words: "cpu", "cuda"."""

    threads: int
    """How many threads of the CPU it uses."""

    adapter_switch_time: float | None
    """Seconds it took to attach the adapters; None when there are none."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as transformers opens it."""

    def encode(self, messages: Sequence[Mapping[str, str]], answer: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids of the prompt (chat template and generation prompt applied) and of the answer with its EOS."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the new tokens, special tokens kept out; a leaked one is visible in the ids."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """Greedy answers of one batch, KV cache on. `stop=False` generates exactly `new_tokens` (EOS disabled)."""

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """Score one batch of given answers."""

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids that must not appear in an answer, except EOS at its end."""

    @property
    def eos(self) -> frozenset[int]:
        """Ids that end an answer."""

    def close(self) -> None:
        """Free the model's memory."""


class Ready(Protocol):
    """What an engine may offer besides: an account of how it got ready, asked for at the end of a worker's life.

    One that is served by other processes has `processes()`, their ids, whose memory is the model's; or `remote = True`
    where they are not ours to look at; one that can be put under load says `SERVES = True` in its file and has
    `load(prompts, new_tokens, stop, at, users)`: see engines/endpoint.py. `switch(adapter)` puts another adapter in the
    place of its own, in seconds. `warm(lengths, rows, new_tokens, timed)` compiles for whatever batches of so many
    `rows`, out of prompts of those lengths, may need: every shape where they are `timed`, else one that holds them all.
    """

    def facts(self) -> Mapping[str, Json]:
        """Numbers by name ("compile_time" and "warm_start" in seconds, "graphs", "graph_breaks", "recompiles",
        "uncompiled" requests, "eager_prompts") become figures of the report; the sentences under "log" are shown with
        them."""
