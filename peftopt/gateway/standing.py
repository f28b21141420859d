"""The state of routes and versions, for operators and for the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftopt.gateway.registry import Stored

if TYPE_CHECKING:
    from peftopt.gateway.lives import Lives


def rows(lives: Lives) -> list[dict[str, object]]:
    """Routes and versions, for operators."""
    listed: list[dict[str, object]] = []
    for name, route in lives.registry.table.routes.items():
        for arm, version, weight in route.arms():
            stored = lives.registry.versions.get(version.served)
            listed.append(
                {
                    "name": name,
                    "arm": arm,
                    "version": version.id,
                    "weight": round(weight, 6),
                    "in_flight": lives.in_flight[version.served],
                    "rank": stored.rank if stored else None,
                    "load_s": stored.switch_s if stored else None,
                    "engine": stored.engine if stored else "",
                    "url": version.url,
                    "failed": lives.failures.why(version.served),
                    "doubted": lives.doubts.get(version.served, ""),
                    "certified": lives.certified(version.served),
                }
            )
    return listed


def show(lives: Lives) -> None:
    """Write versions and arms to the metrics."""
    own = {(stored.name, stored.version.id) for stored in lives.registry.versions.values()}
    brought = {(name.partition("@")[0], "") for pair in lives.brings.items() for name in pair}
    lives.metrics.keep(own | brought | {(name, "") for name in lives.registry.table.routes})
    lives.metrics.adapter_info.clear()
    lives.metrics.arm_weight.clear()
    for stored in lives.registry.versions.values():
        state = _state(lives, stored)
        labels = (stored.name, stored.version.id, state, str(stored.rank), stored.base)
        lives.metrics.adapter_info.labels(*labels).set(1)
    for name, route in lives.registry.table.routes.items():
        for arm, _, weight in route.arms():
            if arm != "previous":
                lives.metrics.arm_weight.labels(name, arm).set(weight)


def _state(lives: Lives, stored: Stored) -> str:
    """What the metrics say of a version."""
    if stored.version.served in lives.failures:
        return "failed"
    return "doubted" if stored.version.served in lives.doubts else stored.state
