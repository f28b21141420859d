"""What is served, on disk: each version's files under the hash of them, and the routes, whole after a crash at any
moment.

STATE/adapters/<sha256>/     the files of an adapter or of a merged model, never changed
STATE/registry.json          routes, versions and trials, replaced whole
STATE/trials/<version>/      what a trial asks of the operator's own prompts, and what was answered
STATE/events.jsonl           what happened, a line each
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

from peftopt import store
from peftopt.errors import BadInput, unwritable
from peftopt.gateway import copies
from peftopt.gateway.outcome import Outcome
from peftopt.gateway.routes import Route, Table, Version
from peftopt.gateway.trial import Trial
from peftopt.loadtest.moments import utc
from peftopt.measurements import structured
from peftopt.models.adapter import CONFIG, highest_rank
from peftopt.models.baked import is_baked, open_baked
from peftopt.records import Json
from peftopt.redaction import redacted

FORMAT = 1
SHORT = 12
"""Characters of a hash that name a version."""


@dataclass(frozen=True)
class Stored:
    """A version: `name` of its route, `id` the hash of its files, `folder` of the copy, `state` one of "loading",
    "live", "canary", "shadow", "previous", "leaving"; `rank` and `base` from its config. `engine` that serves a merged
    model, "" for an adapter on the gateway's engine; `certified`: whether it had to answer as itself."""

    name: str
    id: str
    folder: str
    state: str = "loading"
    rank: int = 0
    base: str = ""
    switch_s: float | None = None
    engine: str = ""
    certified: bool = True

    @property
    def version(self) -> Version:
        """The version as routes have it."""
        return Version(self.id[:SHORT], served(self.name, self.id))


def served(name: str, id_: str) -> str:
    """A version's name at the engine."""
    return f"{name}@{id_[:SHORT]}"


def is_served_name(name: str) -> bool:
    """Whether a gateway gave an engine this name: an unrecorded version with such a name is left from an earlier
    gateway."""
    return bool(re.fullmatch(rf".+@[0-9a-f]{{{SHORT}}}", name, re.DOTALL))


@dataclass
class Registry:
    """The served versions, in memory and on disk. `open_registry` makes one."""

    root: Path
    table: Table = field(default_factory=Table)
    versions: dict[str, Stored] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    """Versions on trial, by route."""
    ended: dict[str, Outcome] = field(default_factory=dict)
    """What came of the last trial of each route."""
    _lock: IO[str] | None = None

    def copy(self, name: str, folder: Path, engine: str = "") -> Stored:
        """A version of a route from a folder: its files are copied under their hash. `folder` has passed the checks;
        with an `engine` it is a merged model, else an adapter or a baked prompt.

        Raises MissingEnvironment for a full disk.
        """
        files = copies.of_model(folder) if engine else copies.of_adapter(folder)
        id_ = copies.take(files, self.root / "adapters")
        home = self.root / "adapters" / id_
        if engine:
            return Stored(name, id_, str(home), engine=engine)
        if is_baked(home):
            return Stored(name, id_, str(home), base=str((open_baked(home).config.get("base") or {}).get("name", "")))
        config = json.loads((home / CONFIG).read_text(encoding="utf-8"))
        base = str(config.get("base_model_name_or_path") or "")
        return Stored(name, id_, str(home), rank=highest_rank(config), base=base)

    def keep(self, stored: Stored, **changes: Json) -> Stored:
        """Store a version, or its changes."""
        now = replace(stored, **changes)
        self.versions[now.version.served] = now
        self.save()
        self.tell("version", **{k: v for k, v in asdict(now).items() if k != "folder"})
        return now

    def forget(self, name: str) -> None:
        """Drop a version by its name at the engine, and its files if no other route has them."""
        stored = self.versions.pop(name, None)
        self.save()
        if stored and not any(v.id == stored.id for v in self.versions.values()):
            shutil.rmtree(self.root / "adapters" / stored.id, ignore_errors=True)
        self.tell("forgotten", served=name)

    def route(self, name: str, route: Route | None) -> None:
        """Replace or remove a name's route; it is on disk before it takes effect."""
        table = self.table.with_route(name, route) if route else self.table.without(name)
        self.save(table)
        self.table = table
        self.tell("route", name=name, **(asdict(route) if route else {"removed": True}))

    def moved(self, version: Version) -> None:
        """Note a version's new engine. It is on disk with the next change: a gateway that starts asks the engines
        again."""
        self.table = self.table.at(version)

    def save(self, table: Table | None = None) -> None:
        """Write the whole registry. Raises MissingEnvironment if that fails; the old one stays."""
        value = {
            "format": FORMAT,
            "routes": {name: asdict(route) for name, route in (table or self.table).routes.items()},
            "versions": {name: asdict(stored) for name, stored in self.versions.items()},
            "trials": plain(self.trials),
            "ended": plain(self.ended),
        }
        store.write(self.root / "registry.json", json.dumps(value, indent=1), hint="name another --state")

    def tell(self, event: str, **what: Json) -> None:
        """Add an event; on a full disk only the line is lost."""
        line = redacted(json.dumps({"at": utc(time.time()), "event": event, **what}))
        with contextlib.suppress(OSError):
            store.add_lines(self.root / "events.jsonl", line + "\n")


def open_registry(root: Path) -> Registry:
    """The registry in a folder, created if there is none; removes half-done work of a crash. Raises BadInput for one
    that another gateway has open or that is damaged, MissingEnvironment for a folder that cannot be written."""
    root = root.resolve()
    try:
        (root / "adapters").mkdir(parents=True, exist_ok=True)
        lock = (root / "lock").open("w")
    except OSError as error:
        raise unwritable(root, error, "name another folder: --state") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BadInput(f"another gateway uses {root}", "end it, or name another folder: --state") from None
    for torn in (root / "adapters").glob(".*.tmp"):
        shutil.rmtree(torn, ignore_errors=True)
    found = Registry(root, _lock=lock)
    path = root / "registry.json"
    if path.is_file():
        try:
            _read(found, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError, BadInput) as error:
            raise BadInput(f"{path} is not whole: {error!r}", "restore it, or move the folder away") from error
    return found


def _read(registry: Registry, value: Mapping[str, Json]) -> None:
    if value["format"] != FORMAT:
        raise ValueError(f"format {value['format']}, this peftopt reads {FORMAT}")
    registry.versions = {name: Stored(**stored) for name, stored in value["versions"].items()}
    registry.table = Table({name: _route(route) for name, route in value["routes"].items()})
    trials, ended = value.get("trials", {}), value.get("ended", {})
    registry.trials = {name: structured(Trial, trial, f"trials.{name}") for name, trial in trials.items()}
    registry.ended = {name: structured(Outcome, outcome, f"ended.{name}") for name, outcome in ended.items()}


def plain(record: object) -> Json:
    """A record of records, as `structured` reads it."""
    import cattrs

    return cattrs.unstructure(record)


def shown(record: object) -> Json:
    """The same for others to read. JSON has no infinity: an unknown bound becomes null."""
    return _finite(plain(record))


def _finite(value: Json) -> Json:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _route(value: Mapping[str, Json]) -> Route:
    def version(arm: str) -> Version | None:
        told = value.get(arm)
        return Version(told["id"], told["served"], told.get("url", "")) if told else None

    live = version("live")
    if live is None:
        raise ValueError("a route has no live version")
    return Route(live, version("canary"), float(value["weight"]), version("previous"))
