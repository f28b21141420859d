"""Which version of an adapter answers a name. Pure: a table that is replaced as a whole, so a change is one step.

A route is a name that users know. The engine serves a version of it, under another name with the hash of its weights:
no cache of the engine can confuse two versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Arm = Literal["live", "canary", "shadow", "previous"]


@dataclass(frozen=True)
class Version:
    """Weights under a route. `served` is their name at their engine; `id` is their hash, "" for a model that the engine
    had from its start. `url` of their own engine, "" for the gateway's engine. Its engine does not change a version's
    identity."""

    id: str
    served: str
    url: str = field(default="", compare=False)


@dataclass(frozen=True)
class Route:
    """`live` answers, except for the share `weight` of users that `canary` answers; `previous` is kept for a rollback.
    A canary of weight 0 answers no users: it is a shadow."""

    live: Version
    canary: Version | None = None
    weight: float = 0.0
    previous: Version | None = None

    def choose(self, sticky: str) -> tuple[Arm, Version]:
        """The arm and the version for a user; a user stays in one arm while the weight is the same."""
        if self.canary and _share(self.canary.id, sticky) < self.weight:
            return "canary", self.canary
        return "live", self.live

    def promoted(self) -> Route:
        """The canary becomes live; the old live version is kept. Raises LookupError without a canary."""
        if self.canary is None:
            raise LookupError("there is no canary to promote")
        return Route(self.canary, previous=self.live)

    def rolled_back(self) -> Route:
        """Without its canary, or if there is none, with the version before. Raises LookupError without either."""
        if self.canary:
            return replace(self, canary=None, weight=0.0)
        if self.previous is None:
            raise LookupError("there is no earlier version")
        return Route(self.previous, previous=self.live)

    def without(self, version: Version) -> Route | None:
        """The route without a version that cannot answer: the one before takes the live one's place. None if nothing is
        left."""
        live = self.previous if self.live == version else self.live
        if live is None or live == version:
            return None
        previous = None if self.previous in (version, live) else self.previous
        if self.canary == version:
            return Route(live, previous=previous)
        return Route(live, self.canary, self.weight, previous)

    def replaced(self, old: Version, new: Version) -> Route:
        """The route with a version replaced by another."""
        live = new if self.live == old else self.live
        canary = new if self.canary == old else self.canary
        previous = new if self.previous == old else self.previous
        return Route(live, canary, self.weight, previous)

    def at(self, version: Version) -> Route:
        """The route with a version's new engine."""
        return self.replaced(version, version)

    def bringing(self, version: Version | None) -> Route | None:
        """The route on another engine of the gateway, which has this version under the name, or none. None if nothing
        is left."""
        before = next((each for each in self.versions() if not each.id), None)
        if before is None:
            return self
        return self.replaced(before, version) if version else self.without(before)

    def arms(self) -> list[tuple[Arm, Version, float]]:
        """Each arm, its version, and the share of users that it answers."""
        found: list[tuple[Arm, Version, float]] = [("live", self.live, 1 - self.weight)]
        if self.canary:
            found.append(("canary" if self.weight else "shadow", self.canary, self.weight))
        if self.previous:
            found.append(("previous", self.previous, 0.0))
        return found

    def versions(self) -> list[Version]:
        """All versions that must stay loaded."""
        return [version for _, version, _ in self.arms()]


@dataclass(frozen=True)
class Table:
    """Every route, by the name that users know."""

    routes: Mapping[str, Route] = field(default_factory=dict)

    def with_route(self, name: str, route: Route) -> Table:
        """The table with another route for a name."""
        return Table({**self.routes, name: route})

    def without(self, name: str) -> Table:
        """The table without a name."""
        return Table({n: route for n, route in self.routes.items() if n != name})

    def at(self, version: Version) -> Table:
        """The table with a version's new engine: an engine that was started again has another URL."""
        return Table({name: route.at(version) for name, route in self.routes.items()})

    def version(self, served: str) -> Version | None:
        """A version by its served name, with its engine; None for one without a route."""
        found = (v for route in self.routes.values() for v in route.versions() if v.served == served)
        return next(found, None)

    def which(self, served: str) -> tuple[str, str, Arm | Literal[""]]:
        """For a version's served name: the adapter as users know it, the version's id, and its arm. Without a route,
        the parts of the name, and no arm."""
        for name, route in self.routes.items():
            for arm, version, _ in route.arms():
                if version.served == served:
                    return name, version.id, arm
        name, _, id_ = served.partition("@")
        return name, id_, ""

    def served(self) -> dict[str, str]:
        """Every version's served name, and the name that users know."""
        return {v.served: name for name, route in self.routes.items() for v in route.versions()}


def _share(salt: str, sticky: str) -> float:
    """A number in [0, 1) that a user keeps."""
    digest = hashlib.blake2b(f"{salt}\0{sticky}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
