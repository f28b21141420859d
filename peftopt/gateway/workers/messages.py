"""Messages between supervisor and workers. JSON in transit, records at both ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from peftopt.gateway.keys import Key, Keys
from peftopt.gateway.limits import Limits
from peftopt.gateway.routes import Route
from peftopt.gateway.sampling import Sample
from peftopt.gateway.shared import Settings
from peftopt.gateway.upstream import Timeouts
from peftopt.records import Json

Record = TypeVar("Record", "Asked", "Part", "State", "Counts", "Renewed")


@dataclass(frozen=True)
class Asked:
    """A worker that wants to join: its process, and which of the workers it is, 0 for any that is missing."""

    pid: int
    index: int = 0


@dataclass(frozen=True)
class KnownKey:
    """An API key by its hash, as keys.Key has it."""

    digest: str
    name: str
    adapters: tuple[str, ...]
    rate: float


@dataclass(frozen=True)
class Part:
    """What worker `index` works with: the engine's `url`, its part of the limits, the keys, the log and how many of its
    files are kept, the bounds of the metrics' buckets in seconds, and what holds for every request. `trace`: where
    spans are sent, which name `host` and `port`. `engine_key`: the API key of engines that the gateway has started;
    `started`: that at `url` is one of them."""

    index: int
    url: str
    limits: Limits
    per_adapter: int
    per_key: int
    keys: tuple[KnownKey, ...]
    timeouts: Timeouts
    log: str
    slos_s: tuple[float, ...]
    settings: Settings
    log_keep: int = 0
    trace: str = ""
    host: str = ""
    port: int = 0
    engine_key: str = field(default="", repr=False)
    started: bool = False

    def known(self) -> Keys:
        """The keys as requests are checked by them."""
        return _known(self.keys)


@dataclass(frozen=True)
class Renewed:
    """The keys as the file has them now."""

    keys: tuple[KnownKey, ...] = ()

    def known(self) -> Keys:
        """The keys as requests are checked by them."""
        return _known(self.keys)


@dataclass(frozen=True)
class State:
    """What is served now. `open` is False while the gateway drains; `switched`: seconds that loads took which no
    request has told of yet; `trials`: the routes that are on trial, and the share of their requests that both
    versions are asked again; `samples` of the engines' memory; `failed`: why versions do not answer; `doubted`: those
    that do though not as themselves; `certified`: those that had to answer as themselves; `loading_s`: seconds that the
    engines of versions took to start."""

    routes: Mapping[str, Route] = field(default_factory=dict)
    ready: bool = False
    open: bool = True
    switched: Mapping[str, float] = field(default_factory=dict)
    trials: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, Sample] = field(default_factory=dict)
    model_loading_time: float | None = None
    failed: Mapping[str, str] = field(default_factory=dict)
    doubted: Mapping[str, str] = field(default_factory=dict)
    certified: tuple[str, ...] = ()
    loading_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """A worker's requests: by the version at the engine, all that run or wait, the loads that one has told of, and
    those that wait."""

    in_flight: Mapping[str, int] = field(default_factory=dict)
    busy: int = 0
    told: tuple[str, ...] = ()
    waiting: int = 0


def _known(told: Sequence[KnownKey]) -> Keys:
    return Keys({key.digest: Key(key.name, key.adapters, key.rate) for key in told})


def keys(known: Keys) -> tuple[KnownKey, ...]:
    """Keys as they are told of."""
    return tuple(KnownKey(digest, key.name, key.adapters, key.rate) for digest, key in known.known.items())


def written(record: Record) -> Json:
    """A record as JSON."""
    return asdict(record)


def read(kind: type[Record], value: Json) -> Record:
    """The record in JSON that the other side has written."""
    import cattrs

    return cattrs.structure(value, kind)
