"""Engines, one file each: ways of running a Model. The file's name is its name in recipes.

An engine file has a one-line docstring (its help), a frozen dataclass `Params`, `PLUGIN = plugins.engine(Params, …)`
and

    def prepare(model: Model) -> None                       # imports what `open` needs, and no more
    def open(model: Model, params: Params) -> Engine

It may have `check`, as transforms have it, to refuse models before anything is built. An engine that speculates takes a
further argument in `open`: `speculation: Speculation | None = None`; one that takes draft models may have
`check_draft(base: Path, draft: Path) -> None`, which refuses one (BadInput). An engine that reuses prefixes takes
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
    """One request's answer. `times`: the perf_counter_ns of each new token, the first included.

    For an engine that speculates: the number of `steps` after the prompt, of the tokens `proposed` in them, and of
    those `accepted`, which a step gave beyond its own token. 0 steps for other engines, and if they are not known.
    """

    tokens: list[int]
    times: list[int]
    stopped: bool
    """True when an end-of-sequence token ended it, False when `new_tokens` did."""
    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    reused: int | None = None
    """First tokens of the prompt whose keys and values came from an earlier request; None if not known."""


@dataclass(frozen=True)
class Scores:
    """A given answer under the model, teacher-forced. Position i is the prediction of answer token i.

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
"""Tokens whose log-probability is kept for the KL divergence. The rest counts as one bucket (a lower bound)."""


class Engine(ABC):
    """A loaded model that answers. One request may hold several prompts: a batch.

    The defaults here are those of most engines: it computes in this process, has no facts on its start, and compiles
    nothing.
    """

    scores: bool
    """Whether `score` works; an endpoint may only generate."""

    device: str
    """The device that it computes on, in torch's words: "cpu", "cuda"."""

    threads: int
    """The number of CPU threads that it uses."""

    adapter_switch_time: float | None
    """Seconds it took to attach the adapters; None when there are none."""

    eos: frozenset[int]
    """Ids that end an answer."""

    remote: bool = False
    """Whether it runs elsewhere: then peftopt sees no memory or CPU time of it, and times are a client's."""

    slots: int = 0
    """The number of requests that a server runs at once; 0 if not known."""

    positions: int = 0
    """Most tokens of a prompt and its answer together; 0 if not known."""

    speculates: bool = False
    """Whether a step may give several tokens. Then answers must be generated: `score` does not show them."""

    reuses: bool = False
    """Whether prompts may start from kept keys and values. Then answers must be generated, as for `speculates`."""

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
        """The text of the new tokens, without special tokens; a leaked special token is visible in the ids."""

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """Greedy answers of one batch, KV cache on. `stop=False` generates exactly `new_tokens` (EOS disabled)."""

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """Score one batch of given answers. Raises NotImplementedError if `scores` is False."""
        raise NotImplementedError("this engine only generates")

    @abstractmethod
    def close(self) -> None:
        """Free the model's memory."""

    def processes(self) -> Sequence[int]:
        """Ids of the processes that hold the model, if it is not in this process: their memory is the model's."""
        return ()

    def facts(self) -> Mapping[str, Json]:
        """Facts on its start and its graphs, read at the end of a worker. Numbers by name ("compile_time" and
        "warm_start" in seconds, "prefix_bytes", "graphs", "graph_breaks", "recompiles", "uncompiled" requests,
        "eager_prompts") become metrics of the report. The report shows the sentences under "log" too."""
        return {}

    def warm(self, lengths: Sequence[int], rows: int, new_tokens: int, timed: bool) -> None:
        """Compile for batches of `rows` prompts of these lengths: every shape if they are `timed`, else one shape that
        fits all."""
        return

    def remember(self, answers: Sequence[Sequence[int]]) -> None:
        """Look up proposals in these answers too. Raises NotImplementedError for most engines."""
        raise NotImplementedError("this engine looks up nothing in other answers")

    def switch(self, adapter: str) -> float:
        """Replace its adapter by another. Returns the seconds. Raises NotImplementedError for most engines."""
        raise NotImplementedError("this engine cannot switch adapters")

    def without_adapters(self) -> AbstractContextManager[None] | None:
        """A context in which the base answers without adapters; None if the engine cannot do that."""
        return None

    def load(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool, at: Sequence[float], users: int
    ) -> Any:
        """Send prompts under load, for an engine that serves: see engines/endpoint.py."""
        raise NotImplementedError("this engine is not a server")
