"""The wrong-adapter canary: does each served name still answer as itself when others share its batch, or its prompt?

each alone, repeatedly -> its fingerprints and its noise -> one right after another with the same prompt
    -> all mixed -> every answer judged
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from peftopt.canary import fingerprint
from peftopt.canary.fingerprint import Known, Print, Wrong
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, REJECTED, WorkerFailed
from peftopt.loadtest.client import Client
from peftopt.loadtest.protocols import Target, completions
from peftopt.loadtest.protocols.chat import PATH
from peftopt.records import Json

TOKENS, TOP = 6, 5
"""Tokens of a fingerprint, and the log-probabilities kept at each: five are what every server gives."""

NO_LOGPROBS = "no log-probabilities in the answer"
"""What is said of a server that answers and cannot be told from another by its answer."""

REFUSALS = ("HTTP 400", "HTTP 422")
"""How a server's refusal of a field that it does not know begins."""

ALONE = 3
"""Times that each model is asked while no other is: once one request at a time, then all its prompts at once."""

IN_TURN = 1
"""Times that all models are asked one right after another."""


@dataclass(frozen=True)
class InTurn:
    """One model right after another with the same prompt, one request at a time. `asked` answers; `borrowed` those that
    were not their model's: what another left in the server's prefix cache is in them; `reused` prompt tokens of all
    that the server says it took from that cache, None where it does not tell; `failed` requests."""

    asked: int
    borrowed: list[Wrong]
    reused: int | None
    failed: int


@dataclass(frozen=True)
class Found:
    """What the canary saw. `in_turn`: before the mixed batches. `asked` answers in these; `wrong` those that were not
    their model's; `alike` pairs that no prompt tells apart; `failed` requests without an answer. `apart`: whether the
    server was asked to keep the fingerprints out of its prefix cache; it refused to if not."""

    known: Known
    in_turn: InTurn
    asked: int
    wrong: list[Wrong]
    alike: list[tuple[str, str]]
    failed: int
    apart: bool

    @property
    def outcome(self) -> int:
        """The exit code: a single wrong answer rejects; what could not be told apart is inconclusive."""
        if self.wrong or self.in_turn.borrowed:
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
    """Fingerprint every served name alone, ask one right after another with the same prompt, then all of them at once,
    `rounds` times in other orders.

    Raises BadInput for a name that is not served, WorkerFailed for a server that gives no log-probabilities.
    """

    async def session() -> Found:
        async with Client(target) as client:
            names = await client.served(models)
            known = await alone(client, names, prompts, show)
            after, before = await in_turn(client, known, names, prompts), ALONE * len(names) + IN_TURN
            show(before, f"{after.asked} answers in turn, {len(after.borrowed)} borrowed")
            dice, wrong, failed, asked = random.Random(seed), [], after.failed, 0
            for number in range(rounds):
                seen = await together(client, known, names, prompts, dice)
                wrong += seen.wrong
                failed += len(seen.failed)
                asked += len(seen.answered)
                show(before + number + 1, f"{asked} answers, {len(wrong)} wrong")
            return Found(known, after, asked, wrong, known.alike(), failed, client.salts)

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
    again, in batches of its own or else one request at a time, as at first. What others have left in the server's
    prefix cache is not in them, if it can keep requests apart. Raises WorkerFailed without an answer."""
    prints: dict[str, dict[str, Print]] = {}
    noise = dict.fromkeys(names, 0.0)
    for n, name in enumerate(names):
        prints[name] = {}
        own = apart(secrets.token_hex(16))
        for again in range(ALONE):
            if batches and again:
                answers = await asyncio.gather(*(fingerprinted(client, name, m, own) for m in prompts.values()))
            else:
                answers = [await fingerprinted(client, name, m, own) for m in prompts.values()]
            for id_, answer in zip(prompts, answers, strict=True):
                first = prints[name].setdefault(id_, answer)
                noise[name] = max(noise[name], fingerprint.distance(first, answer))
            show(n * ALONE + again + 1, f"{name} alone")
    return Known(prints, noise)


async def in_turn(
    client: Client, known: Known, names: Sequence[str], prompts: Mapping[str, Sequence[Mapping[str, str]]]
) -> InTurn:
    """Every prompt to one name after the other, to another first each time, and to that one again at the end."""
    # One salt for all: they share what these requests leave, and nothing that was left before.
    shared = {"cache_salt": secrets.token_hex(16)}
    seen = []
    for n, (id_, messages) in enumerate(prompts.items()):
        first = n % len(names)
        for name in (*names[first:], *names[:first], names[first]):
            seen.append(await _after_others(client, known, name, id_, messages, shared))
    told = [each.reused for each in seen if each.reused is not None]
    return InTurn(
        asked=sum(each.answered for each in seen),
        borrowed=[each.borrowed for each in seen if each.borrowed],
        reused=sum(told) if told else None,
        failed=sum(not each.answered for each in seen),
    )


@dataclass(frozen=True)
class _Seen:
    answered: bool
    reused: int | None = None
    borrowed: Wrong | None = None


async def _after_others(
    client: Client, known: Known, name: str, id_: str, messages: Sequence[Mapping[str, str]], shared: Mapping[str, Json]
) -> _Seen:
    """One answer, where others may have left the prompt. One that is not the name's own is borrowed if it is so again,
    and is the name's own once nothing that others left can be in it: then it is not what else the server does."""
    whole = await _asked(client, name, messages, shared)
    answer = whole if isinstance(whole, str) else _print(whole)
    if isinstance(answer, str):
        return _Seen(False)
    wrong = fingerprint.judge(known, name, id_, answer, alone=True)
    if wrong:
        again = await ask(client, name, messages, shared)
        fresh = await ask(client, name, messages, apart(secrets.token_hex(16)))
        if isinstance(again, str) or isinstance(fresh, str):
            return _Seen(False)
        stays = fingerprint.judge(known, name, id_, again, alone=True)
        own = not fingerprint.judge(known, name, id_, fresh, alone=True)
        wrong = stays if own else None
    return _Seen(True, _reused(whole), wrong)


