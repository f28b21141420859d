"""Which of several served models answered, told by its log-probabilities. Pure.

A fingerprint is what a model says to one prompt: its first tokens, each with the log-probabilities of the most
likely ones. Batching changes the order of sums and with it a fingerprint, a little, so each model is also asked in
batches of its own: how far it then lies from itself is its noise. Another model lies nats away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Position = tuple[str, Mapping[str, float]]
"""The token that was chosen, and the log-probabilities (nats) of the most likely ones, itself among them."""

Print = Sequence[Position]

CLEAR = 4.0
"""Two models are told apart by a prompt where they lie this many times further apart than their noise."""

LEAST = 0.05
"""Nats; below this two fingerprints are the same, however small the noise was."""


def distance(a: Print, b: Print) -> float:
    """How far two fingerprints of one prompt lie apart: the mean difference of log-probability over the tokens that
    either holds likely, at the worst position (nats). After they choose different tokens they answer different prompts,
    and nothing can be compared any more. A token that only one of them holds likely counts with the other's least."""
    worst = 0.0
    for (token, mine), (other, theirs) in zip(a, b, strict=False):
        if mine and theirs:
            floors = min(mine.values()), min(theirs.values())
            gaps = [abs(mine.get(t, floors[0]) - theirs.get(t, floors[1])) for t in mine.keys() | theirs.keys()]
            worst = max(worst, math.fsum(gaps) / len(gaps))
        if token != other:
            break
    return worst


@dataclass(frozen=True)
class Known:
    """What the served models say to each prompt when each is asked alone: `prints[model][prompt]`, and how far each
    lies from itself in batches of its own: `noise[model]` (nats)."""

    prints: Mapping[str, Mapping[str, Print]]
    noise: Mapping[str, float]

    def unit(self, model: str) -> float:
        """The model's noise, or what says nothing where that is more: what its distances are counted in (nats)."""
        return max(2 * LEAST / CLEAR, self.noise[model])

    def margin(self, model: str) -> float:
        """Twice the noise: what says nothing."""
        return CLEAR / 2 * self.unit(model)

    def reach(self, model: str, prompt: str) -> float:
        """Further from its own fingerprint than this, an answer is not the model's: half way to the nearest other
        model that this prompt tells from it, as no noise gets."""
        own, others = self.prints[model][prompt], [self.prints[m][prompt] for m in self.prints if m != model]
        margin = self.margin(model)
        ways = [d / 2 for other in others if (d := distance(own, other)) > 2 * margin]
        return max(margin, min(ways, default=margin))

    def apart(self, one: str, other: str) -> list[str]:
        """The prompts that tell two models apart, the clearest first."""
        limit = 2 * max(self.margin(one), self.margin(other))
        far = {p: distance(self.prints[one][p], self.prints[other][p]) for p in self.prints[one]}
        return sorted((p for p, d in far.items() if d > limit), key=lambda p: -far[p])

    def alike(self) -> list[tuple[str, str]]:
        """Pairs that no prompt tells apart: of these nothing can be said."""
        names = list(self.prints)
        return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if not self.apart(a, b)]


@dataclass(frozen=True)
class Wrong:
    """An answer that is not the asked model's: `like` is the model whose it is, "" for none that is known."""

    model: str
    prompt: str
    like: str
    distance: float
    reach: float

    def __str__(self) -> str:
        whose = f"answered as {self.like} would" if self.like else "answered as none of the models does alone"
        return f"{self.model}: {whose} ({self.distance:.2f} nats off, {self.reach:.2f} would still be its own)"


def judge(known: Known, model: str, prompt: str, answer: Print, alone: bool = False) -> Wrong | None:
    """None for an answer that is the model's own; else whose it is. One that was given `alone`, as the fingerprint was,
    has nothing but the model's noise to excuse it: half an answer of another's, from a cache, is found that way."""
    own = distance(answer, known.prints[model][prompt])
    reach = known.margin(model) if alone else known.reach(model, prompt)
    if own <= reach:
        return None
    others = {m: distance(answer, known.prints[m][prompt]) for m in known.prints if m != model}
    nearest = min(others, key=lambda m: others[m], default="")
    return Wrong(model, prompt, nearest if nearest and others[nearest] < own / 2 else "", own, reach)
