"""The users' side, as an ASGI application: the handler of each path."""

from __future__ import annotations

import json
from collections.abc import Mapping

from peftopt.gateway.errors import Problem
from peftopt.gateway.exchange import Exchange, Receive, Scope, Send, answer_whole, headers_of, unknown_key
from peftopt.gateway.keys import ANYONE, Key
from peftopt.gateway.shared import Shared
from peftopt.records import Json

GENERATES = ("/v1/chat/completions", "/v1/completions")


class App:
    """The application: its routes and their handlers."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request of ASGI's."""
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        if path in GENERATES and method == "POST":
            await Exchange(self.shared, scope, receive, send).run()
        elif path == "/metrics" and method == "GET" and self.shared.settings.metrics:
            text = await self.shared.exposition()
            await answer_whole(send, 200, text, "text/plain; version=0.0.4; charset=utf-8")
        else:
            await answer_whole(send, *self._small(path, method, headers_of(scope)))

    def _small(self, path: str, method: str, headers: Mapping[str, str]) -> tuple[int, bytes, str]:
        """Status, body and content type of what the gateway answers itself."""
        key = self.shared.keys.of(headers.get("authorization", "")) if path == "/v1/models" else ANYONE
        known = {
            "/v1/models": lambda: self._models(key or ANYONE),
            "/health/live": _alive,
            "/health/ready": self._ready,
            "/health": self._ready,
        }
        if key is None:
            problem = unknown_key()
        elif path in known and method in ("GET", "HEAD"):
            status, value = known[path]()
            return status, json.dumps(value).encode(), "application/json"
        elif path in known or path in GENERATES:
            problem = Problem(405, f"{path} takes no {method}", "method_not_allowed")
        else:
            problem = Problem(404, f"there is nothing at {path}; there is {', '.join(GENERATES)}", "not_found")
        return problem.status, problem.body(), "application/json"

    def _models(self, key: Key) -> tuple[int, Json]:
        origins, listed = self.shared.settings.origins, []
        for name, route in self.shared.table.routes.items():
            model: dict[str, Json] = {"id": name, "object": "model", "created": 0, "owned_by": "peftopt"}
            if origin := origins.get(route.live.served):
                model["peftopt"] = origin.as_json()
            if key.may_ask(name):
                listed.append(model)
        return 200, {"object": "list", "data": listed}

    def _ready(self) -> tuple[int, Json]:
        lives = self.shared.lives
        ready = lives.ready and self.shared.open
        told = {
            "ready": ready,
            "draining": not self.shared.open,
            "failed": dict(lives.failed()),
            "doubted": dict(lives.doubted()),
        }
        return (200 if ready else 503), told


def _alive() -> tuple[int, Json]:
    return 200, {"alive": True}
