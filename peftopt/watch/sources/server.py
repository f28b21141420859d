"""Spans of a server's /metrics: a look now, compared with the one before."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from peftopt.errors import BROKEN, BadInput, MissingEnvironment
from peftopt.records import JsonValue
from peftopt.watch.promise import Promise
from peftopt.watch.sources import fetching, metrics, scrape
from peftopt.watch.spans import Span

PATH = "/metrics"
HINT = (
    "name the server's address, such as http://127.0.0.1:8000; a gateway with --keys shows its metrics there by "
    "--metrics users"
)


class Server:
    """Looks at a server's metrics. A server that does not answer is looked at again: the next span is longer. `lines`
    counts the looks."""

    def __init__(self, url: str, promise: Promise, position: JsonValue = None, key: str = "") -> None:
        """`position` as another left it; None to begin. Raises BadInput for a position that is none."""
        self._url, self._promise, self._key = url.rstrip("/").removesuffix(PATH), promise, key
        self._last: scrape.Scrape | None = None
        self.left_out: Mapping[str, int] = {}
        self.notices: list[str] = []
        self.lines = 0
        if position is not None:
            try:
                self._last = scrape.of_json(position)
            except BROKEN as error:
                raise BadInput("the state is not one of a server's metrics", "name another file: --state") from error

    @property
    def position(self) -> JsonValue:
        """The last look."""
        return self._last.as_json() if self._last else None

    def read(self, now: float | None = None) -> Iterator[Span]:
        """The span since the last look, at `now` (seconds since 1970); none at the first. Raises MissingEnvironment
        where no metrics come."""
        look = self._look(time.time() if now is None else now)
        before, self._last = self._last, look
        self.lines += 1
        self.notices[:] = metrics.blind(look)
        if before and look.at > before.at:
            yield metrics.span(before, look, self._promise)

    def _look(self, at: float) -> scrape.Scrape:
        answer = fetching.get(self._url, PATH, self._key, HINT)
        if answer.status != 200:
            raise MissingEnvironment(f"{self._url}{PATH} answers HTTP {answer.status}", HINT)
        try:
            look = scrape.of_text(answer.text, at, metrics.NAMES)
        except BROKEN as error:
            raise MissingEnvironment(f"{self._url}{PATH} is not in Prometheus' format: {error}", HINT) from error
        if not metrics.known(look):
            what = f"{self._url}{PATH} has no metrics of peftopt serve or of vLLM"
            raise MissingEnvironment(what, "point --server at one of them")
        return look
