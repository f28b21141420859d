"""Which version of an adapter answers a name. Pure: a table that is replaced whole, so that a change is one step.

A name that users know is a route. What the engine serves is a version of it, under a name of its own that holds the
hash of its weights: no cache of the engine can take one version for another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Arm = Literal["live", "canary", "shadow", "previous"]


@dataclass(frozen=True)
class Version:
    """Weights under a route. `served` names them at their engine; `id` is their hash, "" for what the engine
    brought. `url` of an engine of their own, "" for the gateway's engine. Where a version runs does not change which
    one it is."""

    id: str
    served: str
    url: str = field(default="", compare=False)


@dataclass(frozen=True)
class Route:
    """`live` answers, but for the share `weight` of users that `canary` answers; `previous` is kept for a rollback. A
    canary of weight 0 answers nobody: it is a shadow."""

    live: Version
    canary: Version | None = None
    weight: float = 0.0
    previous: Version | None = None

    def choose(self, sticky: str) -> tuple[Arm, Version]:
        """The arm and the version for a user; the same user gets the same one as long as the weight is the same."""
        if self.canary and _share(self.canary.id, sticky) < self.weight:
            return "canary", self.canary
        return "live", self.live

    def promoted(self) -> Route:
        """The canary answers everybody; what was live is kept. Raises LookupError without a canary."""
        if self.canary is None:
            raise LookupError("there is no canary to promote")
        return Route(self.canary, previous=self.live)

    def rolled_back(self) -> Route:
        """Without the canary where there is one, else what was live before. Raises LookupError without either."""
        if self.canary:
            return replace(self, canary=None, weight=0.0)
        if self.previous is None:
            raise LookupError("there is no earlier version")
        return Route(self.previous, previous=self.live)

    def without(self, version: Version) -> Route | None:
        """The route without a version that cannot answer: the one before answers in the live one's place. None where
        nothing is left."""
        live = self.previous if self.live == version else self.live
        if live is None or live == version:
            return None
        previous = None if self.previous in (version, live) else self.previous
        if self.canary == version:
            return Route(live, previous=previous)
        return Route(live, self.canary, self.weight, previous)

    def replaced(self, old: Version, new: Version) -> Route:
        """The route with another version in the place of one."""
        live = new if self.live == old else self.live
        canary = new if self.canary == old else self.canary
        previous = new if self.previous == old else self.previous
        return Route(live, canary, self.weight, previous)

    def at(self, version: Version) -> Route:
        """The route with a version where it runs now."""
        return self.replaced(version, version)

    def bringing(self, version: Version | None) -> Route | None:
        """The route on another engine of the gateway, which brings this version under the name, or none. None where
        nothing is left."""
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
        """All that must stay loaded."""
        return [version for _, version, _ in self.arms()]


@dataclass(frozen=True)
class Table:
    """Every route, by the name that users know."""

    routes: Mapping[str, Route] = field(default_factory=dict)

    def with_route(self, name: str, route: Route) -> Table:
        """The table with another route in a name's place."""
        return Table({**self.routes, name: route})

    def without(self, name: str) -> Table:
        """The table without a name."""
        return Table({n: route for n, route in self.routes.items() if n != name})

    def at(self, version: Version) -> Table:
        """The table with a version where it runs now: an engine that was started again has another URL."""
        return Table({name: route.at(version) for name, route in self.routes.items()})

    def version(self, served: str) -> Version | None:
        """A version by its name among all that is served, with where it runs; None for one that no route has."""
        found = (v for route in self.routes.values() for v in route.versions() if v.served == served)
        return next(found, None)

    def which(self, served: str) -> tuple[str, str, Arm | Literal[""]]:
        """Of a version's name among all that is served: the adapter as users know it, the version's id, and its arm;
        of one that no route has, what its name says, and no arm."""
        for name, route in self.routes.items():
            for arm, version, _ in route.arms():
                if version.served == served:
                    return name, version.id, arm
        name, _, id_ = served.partition("@")
        return name, id_, ""

    def served(self) -> dict[str, str]:
        """Every version's name among all that is served, and the name users know it by."""
        return {v.served: name for name, route in self.routes.items() for v in route.versions()}


def _share(salt: str, sticky: str) -> float:
    """A number in [0, 1) that a user keeps."""
    digest = hashlib.blake2b(f"{salt}\0{sticky}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
