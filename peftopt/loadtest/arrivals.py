"""What is sent and when: arrivals, mixes of adapters, recorded traces. Pure: a seed gives the same traffic again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peftopt.errors import BROKEN
from peftopt.records import Json

ARRIVALS = ("poisson", "gamma", "constant")
MIXES = ("uniform", "round-robin", "zipf")


def arrivals(kind: str, rate: float, n: int, seed: int, burstiness: float = 1.0) -> list[float]:
    """Offsets in seconds of `n` requests that come at `rate` a second on average, the first at 0, in order.

    `burstiness` is the shape of gamma gaps: 1 is Poisson, less is burstier (their variance is rate^-2 / burstiness).
    The name and its meaning are those of `vllm bench serve`. Raises ValueError for a rate or a shape of 0 or less.
    """
    import numpy as np

    if not (rate > 0 and math.isfinite(rate) and burstiness > 0):
        raise ValueError(f"rate and burstiness must be more than 0, found {rate} and {burstiness}")
    if kind == "constant":
        return [i / rate for i in range(n)]
    shape = burstiness if kind == "gamma" else 1.0
    gaps = np.random.default_rng([seed, 1]).gamma(shape, 1 / (rate * shape), max(n - 1, 0))
    return [0.0, *map(float, np.cumsum(gaps))][:n]


def mix(weights: Mapping[str, float], kind: str, n: int, seed: int, exponent: float = 1.0) -> list[str]:
    """Which served name each of `n` requests goes to.

    uniform: at random, by the names' weights. round-robin: one after the other. zipf: at random, the k-th name by
    its weight over k^exponent: a few popular adapters and a long tail, as SGLang's benchmark skews its LoRA traffic.
    """
    import numpy as np

    names = list(weights)
    if kind == "round-robin":
        return [names[i % len(names)] for i in range(n)]
    shares = np.array([w / (k**exponent if kind == "zipf" else 1) for k, w in enumerate(weights.values(), 1)])
    picks = np.random.default_rng([seed, 2]).choice(len(names), size=n, p=shares / shares.sum())
    return [names[i] for i in picks]


SERVE_LOG = "peftopt.serve"
"""What each line of the log of `peftopt serve` says of itself."""

SERVE_CHECK = SERVE_LOG + " check"
"""What a line says that tells of a check of an adapter, not of a request."""


@dataclass(frozen=True)
class Traced:
    """One line of a trace: when, and what. `id` is a prompt of the prompts file; without one, a prompt of about
    `prompt_tokens` is made up. `model` is the served name, "" = by the mix."""

    at: float
    id: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    model: str = ""


def trace(lines: Iterable[str]) -> list[Traced]:
    """A recorded trace, in the order of time, its first request at 0. Raises ValueError naming the broken line.

    A line is {"offset_s": 1.25, "id": "row-7"} or {"offset_s": 1.25, "prompt_tokens": 512, "new_tokens": 128}, with
    "model" where it matters. Mooncake's {"timestamp": ms, "input_length", "output_length"} is read too, and the log of
    `peftopt serve`, but for what was not answered, since nobody knows how long that was, and checks.
    """
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not _is_no_request(values):
                found.append(_traced(values))
        except BROKEN as error:
            raise ValueError(f"line {number}: {error!r}") from error
    start = min((t.at for t in found), default=0.0)
    moved = [Traced(t.at - start, t.id, t.prompt_tokens, t.new_tokens, t.model) for t in found]
    return sorted(moved, key=lambda t: t.at)


def _is_no_request(values: Mapping[str, Json]) -> bool:
    """Whether a line asked for no answer, or got none."""
    kind = values.get("kind")
    return kind == SERVE_CHECK or (kind == SERVE_LOG and not values.get("prompt_tokens"))


def _traced(values: Mapping[str, Json]) -> Traced:
    at = float(values["offset_s"]) if "offset_s" in values else float(values["timestamp"]) / 1e3
    prompt_tokens = int(values.get("prompt_tokens") or values.get("input_length") or 0)
    new_tokens = int(values.get("new_tokens") or values.get("output_length") or 0)
    if not math.isfinite(at) or min(at, prompt_tokens, new_tokens) < 0:
        raise ValueError("times and lengths must be 0 or more")
    id_, model = ("" if (found := values.get(key)) is None else str(found) for key in ("id", "model"))
    if not id_ and not prompt_tokens:
        raise ValueError("names neither a prompt's id nor its prompt_tokens")
    return Traced(at, id_, prompt_tokens, new_tokens, model)


_WORDS = ("time", "people", "water", "house", "work", "day", "world", "school", "state", "family", "hand", "night")


def made_up(tokens: int, seed: int) -> str:
    """A text of about so many tokens: common English words, which most tokenizers hold as one token each. Texts of
    other seeds differ from the first word on, so that no prefix cache serves them."""
    import numpy as np

    return " ".join(_WORDS[i] for i in np.random.default_rng([seed, 3]).integers(0, len(_WORDS), max(1, tokens)))


def in_order(ids: Sequence[str], n: int, seed: int) -> list[str]:
    """`n` prompts: a shuffled deck of all, again and again."""
    import numpy as np

    deck = [ids[i] for i in np.random.default_rng([seed, 4]).permutation(len(ids))]
    return [deck[i % len(deck)] for i in range(n)]
