"""Everything a person sees in the terminal: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console as Rich
from rich.console import ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table

from peftopt.errors import BadRecipe, PeftoptError
from peftopt.redaction import redacted

Problem = tuple[int, str, str]
"""A mistake of a recipe: its line, what is wrong, and a hint."""

OUTCOME_STYLE = {"accepted": "green", "rejected": "red", "inconclusive": "yellow", "not judged": "dim"}


QUIET_S = 60.0
"""Seconds between two lines of progress in a log, where less than a tenth is done in between."""

NARROWEST = 20
"""The least width of a text in columns, however narrow the terminal is."""

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move the cursor, change colours or the title of a terminal, or reverse the order of a line."""


def visible(text: str) -> str:
    """The text as it may go to a terminal: without secrets, and with each control character as its escape sequence in
    plain text. Line feeds and tabs stay."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), redacted(text))


def shown(text: str) -> str:
    """The text as it may go to rich: see `visible`. Its markup is escaped."""
    return escape(visible(text))


class Visible:
    """Something that rich draws, with all its text passed through `visible`."""

    def __init__(self, drawn: RenderableType) -> None:
        self._drawn = drawn

    def __rich_console__(self, console: Rich, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._drawn, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class Console:
    """Implements runner.Listener. `quiet` keeps stderr to warnings and errors."""

    def __init__(self, quiet: bool = False) -> None:
        # off a terminal (a log, a file) lines may be as long as the table is wide
        self.out = Rich(highlight=False, width=None if sys.stdout.isatty() else 160)
        self.err = Rich(stderr=True, highlight=False)
        self.quiet = quiet
        self.lock = threading.Lock()

    # ---- while it runs ----

    def done(self, step: str, what: str, seconds: float | None, note: str = "") -> None:
        """Print a step that is over, to stderr unless quiet; `seconds` None means that it was cached."""
        if not self.quiet:
            took = "cached" if seconds is None else f"{seconds:.1f} s"
            self.err.print(f"  {shown(step):<8} {shown(what)} [dim]{took} {shown(note)}[/dim]")

    def tell(self, text: str) -> None:
        """Print a text to stderr, unless quiet."""
        if not self.quiet:
            self.err.print(f"  {shown(text)}", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning to stderr, quiet or not."""
        self.err.print(f"[yellow]warning:[/yellow] {shown(text)}", soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        """On a terminal, show a bar with an estimate, in units such as "blocks" or "%". Elsewhere, print a line at the
        start, and a line with an estimate after each tenth or each minute."""
        if self.quiet:
            yield lambda done, what: None
        elif not self.err.is_terminal:
            yield self._lines(title, total, unit)
        else:
            columns = (
                TextColumn("  {task.description:<14}"),
                BarColumn(30),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[what]}"),
            )
            with Progress(*columns, console=self.err, transient=True) as bar:
                task = bar.add_task(title, total=total, what="", count=_count(0, total, unit))

                def show(done: int, what: str) -> None:
                    bar.update(task, completed=done, what=shown(what), count=_count(done, total, unit))

                yield show

    @contextlib.contextmanager
    def working(self, title: str) -> Iterator[Callable[[str], None]]:
        """On a terminal, show a spinner with the time so far and the last text. Elsewhere, print a line per text."""
        started = time.perf_counter()
        if self.quiet:
            yield lambda text: None
        elif not self.err.is_terminal:
            yield lambda text: self.err.print(f"  {shown(title):<14} [dim]{shown(text[:100])}[/dim]", soft_wrap=True)
        else:
            columns = (SpinnerColumn(), TextColumn("{task.description:<14}"), TimeElapsedColumn())
            with Progress(*columns, TextColumn("[dim]{task.fields[what]}"), console=self.err, transient=True) as bar:
                task = bar.add_task(title, total=None, what="")
                yield lambda text: bar.update(task, what=shown(text[:80]))
        self.done(title, "ready", time.perf_counter() - started)

    def _lines(self, title: str, total: int, unit: str) -> Callable[[int, str], None]:
        started = printed_at = time.perf_counter()
        printed = -1

        def show(done: int, what: str) -> None:
            nonlocal printed, printed_at
            with self.lock:
                tenth, now = done * 10 // max(total, 1), time.perf_counter()
                if tenth > printed or now > printed_at + QUIET_S:
                    left = ""
                    if printed >= 0 and 0 < done < total:
                        left = f", {_about((now - started) * (total - done) / done)} left"
                    printed, printed_at = tenth, now
                    self.err.print(f"  {shown(title):<14} {_count(done, total, unit)}{left} [dim]{shown(what)}[/dim]")

        return show

    # ---- results ----

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], outcomes: Sequence[str] = ()) -> None:
        """Print a table; each row takes the colour of its outcome on a terminal."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in header:
            table.add_column(shown(column), overflow="fold")
        for row, outcome in zip(rows, outcomes or [""] * len(rows), strict=True):
            table.add_row(*(shown(cell) for cell in row), style=OUTCOME_STYLE.get(outcome, ""))
        self.out.print(table)

    def say(self, text: str, style: str = "") -> None:
        """Print a text to stdout as it is, in a style of rich; its markup is escaped."""
        self.out.print(shown(text), style=style or None, soft_wrap=True)

    def pairs(self, title: str, values: Mapping[str, object]) -> None:
        """A titled list of names and values."""
        self.out.print(f"[bold]{shown(title)}[/bold]")
        for name, value in values.items():
            self.out.print(f"  {shown(name):<24} {shown(str(value))}", soft_wrap=True)

    def glossary(self, title: str, values: Mapping[str, str]) -> None:
        """A titled list of names and what they mean, as wide as the terminal, or 80 columns wide without a terminal."""
        indent = 4 + max(map(len, values), default=0)
        width = max(shutil.get_terminal_size().columns - indent, NARROWEST)
        self.out.print(f"[bold]{shown(title)}[/bold]")
        for name, text in values.items():
            first, *others = textwrap.wrap(text, width, break_on_hyphens=False) or [""]
            self.out.print(shown(f"  {name:<{indent - 2}}{first}"), soft_wrap=True)
            for line in others:
                self.out.print(shown(" " * indent + line), soft_wrap=True)

    def error(self, error: PeftoptError) -> None:
        """Print what is wrong and what to do; of a recipe, all its mistakes at once."""
        problems = error.problems if isinstance(error, BadRecipe) else ((0, error.message, error.hint),)
        for line, message, hint in problems:
            where = f" ({error.path}:{line})" if isinstance(error, BadRecipe) and line else ""
            self.err.print(f"[red]error:[/red] {shown(message)}{shown(where)}", soft_wrap=True)
            if hint:
                self.err.print(f"[cyan]hint:[/cyan] {shown(hint)}", soft_wrap=True)
        sys.stderr.flush()


def print_json(result: object) -> None:
    """Print a result for programs: one JSON object on one line of stdout, with null for a number that is not known.

    A verb prints one object, or one for each of its inputs. An error is one object too: see `print_error`.
    """
    from peftopt.report.as_json import plain

    values = plain(result)
    assert isinstance(values, dict), "an object can get further keys, a list cannot"
    print(redacted(json.dumps(values, allow_nan=False)), flush=True)


def print_text(text: str, end: str = "\n", stderr: bool = False) -> None:
    """Print a text that is for people and programs alike, such as a report, to stdout or stderr."""
    print(visible(text), end=end, file=sys.stderr if stderr else None)


def print_error(exit_code: int, message: str, hint: str = "", problems: Sequence[Problem] = ()) -> None:
    """Print what went wrong, for programs: `{"error": {…}}`. `problems` are the mistakes of a recipe."""
    listed = [{"line": line, "message": text, "hint": help_} for line, text, help_ in problems]
    error = {"message": message, "hint": hint, "exit_code": exit_code}
    print_json({"error": {**error, "problems": listed} if listed else error})


def _count(done: int, total: int, unit: str) -> str:
    return f"{done} %" if unit == "%" else f"{done}/{total} {unit}"


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
