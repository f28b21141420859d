"""The wrong-adapter canary: does each served name still answer as itself when others share its batch?

each alone, repeatedly -> its fingerprints and its noise -> all mixed -> every answer judged
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from peftopt.canary import fingerprint
from peftopt.canary.fingerprint import Known, Print, Wrong
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, REJECTED, WorkerFailed
from peftopt.loadtest.client import Client
from peftopt.loadtest.protocols import Target
from peftopt.records import Json

TOKENS, TOP = 6, 5
"""Tokens of a fingerprint, and the log-probabilities kept at each: five are what every server gives."""

NO_LOGPROBS = "no log-probabilities in the answer"
"""What is said of a server that answers and cannot be told from another by its answer."""

ALONE = 3
"""Times that each model is asked while no other is: once one request at a time, then all its prompts at once."""


@dataclass(frozen=True)
class Found:
    """What the canary saw. `asked` answers in mixed batches; `wrong` those that were not their model's; `alike` pairs
    that no prompt tells apart; `failed` requests without an answer."""

    known: Known
    asked: int
    wrong: list[Wrong]
    alike: list[tuple[str, str]]
    failed: int

    @property
    def outcome(self) -> int:
        """The exit code: a single wrong answer rejects; what could not be told apart is inconclusive."""
        if self.wrong:
            return REJECTED
        if not self.asked:
            return ENVIRONMENT
        return INCONCLUSIVE if self.alike or self.failed else ACCEPTED


def watch(
    target: Target,
    models: Sequence[str],
    prompts: Mapping[str, Sequence[Mapping[str, str]]],
    rounds: int,
    show: Callable[[int, str], None],
    seed: int = 0,
) -> Found:
    """Fingerprint every served name alone, then ask all of them at once, `rounds` times in other orders.

    Raises BadInput for a name that is not served, WorkerFailed for a server that gives no log-probabilities.
    """

    async def session() -> Found:
        async with Client(target) as client:
            names = await client.served(models)
            known = await alone(client, names, prompts, show)
            dice, wrong, failed, asked = random.Random(seed), [], 0, 0
            for number in range(rounds):
                seen = await together(client, known, names, prompts, dice)
                wrong += seen.wrong
                failed += len(seen.failed)
                asked += len(seen.answered)
                show(ALONE * len(names) + number + 1, f"{asked} answers, {len(wrong)} wrong")
            return Found(known, asked, wrong, known.alike(), failed)

    return asyncio.run(session())


@dataclass(frozen=True)
class Round:
    """One time that some were asked: whose requests were `answered`, a name each, those of them that were `wrong`, and
    whose others `failed` and why. `distances`: of each name the answer that lies furthest from its fingerprints, in
    units of its own noise."""

    answered: list[str] = field(default_factory=list)
    wrong: list[Wrong] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)


async def together(
    client: Client,
    known: Known,
    names: Sequence[str],
    prompts: Mapping[str, Sequence[Mapping[str, str]]],
    dice: random.Random,
) -> Round:
    """Every name with every prompt, all at once, in a drawn order; each answer judged."""
    order = [(name, id_) for name in names for id_ in prompts]
    dice.shuffle(order)
    answers = await asyncio.gather(*(ask(client, name, prompts[id_]) for name, id_ in order))
    return judged(known, order, answers)


def judged(known: Known, order: Sequence[tuple[str, str]], answers: Sequence[Print | str]) -> Round:
    """What answers say of those who gave them; `order` has the name and the prompt of each."""
    seen = Round()
    for (name, id_), answer in zip(order, answers, strict=True):
        if isinstance(answer, str):
            seen.failed.append((name, answer))
            continue
        seen.answered.append(name)
        off = fingerprint.distance(answer, known.prints[name][id_]) / known.unit(name)
        seen.distances[name] = max(off, seen.distances.get(name, 0.0))
        if wrong := fingerprint.judge(known, name, id_, answer):
            seen.wrong.append(wrong)
    return seen


async def alone(
    client: Client,
    names: Sequence[str],
    prompts: Mapping[str, Sequence[Mapping[str, str]]],
    show: Callable[[int, str], None],
    batches: bool = True,
) -> Known:
    """Each model's fingerprints when nothing else runs, and its noise: how far it lies from them when it is asked
    again, in batches of its own or else one request at a time, as at first. Raises WorkerFailed without an answer."""
    prints: dict[str, dict[str, Print]] = {}
    noise = dict.fromkeys(names, 0.0)
    for n, name in enumerate(names):
        prints[name] = {}
        for again in range(ALONE):
            if batches and again:
                answers = await asyncio.gather(*(fingerprinted(client, name, m) for m in prompts.values()))
            else:
                answers = [await fingerprinted(client, name, m) for m in prompts.values()]
            for id_, answer in zip(prompts, answers, strict=True):
                first = prints[name].setdefault(id_, answer)
                noise[name] = max(noise[name], fingerprint.distance(first, answer))
            show(n * ALONE + again + 1, f"{name} alone")
    return Known(prints, noise)


async def fingerprinted(client: Client, model: str, messages: Sequence[Mapping[str, str]]) -> Print:
    """A fingerprint. Raises WorkerFailed without one."""
    answer = await ask(client, model, messages)
    if isinstance(answer, str):
        raise WorkerFailed("no fingerprint", f"{model}: {answer}", "it takes a server of log-probabilities")
    return answer


async def ask(client: Client, model: str, messages: Sequence[Mapping[str, str]]) -> Print | str:
    """A fingerprint, or what went wrong."""
    body = {
        "model": model,
        "messages": [dict(m) for m in messages],
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP,
    }
    answer = await client.post("/v1/chat/completions", json.dumps(body).encode())
    return answer if isinstance(answer, str) else _print(answer)


def _print(answer: Json) -> Print | str:
    try:
        content = answer["choices"][0]["logprobs"]["content"]
        found = [(c["token"], {t["token"]: float(t["logprob"]) for t in c["top_logprobs"]}) for c in content]
        return found or "no tokens"
    except (KeyError, TypeError, IndexError, ValueError):
        return NO_LOGPROBS
