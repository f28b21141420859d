"""The recipe to run next: a run's own recipe with the traffic that was seen as its workload. Pure."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from peftopt.loadtest.arrivals import made_up
from peftopt.recipe import rewriting
from peftopt.watch.history import History

MOST_PROMPTS = 200
CAP = 0.99
"""The share of answers that the most new tokens leave whole, where answers end by themselves."""

HIGH = 0.95
"""The quantile of the windows' rates that is proposed: a busy minute, not the busiest."""


ROLES = re.compile(r"^(system|user|assistant): ", re.MULTILINE)
"""How the log begins each message of a prompt: see gateway.texts.prompt."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Seen:
    """Traffic, as far as it is known. `rate` in requests/s; lengths in tokens of single requests; `prompts` that the
    log has kept."""

    rate: float
    prompt_tokens: Sequence[float] = ()
    new_tokens: Sequence[float] = ()
    prompts: Sequence[Messages] = ()


def of_history(history: History, prompts: Sequence[Messages] = ()) -> Seen:
    """The traffic of the last windows."""
    rates = sorted(rate for rate in history.rates if rate)
    rate = rates[min(len(rates) - 1, int(HIGH * len(rates)))] if rates else 0.0
    return Seen(rate, tuple(history.prompt_tokens), tuple(history.new_tokens), prompts)


def logged(prompt: str) -> Messages:
    """The messages of a prompt as the log has kept it."""
    first, *parts = ROLES.split(prompt)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    messages = [{"role": role, "content": text.rstrip("\n")} for role, text in pairs]
    return messages if messages and not first.strip() else [{"role": "user", "content": prompt}]


def rows(traffic: Seen) -> list[str]:
    """Lines of a prompts file: the users' own, or texts made up of their lengths; none where neither is known."""
    prompts = list(traffic.prompts)
    if not prompts:
        lengths = random.Random(0).sample(traffic.prompt_tokens, min(MOST_PROMPTS, len(traffic.prompt_tokens)))
        texts = (made_up(round(tokens), seed) for seed, tokens in enumerate(lengths))
        prompts = [[{"role": "user", "content": text}] for text in texts]
    numbered = ({"id": f"traffic-{n}", "messages": messages} for n, messages in enumerate(prompts, 1))
    return [json.dumps(row, ensure_ascii=False) for row in numbered]


def recipe(text: str, folder: Path, traffic: Seen, prompts_file: str) -> str:
    """The recipe in `text`, whose paths are relative to `folder`, for this traffic; its prompts are in `prompts_file`,
    or where they were ("")."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    rewriting.make_absolute(root, folder)
    for _, workload in rewriting.items(rewriting.get(root, "workloads")):
        _change(workload, traffic, prompts_file)
    return rewriting.written(root)


def _change(workload: yaml.Node, traffic: Seen, prompts_file: str) -> None:
    """A workload as the traffic is, as far as a recipe can say it."""
    if prompts_file:
        rewriting.put(workload, "prompts", prompts_file)
        rewriting.drop(workload, "slice")
    if traffic.new_tokens:
        lengths = rewriting.get(workload, "lengths")
        by_themselves = lengths is not None and lengths.value == "natural"
        tokens = quantile(traffic.new_tokens, CAP) if by_themselves else statistics.fmean(traffic.new_tokens)
        rewriting.put(workload, "new_tokens", str(max(1, math.ceil(tokens))))
    if traffic.rate and (rewriting.get(workload, "users") or rewriting.get(workload, "rate")):
        rewriting.drop(workload, "users")
        rewriting.put(workload, "rate", f"{max(0.001, traffic.rate):.3g}")


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest that a share q of them does not exceed."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
