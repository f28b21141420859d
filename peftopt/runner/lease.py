"""A lease: which machine builds an artifact, among those that share a store.

It saves work, and nothing is wrong without it: two builders of one artifact write files that are named by their hashes.
So a lease that cannot be taken, or that its holder has lost, stops nobody.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from types import TracebackType

from peftopt import store
from peftopt.errors import BROKEN
from peftopt.runner.objects import Objects, Unreachable
from peftopt.runner.process import interrupted

BEAT_S = 10.0
"""Seconds after which a holder writes its lease again."""

STALE_S = 60.0
"""A lease that has not changed for so many seconds is one of a dead process. Each waiter counts them itself, since
clocks of machines differ."""

LOOK_S = 2.0
"""Seconds between two looks at a lease that another process holds."""


class Lease:
    """The lease of an object `name` on a thing called `what`, as a context manager: `take` takes it, the end gives it
    back. `warn` receives who holds it."""

    def __init__(self, objects: Objects, name: str, what: str, warn: Callable[[str], None]) -> None:
        self.objects = objects
        self.name = name
        self.what = what
        self.warn = warn
        self.held = False
        self._holder = store.signature()
        self._beats = itertools.count()
        self._over = threading.Event()
        self._beating: threading.Thread | None = None
        self._last: bytes | None = None
        self._since = 0.0

    def __enter__(self) -> Lease:
        return self

    def take(self) -> None:
        """Take the lease where nobody has it, or where its holder is dead; else wait for LOOK_S. Raises
        KeyboardInterrupt."""
        try:
            mine = self._text()
            if self.objects.create(self.name, mine) or (there := self.objects.read(self.name)) == mine:
                self._hold()
            elif there is not None:
                self._wait_for(there)
        except Unreachable as error:
            self.warn(f"{error.message}; another machine may build {self.what} too")
            self.held = True

    def _wait_for(self, there: bytes) -> None:
        if self._last is None:
            self.warn(f"{self.what} is being built by {_holder(there)}: waiting for it")
        if there != self._last:
            self._last = there
            self._since = time.monotonic()
        if time.monotonic() - self._since > STALE_S:
            self.warn(f"{self.what} was left half built by {_holder(there)}, silent for {STALE_S:.0f} s: taken over")
            self.objects.write(self.name, self._text())
            self._hold()
        elif interrupted(LOOK_S):
            raise KeyboardInterrupt

    def _hold(self) -> None:
        self.held = True
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(Unreachable):  # who waits then builds too
                self.objects.write(self.name, self._text())

    def _text(self) -> bytes:
        return json.dumps({"holder": self._holder, "beat": next(self._beats)}).encode()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._beating is None:
            return
        self._over.set()
        self._beating.join()
        with contextlib.suppress(Unreachable):  # it is stale after STALE_S
            self.objects.remove(self.name)


def _holder(text: bytes) -> str:
    """Who holds a lease, by its text."""
    try:
        return str(json.loads(text)["holder"])
    except BROKEN:
        return "another process"
