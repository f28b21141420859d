"""API keys by their hashes, with the adapters and the rate of each. Pure.

A file of keys has one line for each key: the SHA-256 of the key (printf %s KEY | sha256sum), a name, and its rights:

    9f86d081…0f00a08 support-team adapters=support,sales rate=5/s
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from peftopt.errors import BadInput

BURST_S = 1.0
"""A key may use so many seconds of its rate at once."""


@dataclass
class Key:
    """`adapters` it may name, () = all; `rate` requests per second, 0 = any."""

    name: str
    adapters: tuple[str, ...] = ()
    rate: float = 0.0
    _tokens: float = field(default=-1.0, repr=False, compare=False)
    _at: float = field(default=0.0, repr=False, compare=False)

    def may_ask(self, adapter: str) -> bool:
        """Whether it may use this adapter."""
        return not self.adapters or adapter in self.adapters

    def wait_s(self, now: float) -> float:
        """Seconds until the rate allows another request; 0 counts one (a token bucket)."""
        if not self.rate:
            return 0.0
        most = max(1.0, self.rate * BURST_S)
        self._tokens = most if self._tokens < 0 else min(most, self._tokens + (now - self._at) * self.rate)
        self._at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self.rate
        self._tokens -= 1
        return 0.0


ANYONE = Key("")


@dataclass(frozen=True)
class Keys:
    """Every key by its hash; without any, everybody may ask."""

    known: Mapping[str, Key] = field(default_factory=dict)

    def of(self, authorization: str) -> Key | None:
        """The key in a header ("Bearer …"); None for an unknown one."""
        if not self.known:
            return ANYONE
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self.known.get(hashlib.sha256(secret.strip().encode()).hexdigest())


def renewed(old: Keys, new: Keys) -> Keys:
    """The keys of a file that was read again: a key whose line is unchanged keeps the used part of its rate."""
    known = dict(new.known)
    for digest, before in old.known.items():
        if known.get(digest) == before:
            known[digest] = before
    return Keys(known)


def parse(text: str, name: str) -> Keys:
    """The keys in a file's text. Raises BadInput that names the line."""
    found: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        hashed, *rest = words
        if not re.fullmatch(r"[0-9a-f]{64}", hashed):
            hint = "a line is the SHA-256 of a key (printf %s KEY | sha256sum), a name, adapters=a,b and rate=5/s"
            raise BadInput(f"{name}:{number}: not the hash of a key", hint)
        found[hashed] = _key(rest, f"{name}:{number}")
    if not found:
        raise BadInput(f"{name} holds no key", "add a line: printf %s KEY | sha256sum")
    return Keys(found)


def _key(words: list[str], where: str) -> Key:
    key = Key("")
    for word in words:
        field_, equals, value = word.partition("=")
        rate = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)/s", value)
        if not equals and not key.name:
            key.name = word
        elif field_ == "adapters" and value:
            key.adapters = tuple(value.split(","))
        elif field_ == "rate" and rate and float(rate[1]) > 0:
            key.rate = float(rate[1])
        else:
            raise BadInput(f"{where}: {word!r} is not known", "write a name, adapters=a,b and rate=5/s")
    if not key.name:
        raise BadInput(f"{where}: the key has no name", "write one after the hash: the log tells keys by their names")
    return key
