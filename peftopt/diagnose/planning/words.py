"""An evaluated plan, for people and programs: a table, sentences, JSON. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peftopt.diagnose.planning import options as ways
from peftopt.diagnose.planning.breakeven import Breakeven
from peftopt.diagnose.planning.plan import Evaluated, Judged
from peftopt.loadtest.summary import ATTAINED
from peftopt.metrics import counted, format_value, percent
from peftopt.records import Interval, Json

HEADER = ("option", "goodput/s", "hottest", "coldest", "adapters held", "P50 ms", "memory", "reload", "chosen")

RULE = (
    "the highest goodput wins; of options within 3 % of it, the one that takes the least memory; of those alike in "
    "memory, the fastest"
)

HOW_TO_READ = (
    "goodput/s: requests a second that meet every service level, with the range of 95 % of the draws. A draw has "
    "measured times drawn anew, and other arrivals, the same for all options.",
    "hottest, coldest: the share of requests that meet them, of the most popular adapter and of the less popular half.",
    "adapters held: the share of adapters of which 95 % of requests meet them.",
    "reload: from a new version of an adapter to its first answer.",
    "chosen: the share of draws in which the rule takes it.",
    "It is simulated from times of single batches on this machine; docs/planning.md says what that leaves out.",
)


def rows(evaluated: Evaluated) -> list[list[str]]:
    """A row for each option, in the columns of HEADER."""
    return [_row(each) for each in evaluated.options]


def _row(each: Judged) -> list[str]:
    memory, reload_s = format_value("bytes", each.memory_bytes), format_value("s", each.reload_s)
    if not each.fits:
        return [each.option.name, each.why, "", "", "", "", memory, reload_s, ""]
    return [
        each.option.name,
        _figures(each.goodput, "{:.3g}"),
        _share(each.hottest),
        _share(each.coldest),
        percent(each.within or 0.0),
        _figures(each.latency_ms, "{:.0f}"),
        memory,
        reload_s,
        percent(each.chosen),
    ]


def _figures(value: Interval | None, form: str) -> str:
    if value is None:
        return ""
    return f"{form.format(value.estimate)} ({form.format(value.low)}–{form.format(value.high)})"


def _share(value: Interval | None) -> str:
    return percent(value.estimate) if value else "not asked"


def sentences(evaluated: Evaluated, breakevens: Sequence[Breakeven]) -> dict[str, str]:
    """Sentences beside the table, by title: the first steps."""
    best = evaluated.best
    said = {"recommended": _recommended(evaluated)}
    if best and not evaluated.sure:
        others = ", ".join(f"{each.option.name} ({percent(each.chosen)})" for each in evaluated.rivals)
        said["undecided"] = f"{best.option.name} ({percent(best.chosen)} of draws), others take {others or 'none'}"
    if best and best.reloading >= 1:
        said["reloads"] = "one reload is not over before the next is due: reload less often, or keep apart"
    space, adapters = evaluated.space, evaluated.traffic.adapters
    beside = max(0, space.copies_beside(adapters))
    said["memory"] = (
        f"{counted(space.copies, 'merged engine')} of {format_value('bytes', space.merged_bytes)} would fit in "
        f"{format_value('bytes', space.memory_bytes)}"
        + (f" on each of {space.devices} devices" if space.devices > 1 else "")
        + (f", or {beside} beside an engine with the others" if adapters > 1 else "")
    )
    for each in breakevens:
        said[f"break-even, {_AXES[each.axis]}"] = turning(each)
    said["rule"] = RULE
    return said


_AXES = {"adapters": "adapters", "zipf": "skew", "reloads": "reloads"}


def _recommended(evaluated: Evaluated) -> str:
    best, traffic = evaluated.best, evaluated.traffic
    if best is None:
        if not any(each.fits for each in evaluated.options):
            return "nothing: no engine fits in the memory"
        return "nothing: no option meets the service levels for any request; raise them, or take a faster machine"
    what = ways.described(best.option, traffic)
    if not evaluated.sure:
        what = f"undecided between kinds; first of them: {what}"
    goodput = best.goodput.estimate if best.goodput else 0.0
    if goodput < ATTAINED * traffic.rps:
        short = f"only {goodput:.3g} of {traffic.rps:.3g} requests/s would meet the service levels"
        return f"{what}. But no option holds the plan: {short}"
    return what


def turning(each: Breakeven) -> str:
    """A break-even as a sentence."""
    if each.value is None:
        return f"not computed: {each.why}"
    value, most = each.value, each.most
    match each.axis:
        case "adapters":
            if value.high == 0:
                return "one adapter alone is better kept apart"
            return f"to merge all is chosen up to {_upto(value, most, 'adapters')}"
        case "zipf":
            if value.low == math.inf:
                return f"to merge the hottest is not chosen at any exponent up to {most:g}"
            if value.high == 0:
                return "to merge the hottest is chosen however even traffic is"
            return f"to merge the hottest is chosen from an exponent of {_number(value)} on"
        case _:
            if value.high == 0:
                return "to merge is not chosen even without reloads"
            return f"to merge is chosen up to {_upto(value, most, 'new versions of each adapter a day')}"


def _upto(value: Interval, most: float, unit: str) -> str:
    if value.low == math.inf:
        return f"{most:,.0f} {unit}, the most that were looked at"
    return f"{_number(value)} {unit}"


def _number(value: Interval) -> str:
    middle = f"{value.estimate:,.3g}" if math.isfinite(value.estimate) else "more than were looked at"
    if value.low == value.high:
        return middle
    high = f"{value.high:,.3g}" if math.isfinite(value.high) else "∞"
    return f"{middle} ({value.low:,.3g}–{high})"


# ---- for programs ------------------------------------------------------------------------------


def as_json(evaluated: Evaluated, breakevens: Sequence[Breakeven], speeds: dict[str, Json]) -> dict[str, Json]:
    """All of it. An infinite bound is null."""
    return {
        "traffic": evaluated.traffic.as_json(),
        "recommended": _named(evaluated.best),
        "what_to_do": _recommended(evaluated),
        "sure": evaluated.sure,
        "rivals": [_named(each) for each in evaluated.rivals],
        "merged_engines_that_fit": evaluated.space.copies,
        "merged_engines_that_fit_beside_the_rest": max(0, evaluated.space.copies_beside(evaluated.traffic.adapters)),
        "options": [_option(each) for each in evaluated.options],
        "break_even": {
            each.axis: {
                "value": _interval(each.value),
                "looked_at_up_to": each.most if math.isfinite(each.most) else None,
                "says": turning(each),
            }
            for each in breakevens
        },
        "table": {"header": list(HEADER), "rows": rows(evaluated)},
        "requests_simulated": evaluated.requests,
        "draws": evaluated.draws,
        "speeds": speeds,
    }


def _named(each: Judged | None) -> dict[str, Json] | None:
    if each is None:
        return None
    return {"family": each.option.family, "merged": each.option.merged, "engines_apart": each.option.engines}


def _option(each: Judged) -> dict[str, Json]:
    return {
        "name": each.option.name,
        **(_named(each) or {}),
        "fits": each.fits,
        "why": each.why,
        "memory_bytes": each.memory_bytes,
        "goodput_rate": _interval(each.goodput),
        "latency_p50_ms": _interval(each.latency_ms),
        "ttft_p50_ms": _interval(each.ttft_ms),
        "hottest_share": _interval(each.hottest),
        "coldest_share": _interval(each.coldest),
        "adapters_within_share": each.within,
        "reload_s": each.reload_s,
        "reloading_share": each.reloading,
        "chosen_share": each.chosen,
    }


def _interval(value: Interval | None) -> dict[str, Json] | None:
    if value is None:
        return None
    bounds = {"estimate": value.estimate, "low": value.low, "high": value.high}
    return {**{name: bound if math.isfinite(bound) else None for name, bound in bounds.items()}, "n": value.n}
