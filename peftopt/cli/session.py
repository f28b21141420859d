"""One call of `watch`: read the source, judge it, show the result, keep the state, and propose a recipe at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peftopt.cli import proposed, screen
from peftopt.cli.console import Console, Visible, print_json
from peftopt.errors import ACCEPTED, INCONCLUSIVE, REJECTED, MissingEnvironment
from peftopt.metrics import counted
from peftopt.watch.running import Heard, Kept, Source, Watch
from peftopt.watch.watching import Outcome

if TYPE_CHECKING:
    from peftopt.cli.watch import Options

EXITS: dict[Outcome, int] = {
    "nothing shown": ACCEPTED,
    "alarm": REJECTED,
    "out of range": INCONCLUSIVE,
    "too little": INCONCLUSIVE,
}

SILENT_WINDOWS = 5
"""After so many windows without a request, the screen says so first."""


@dataclass
class Session:
    """The state of one call of `watch`. Spans that began before `begin` (seconds since 1970) are skipped."""

    options: Options
    watch: Watch
    reading: Source
    kept: Kept
    begin: float = 0.0
    console: Console = field(default_factory=Console)
    kinds: set[str] = field(default_factory=set)
    """The kinds of this call's alarms."""
    reached: bool = False
    """Whether the source was ever read."""
    asked: int = 0
    """Requests that this call read."""

    @property
    def live(self) -> bool:
        """Whether the screen is drawn again after each window."""
        return not self.options.once and not self.options.as_json and self.console.out.is_terminal

    def once(self) -> int:
        """Read all there is, print one screen, and return the exit code."""
        self._hear()
        self.kept.write(self.watch, self.reading)
        if not self.options.as_json:
            self.console.out.print(self._screen())
        return self._end()

    def until_interrupted(self) -> int:
        """Read and show window after window until Ctrl-C. Returns the exit code."""
        with contextlib.suppress(KeyboardInterrupt), self._showing() as show:
            while True:
                started, trouble = time.monotonic(), ""
                try:
                    self._hear()
                    self.kept.write(self.watch, self.reading)
                except MissingEnvironment as error:
                    if not self.reached:
                        raise
                    trouble = f"{error.message}; trying again"
                show(trouble)
                time.sleep(max(0.0, self.kept.every_s - (time.monotonic() - started)))
        return self._end()

    # ---- hearing and showing

    def _hear(self) -> None:
        """Read the spans since the last call, and judge them."""
        spans = (span for span in self.reading.read(time.time()) if span.began >= self.begin)
        for heard in self.watch.hear(spans):
            self.kinds |= {alarm.kind for alarm in heard.alarms}
            self.asked += sum(traffic.asked for traffic in heard.span.adapters.values())
            self._tell(heard)
        if not self.reading.lines and not self.watch.history.ended and self.options.once:
            hint = "send a request first: peftopt serve writes a line for each"
            raise MissingEnvironment(f"there is nothing to read: {self.kept.source}", hint)
        self.reached = True

    def _tell(self, heard: Heard) -> None:
        if self.options.as_json:
            for values in screen.records(heard, self.watch):
                print_json(values)
        elif not self.options.once and not self.live:
            for line in screen.lines(heard, self.watch):
                self.console.say(line)

    @contextlib.contextmanager
    def _showing(self) -> Iterator[Callable[[str], None]]:
        """The function to call after each window, with what is wrong with the source."""
        if self.live:
            from rich.live import Live

            with Live(console=self.console.out, auto_refresh=False) as live:
                yield lambda trouble: live.update(self._screen(trouble), refresh=True)
        else:
            about = self._about()
            for text in (about.budget, *(f"not watched: {each}" for each in about.unwatched)):
                self.console.tell(text)
            yield lambda trouble: self.console.warn(trouble) if trouble else None

    def _screen(self, trouble: str = "") -> Visible:
        return Visible(screen.screen(self.watch, self._about(trouble), self.console.out.width))

    def _about(self, trouble: str = "") -> screen.About:
        detectors = counted(len(self.watch.watching.gauges), "detector")
        left_out = (f"{counted(n, 'line')}, {reason}" for reason, n in self.reading.left_out.items())
        return screen.About(
            source=self.kept.source,
            every=screen.lasting(self.kept.every_s),
            budget=f"at most one false alarm in {screen.lasting(self.kept.arl_s)}, on average, over {detectors}",
            unwatched=self.watch.promise.unwatched,
            notices=self.reading.notices,
            left_out="; ".join(left_out),
            trouble=trouble,
            silent=self._silent(),
        )

    def _silent(self) -> str:
        """Since when there is no request, if there was none since the last call or for SILENT_WINDOWS."""
        last = self.watch.history.last_asked
        if last is None:
            return ""
        late = time.time() - last > SILENT_WINDOWS * self.kept.every_s
        silent = not self.asked if self.options.once else late
        return f"no request since {screen.clock(last)}" if silent else ""

    # ---- the end

    def _end(self) -> int:
        """Print the outcome, and propose a recipe. Returns the exit code."""
        outcome = self.watch.watching.outcome
        if self.options.once and not self.asked and outcome == "nothing shown":
            outcome = "too little"
        if self.options.as_json:
            about = self._about()
            end = {"kind": "outcome", "outcome": outcome, "exit_code": EXITS[outcome], "windows": self.watch.heard}
            notes = {"false_alarms": about.budget, "unwatched": about.unwatched, "notices": about.notices}
            print_json({**end, **notes, "left_out": self.reading.left_out})
        elif not self.options.once:
            self.console.say(*screen.WORDS[outcome])
        if "range" in self.kinds and (self.options.propose or not self.options.as_json):
            run, logs, file = self.options.run, self.options.logs, self.options.propose
            proposed.propose(run, self.watch.history, logs, file, self.console)
        elif self.options.propose:
            self.console.tell("no recipe is proposed: nothing shows that the traffic is not the run's")
        return EXITS[outcome]