def apart(salt: str) -> dict[str, Json]:
    """Fields of a request that is to find nothing that others left: vLLM's `cache_salt` names a cache of its own, and
    llama.cpp's `cache_prompt` turns it off. Servers without these fields pass over them."""
    return {"cache_salt": salt, "cache_prompt": False}


async def fingerprinted(
    client: Client, model: str, messages: Sequence[Mapping[str, str]], fields: Mapping[str, Json] | None = None
) -> Print:
    """A fingerprint. Raises WorkerFailed without one."""
    answer = await ask(client, model, messages, fields)
    if isinstance(answer, str):
        raise WorkerFailed("no fingerprint", f"{model}: {answer}", "it takes a server of log-probabilities")
    return answer


async def ask(
    client: Client, model: str, messages: Sequence[Mapping[str, str]], fields: Mapping[str, Json] | None = None
) -> Print | str:
    """A fingerprint, or what went wrong. `fields` of the server's own are left out once it has refused them."""
    answer = await _asked(client, model, messages, fields)
    return answer if isinstance(answer, str) else _print(answer)


async def _asked(
    client: Client, model: str, messages: Sequence[Mapping[str, str]], fields: Mapping[str, Json] | None
) -> Json:
    """A whole answer, or as text what went wrong."""
    body = {
        "model": model,
        "messages": [dict(m) for m in messages],
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP,
    }
    if not fields or not client.salts:
        return await client.post(PATH, json.dumps(body).encode())
    answer = await client.post(PATH, json.dumps({**body, **fields}).encode())
    if not isinstance(answer, str) or not answer.startswith(REFUSALS):
        return answer
    plain = await client.post(PATH, json.dumps(body).encode())
    client.salts = isinstance(plain, str)  # what it refuses without the fields too is something else
    return plain


def _reused(answer: Json) -> int | None:
    """Prompt tokens that the server says it took from its prefix cache; None where it does not tell."""
    try:
        return completions.reused(answer)
    except (AttributeError, TypeError, ValueError):
        return None


def _print(answer: Json) -> Print | str:
    try:
        content = answer["choices"][0]["logprobs"]["content"]
        found = [(c["token"], {t["token"]: float(t["logprob"]) for t in c["top_logprobs"]}) for c in content]
        return found or "no tokens"
    except (KeyError, TypeError, IndexError, ValueError):
        return NO_LOGPROBS
