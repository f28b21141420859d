"""Spans of the metrics that a Prometheus has kept: its HTTP API, as far as it has gone since.

Raw counters are asked for, and compared here: PromQL's increase() extrapolates, and would make up parts of requests.
Source: prometheus.io/docs/prometheus/latest/querying/api, range queries.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from urllib.parse import urlencode

from peftopt.errors import BROKEN, BadInput, MissingEnvironment
from peftopt.records import Json, JsonValue
from peftopt.watch.promise import Promise
from peftopt.watch.sources import fetching, metrics, scrape
from peftopt.watch.spans import Span

MOST_POINTS = 500
"""Of a series in one answer; Prometheus itself allows 11,000."""

HINT = "name the address of a Prometheus, such as http://127.0.0.1:9090"


class Prometheus:
    """Looks that Prometheus took, one at the end of each window. `select`: label matchers, such as job="chat".
    `lines` counts the looks."""

    def __init__(
        self,
        url: str,
        promise: Promise,
        window_s: float,
        since_s: float,
        position: JsonValue = None,
        select: str = "",
        key: str = "",
    ) -> None:
        """It begins at the `position` that another left, or `since_s` seconds ago. Raises BadInput for a position that
        is none."""
        self._url, self._promise, self._window_s, self._key = url.rstrip("/"), promise, window_s, key
        names = "|".join(sorted(metrics.NAMES))
        matchers = ", ".join(filter(None, (f'__name__=~"{names}"', select)))
        self._query = f"{{{matchers}}}"
        self._last: scrape.Scrape | None = None
        self.left_out: Mapping[str, int] = {}
        self.notices: list[str] = []
        self.lines = 0
        if position is not None and not isinstance(position, int | float):
            raise BadInput("the state is not one of a Prometheus", "name another file: --state")
        now = time.time()
        begin = float(position) if position is not None else now - since_s
        self._next = begin - begin % window_s

    @property
    def position(self) -> JsonValue:
        """The time of the last look."""
        return self._last.at if self._last else self._next

    def read(self, now: float | None = None) -> Iterator[Span]:
        """The windows that are over `now` (seconds since 1970). Raises MissingEnvironment where no metrics come."""
        now = time.time() if now is None else now
        while self._next <= now:
            end = min(self._next + MOST_POINTS * self._window_s, now)
            looks = self._looks(self._next, end)
            self.lines += len(looks)
            for look in looks:
                if self._last:
                    yield metrics.span(self._last, look, self._promise)
                self._last = look
            self._next = (self._last.at if looks and self._last else end - end % self._window_s) + self._window_s
        if self._last is None:
            what = f"{self._url} has no metrics of peftopt serve or of vLLM that match {self._query[-60:]}"
            raise MissingEnvironment(what, "does it scrape the server? Go further back: --since 24h")
        self.notices[:] = metrics.blind(self._last)

    def _looks(self, start: float, end: float) -> list[scrape.Scrape]:
        asked = {"query": self._query, "start": start, "end": end, "step": self._window_s}
        answer = fetching.get(self._url, f"/api/v1/query_range?{urlencode(asked)}", self._key, HINT)
        try:
            data = json.loads(answer.body)
            if data["status"] != "success":
                raise MissingEnvironment(f"{self._url} refuses: {data['error']}", HINT)
            return _looks(data["data"]["result"])
        except BROKEN as error:
            raise MissingEnvironment(
                f"{self._url} is not a Prometheus: it answers HTTP {answer.status}", HINT
            ) from error


def _looks(result: Json) -> list[scrape.Scrape]:
    """The looks of an answer's matrix, in the order of time, those without metrics of anybody's left out."""
    by_time: dict[float, list[tuple[str, dict[str, str], float]]] = defaultdict(list)
    for series in result:
        labels = dict(series["metric"])
        name = labels.pop("__name__")
        for at, value in series["values"]:
            by_time[float(at)].append((name, labels, float(value)))
    looks = [scrape.of_samples(iter(samples), at) for at, samples in sorted(by_time.items())]
    return [look for look in looks if metrics.known(look)]
