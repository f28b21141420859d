"""A figure, a verdict or a text as plain words: what every report and the console write alike. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from peftopt.metrics import format_value
from peftopt.records import Interval, Verdict
from peftopt.stats import MOST_BLOCKS

MISSING = "—"
TOO_FEW = "too few requests"

Table = tuple[list[str], list[list[str]]]
"""A header and its rows, every cell a plain string: escaping is the renderer's."""


@dataclass(frozen=True)
class Section:
    """A part of a report beside the decision, such as a diagnosis. `links`: the page behind the first cell of each
    row, "" for none."""

    title: str
    about: str
    table: Table
    links: Sequence[str] = ()


def measured(cell: str) -> bool:
    """Whether a cell shows a value; that there were too few requests shows none."""
    return cell != MISSING and not cell.startswith(TOO_FEW)


def filled(cells: Table, says: Callable[[str], bool] = measured) -> Table:
    """The table without the columns that say nothing in every row; the first two stay."""
    header, body = cells
    kept = [n for n in range(len(header)) if n < 2 or any(says(row[n]) for row in body)]
    return [header[n] for n in kept], [[row[n] for n in kept] for row in body]


_ILLEGAL = re.compile("[^\t\n\r -~\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: object) -> str:
    """`text` without control characters, lone surrogates and bidirectional overrides: no report may hold them."""
    return _ILLEGAL.sub("\ufffd", str(text))


def clip(text: str, length: int) -> str:
    """The text, or as much of it as fits `length` characters with an ellipsis."""
    return text if len(text) <= length else text[: max(length - 1, 0)] + "…"


def figure(name: str, value: Interval | None) -> str:
    """ "41.2 ms (40.1–42.0)": an estimate and its interval, in the words its metric is read in."""
    if value is None or not math.isfinite(value.estimate):
        return MISSING
    if name.partition("@")[0] == "critical_errors":
        return critical(value)
    middle = format_value(name, value.estimate)
    tail = re.search(r"(?:latency|ttft|tpot)\.(p95|p99)", name)
    if tail and not bounded(value):
        return f"{TOO_FEW} for {tail[1].upper()}, or launches: {value.n}"
    unknown = math.isnan(value.low) or math.isnan(value.high)
    says_nothing = value.low == value.high or not (value.low > 0 or math.isfinite(value.high))
    if unknown or says_nothing:
        return middle
    low = format_value(name, value.low)
    high = format_value(name, value.high)
    return f"{middle} ({_range(middle, low, high)})"


def estimate(name: str, value: Interval | None) -> str:
    """ "41.2 ms": the estimate alone."""
    return MISSING if value is None or not math.isfinite(value.estimate) else format_value(name, value.estimate)


def speed(ratio: Interval | None, compact: bool = False) -> str:
    """ "0.81x (0.78–0.84), 19 % faster"; "SLOWER" is said as plainly."""
    shown = figure("latency.ratio", ratio)
    if ratio is None or shown == MISSING:
        return MISSING
    distance = abs(ratio.estimate - 1)
    digits = 1 if distance < 0.05 else 0
    change = f"{shown}, {100 * distance:.{digits}f} %"
    if ratio.low > 1:
        return shown.replace(" (", " SLOWER (", 1) if compact else f"{change} SLOWER"
    if compact:
        return shown
    return f"{change} faster" if ratio.high < 1 else f"{shown}, no difference shown"


def critical(value: Interval) -> str:
    """ "0 of 320, < 0.93 %": what was seen, and the upper bound that the sample size supports."""
    bound = f", < {value.high * 100:.2g} %" if math.isfinite(value.high) else ""
    return count(value) + bound


def count(value: Interval | None) -> str:
    """ "3 of 320": a share of n as the count that it is."""
    if value is None or not math.isfinite(value.estimate):
        return MISSING
    return f"{round(value.estimate * value.n)} of {value.n}"


def bounded(value: Interval) -> bool:
    """Whether both bounds are finite."""
    return math.isfinite(value.low) and math.isfinite(value.high)


def _range(middle: str, low: str, high: str) -> str:
    """ "0.78–0.84": the unit is said once, where all three share it."""
    parts = [re.fullmatch(r"(-?[\d.,]+|-?∞)(.*)", text) for text in (middle, low, high)]
    units = {part[2] for part in parts if part and "∞" not in part[1]}
    if all(parts) and len(units) == 1:
        unit = units.pop()
        low = low.removesuffix(unit)
        high = high.removesuffix(unit)
    return f"{low} to {high}" if low.startswith("-") else f"{low}–{high}"


def reason(verdict: Verdict) -> str:
    """The verdict's sentence, and for an inconclusive one what would settle it."""
    needed = verdict.blocks_needed
    if verdict.outcome != "inconclusive" or needed is None:
        return verdict.reason or MISSING
    have = verdict.value.n if verdict.value else 0
    more = max(needed - have, 1)
    minutes = verdict.minutes_needed
    took = f" (about {max(minutes, 1):.0f} min)" if minutes is not None and math.isfinite(minutes) else ""
    still = f"about {more} more blocks needed{took}" if needed < MOST_BLOCKS else "too close to the limit to tell"
    return f"{verdict.reason}; {still}" if verdict.reason else still


def metric_of(verdict: Verdict) -> str:
    """The name that says how to write the figure: of a requirement its metric, else the unit."""
    if verdict.rule.endswith(".critical_errors"):
        return "critical_errors"
    required = re.match(r"require: ([\w.]+)", verdict.rule)
    return required[1] if required and verdict.unit != "x" else verdict.unit


def flat(value: object) -> str:
    """A nested value on one line: "torch 2.6.0, peft 0.18.0"."""
    if isinstance(value, Mapping):
        texts = {key: flat(item) for key, item in value.items()}
        return ", ".join(f"{key} {text}" for key, text in texts.items() if text)
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(flat, value)))
    return "" if value is None else str(value)
