"""Does a served name change the model at all? Compares log-probabilities: an adapter that answers as the base does is
not applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peftopt.canary import fingerprint, mixed
from peftopt.diagnose.measuring.cells import BASE, Launch
from peftopt.diagnose.measuring.passing import Pass
from peftopt.diagnose.records import Bottleneck, Row
from peftopt.errors import WorkerFailed

PROMPTS = ("What is the order number?", "Write a line about the sea.", "Name three colours.")
"""Asked of both, where the user gives no prompts."""

NOTHING = 1e-3
"""Nats; servers round log-probabilities, and an adapter whose answers lie no further off does nothing."""


async def unchanged(diagnosed: Pass, bottleneck: Bottleneck, launch: Launch, names: Sequence[str]) -> list[Row]:
    """A fault that names all adapters with the base's fingerprint at every prompt; [] if all differ, or if that is not
    known."""
    client = diagnosed.servers.client(launch)
    prompts = diagnosed.servers.messages(len(PROMPTS)) or [({"role": "user", "content": text},) for text in PROMPTS]
    called = diagnosed.servers.called
    try:
        base = [await mixed.fingerprinted(client, called(BASE), messages) for messages in prompts]
        again = [await mixed.fingerprinted(client, called(BASE), messages) for messages in prompts]
        own = {name: [await mixed.fingerprinted(client, name, messages) for messages in prompts] for name in names}
    except WorkerFailed as error:
        diagnosed.notes.append(f"whether adapters change the answers is not known: {error.message}")
        return []
    noise = furthest(base, again)
    distances = {name: furthest(base, prints) for name, prints in own.items()}
    alike = {name: far for name, far in distances.items() if far <= max(2 * noise, NOTHING)}
    return [_fault(bottleneck, alike, noise)] if alike else []


def furthest(one: Sequence[fingerprint.Print], other: Sequence[fingerprint.Print]) -> float:
    """The largest distance of two models over the prompts (nats)."""
    return max(fingerprint.distance(a, b) for a, b in zip(one, other, strict=True))


def _fault(bottleneck: Bottleneck, alike: Mapping[str, float], noise: float) -> Row:
    names, far = ", ".join(alike), max(alike.values())
    subject = f"{names} answers" if len(alike) == 1 else f"{names} answer"
    return Row(
        bottleneck=bottleneck,
        part="it changes nothing",
        phase="answers",
        batch=1,
        finding="fault",
        sentence=f"{subject} exactly as the base does ({far:.2g} nats apart, its own noise is {noise:.2g}): not "
        "applied, or nothing is in it",
        advice=f"check the files of {names} and the server's log; peftopt canary tells models apart",
    )
