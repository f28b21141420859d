"""The output of `watch`: a screen that is drawn again after each window, or a line for each window."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftopt.metrics import counted, format_value, percent
from peftopt.records import Json
from peftopt.watch import history as histories
from peftopt.watch.history import NO_FIGURES, Figures
from peftopt.watch.running import Heard, Watch
from peftopt.watch.spans import Engine, Time
from peftopt.watch.watching import Alarm, Gauge, Outcome

BLOCKS = "▁▂▃▄▅▆▇█"
UNKNOWN = "—"
NARROWEST, WIDEST = 6, histories.KEPT
"""The least and the greatest width of a sparkline, in characters."""

SPARKED = 6
"""Up to this many adapters have sparklines; with more, each has a line of numbers alone."""

SHOWN, ALARMS_SHOWN = 8, 5
"""The number of detectors and of alarms on the screen; half as many detectors on less than ROOMY columns."""

ROOMY = 100
NEAREST = 0.99
"""The greatest nearness that is shown of a detector without an alarm."""
BAR, WIDE = 10, 130
"""The width of a bar, and the greatest width of the screen, in characters."""

WORDS: dict[Outcome, tuple[str, str]] = {
    "nothing shown": ("nothing shows that production is not what was decided", "green"),
    "alarm": ("alarm: production is not what was decided", "bold red"),
    "out of range": ("out of range: this traffic is not what was decided on", "bold yellow"),
    "too little": ("too little to tell", "yellow"),
}


@dataclass(frozen=True)
class About:
    """The texts on the screen beside the numbers: the source, the length of a window, the limit on false alarms, what
    is not watched, what is unusual about the source, what was left out of it, and what is wrong with it now."""

    source: str
    every: str
    budget: str
    unwatched: Sequence[str] = ()
    notices: Sequence[str] = ()
    left_out: str = ""
    trouble: str = ""
    silent: str = ""
    """Since when there is no request, if that is unusually long."""


def screen(watch: Watch, about: About, width: int) -> Group:
    """The whole screen, for a terminal of this width in columns."""
    return Group(*_parts(watch, about, min(width, WIDE)))


def _parts(watch: Watch, about: About, width: int) -> Iterator[RenderableType]:
    yield _head(watch, about)
    if watch.history.adapters:
        yield Text()
        yield _adapters(watch, max(NARROWEST, min(WIDEST, (width - 16) // 6 - 2)))
    if any(vars(each) != vars(Engine()) for each in watch.history.engine):
        yield Text()
        yield _engine(watch, max(NARROWEST, min(WIDEST, (width - 8) // 6 - 2)))
    if watch.watching.gauges:
        yield Text("\nnearest to an alarm", style="bold")
        yield _gauges(watch.watching.gauges, width)
    if watch.alarms:
        yield Text("\nlast alarms", style="bold")
        yield from _alarms(watch.alarms)
    notes = [f"not watched: {each}" for each in about.unwatched]
    notes += [*about.notices, *([f"left out: {about.left_out}"] if about.left_out else [])]
    if notes:
        yield Text("\n" + "\n".join(notes), style="dim")
    if about.trouble:
        yield Text(f"\n{about.trouble}", style="yellow")


def _head(watch: Watch, about: About) -> Text:
    outcome = watch.watching.outcome
    words, style = WORDS["too little" if about.silent and outcome == "nothing shown" else outcome]
    words = f"{words}: {about.silent}" if about.silent else words
    until = f", until {clock(watch.history.ended[-1])}" if watch.history.ended else ""
    return Text.assemble(
        ("peftopt watch ", "bold"),
        f"{watch.promise.run}, {watch.promise.variant}\n",
        (words, style),
        "\n",
        (f"{about.source}\nwindows of {about.every}{until}\n{about.budget}", "dim"),
    )


# ---- the figures ---------------------------------------------------------------------------------


def _adapters(watch: Watch, width: int) -> Table:
    promise, windows = watch.promise, watch.history.adapters
    times = (f"{_name('latency', watch)} latency", f"{_name('ttft', watch)} TTFT")
    table = _table("adapter", *times, "tokens/s", "failed", "refused", "batch fill")
    limits = [histories.limit(promise, time)[1] for time in ("latency", "ttft")]
    if any(limits):
        table.add_row("limit", *map(_s, limits), style="cyan")
    for name, each in sorted(windows.items()):
        table.add_row(Text(name), *_cells(next((w for w in reversed(each) if w.asked), NO_FIGURES)))
        if len(windows) <= SPARKED:
            table.add_row(
                "",
                spark([w.latency_s for w in each], width, limits[0]),
                spark([w.ttft_s for w in each], width, limits[1]),
                spark([w.tokens_per_s for w in each], width),
                spark([w.failed for w in each], width, 0.0),
                spark([w.refused for w in each], width, 0.0),
                spark([w.batch_fill for w in each], width, None, 1.0),
            )
    return table


def _cells(last: Figures) -> list[RenderableType]:
    kinds = [f"{n} {what}" for n, what in ((last.oom, "OOM"), (last.timeouts, "timeout")) if n]
    failed = f"{last.failed}/{last.asked}" + (f"\n{', '.join(kinds)}" if kinds else "")
    return [
        _s(last.latency_s),
        _s(last.ttft_s),
        format_value("tokens/s", last.tokens_per_s).removesuffix(" tokens/s"),
        Text(failed, style="red" if last.failed else ""),
        Text(str(last.refused), style="red" if last.refused else ""),
        _share(last.batch_fill),
    ]


def _engine(watch: Watch, width: int) -> Table:
    all_ = list(watch.history.engine)
    last = all_[-1]
    table = _table("", "GPU", "reserved", "fragmented", "batch fill", "KV cache", "running")
    reserved = UNKNOWN if last.memory_reserved is None else format_value("bytes", last.memory_reserved)
    running = UNKNOWN if last.running is None else f"{last.running:.0f}"
    shares = [_share(last.gpu_utilization), reserved, _share(last.fragmentation), _share(last.batch_fill)]
    table.add_row("engine", *shares, _share(last.kv_usage), running)
    table.add_row(
        "",
        spark([each.gpu_utilization for each in all_], width, None, 1.0),
        spark([each.memory_reserved for each in all_], width),
        spark([each.fragmentation for each in all_], width, None, 1.0),
        spark([each.batch_fill for each in all_], width, None, 1.0),
        spark([each.kv_usage for each in all_], width, None, 1.0),
        spark([each.running for each in all_], width),
    )
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="ellipsis", no_wrap=True, max_width=16)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _name(time: Time, watch: Watch) -> str:
    return f"P{100 * (1 - histories.limit(watch.promise, time)[0]):.3g}"


def _s(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else format_value("ms", 1e3 * seconds)


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else percent(value)


def spark(values: Iterable[float | None], width: int, limit: float | None = None, top: float = 0.0) -> Text:
    """The last values as a line of blocks, scaled from 0 to their maximum or to `top`. Values above the limit are
    red."""
    last = list(values)[-width:]
    known = [value for value in last if value is not None]
    if not any(known):
        return Text()
    highest = max(top, *known)
    line = Text()
    for value in last:
        if value is None:
            line.append(" ")
        else:
            height = math.ceil(value / highest * len(BLOCKS)) - 1
            line.append(BLOCKS[max(0, height)], style="red" if limit is not None and value > limit else "blue")
    return line


# ---- the detectors -------------------------------------------------------------------------------


def _gauges(gauges: Sequence[Gauge], width: int) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, width=width)
    table.add_column(no_wrap=True)
    table.add_column(overflow="ellipsis", no_wrap=True, max_width=24)
    table.add_column(overflow="fold", ratio=1)
    shown = SHOWN if width >= ROOMY else SHOWN // 2
    heard = [gauge for gauge in gauges if gauge.seen]
    for gauge in heard[:shown]:
        full = round(BAR * min(1.0, max(0.0, gauge.nearness)))
        style = "red" if gauge.nearness > 0.8 else "yellow" if gauge.nearness > 0.5 else "green"
        bar = Text.assemble(
            ("█" * full, style), ("░" * (BAR - full), "dim"), f" {percent(min(NEAREST, gauge.nearness)):>5}"
        )
        table.add_row(bar, Text(f"{gauge.kind} {gauge.adapter}".strip()), Text(gauge.seen))
    more = [f"and {len(heard) - shown} more"] if len(heard) > shown else []
    if silent := len(gauges) - len(heard):
        more.append(f"{counted(silent, 'detector')} without data yet")
    if more:
        table.add_row("", "", Text("; ".join(more), style="dim"))
    return table


def _alarms(alarms: Iterable[Alarm]) -> Iterator[RenderableType]:
    """The last alarm of each detector, the newest at the end, and how many alarms it gave."""
    by_detector: dict[tuple[str, str, str], list[Alarm]] = {}
    for alarm in sorted(alarms, key=lambda alarm: alarm.at):
        same = by_detector.pop((alarm.kind, alarm.name, alarm.adapter), [])
        by_detector[alarm.kind, alarm.name, alarm.adapter] = [*same, alarm]
    for same in list(by_detector.values())[-ALARMS_SHOWN:]:
        last = same[-1]
        who = f"{last.kind} {last.adapter}".strip()
        again = f" ({len(same)} times since {clock(same[0].at)})" if len(same) > 1 else ""
        text = Text.assemble((f"{clock(last.at)} ", "dim"), (f"{who} ", "red"), last.what, (again, "dim"))
        yield Padding(text, (0, 0, 0, 2))


# ---- lines ---------------------------------------------------------------------------------------


def lines(heard: Heard, watch: Watch) -> Iterator[str]:
    """A line for the window, and a line for each of its alarms."""
    span = heard.span
    seen = [f"{name}: {_words(watch.history.adapters[name][-1], watch)}" for name in sorted(span.adapters)]
    nearest = next(iter(watch.watching.gauges), None)
    near = (
        f"; nearest: {percent(min(NEAREST, nearest.nearness))} {nearest.kind} {nearest.adapter}".rstrip()
        if nearest
        else ""
    )
    yield f"{clock(span.began + span.seconds)} {'; '.join(seen) or 'no requests'}{near}"
    for alarm in heard.alarms:
        yield f"{clock(alarm.at)} ALARM {alarm.kind} {alarm.adapter}: {alarm.what}"


def _words(last: Figures, watch: Watch) -> str:
    words = [counted(last.asked, "request")]
    words += [f"{_name('latency', watch)} {_s(last.latency_s)}"] if last.latency_s is not None else []
    words += [f"{_name('ttft', watch)} TTFT {_s(last.ttft_s)}"] if last.ttft_s is not None else []
    words.append(format_value("tokens/s", last.tokens_per_s))
    words += [f"{n} {what}" for n, what in ((last.failed, "failed"), (last.refused, "refused")) if n]
    return ", ".join(words)


def records(heard: Heard, watch: Watch) -> Iterator[dict[str, Json]]:
    """The same as `lines`, for programs: times in seconds, moments in seconds since 1970."""
    span = heard.span
    seen = {name: asdict(watch.history.adapters[name][-1]) for name in sorted(span.adapters)}
    window: dict[str, Json] = {"kind": "window", "began": span.began, "seconds": span.seconds, "adapters": seen}
    yield {**window, "engine": asdict(span.engine), "outcome": watch.watching.outcome}
    for alarm in heard.alarms:
        values = asdict(alarm)
        yield {"kind": "alarm", "detector": values.pop("kind"), **values}


def lasting(seconds: float) -> str:
    """A length of time in words: "60 s", "30 days"."""
    for unit, name in ((86_400.0, "day"), (3600.0, "hour")):
        if seconds >= unit and seconds % unit == 0:
            return counted(round(seconds / unit), name)
    return f"{seconds:g} s"


def clock(at: float) -> str:
    """A moment in this machine's time zone."""
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
