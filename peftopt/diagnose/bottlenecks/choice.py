"""Adapters chosen per request: the cost of their number and of skewed traffic, and the longest waits."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from peftopt import stats
from peftopt.diagnose import judging
from peftopt.diagnose.measuring.asking import Turn
from peftopt.diagnose.measuring.cells import BATCH, Cell, Launch, Load, Pair, evenly, skewed
from peftopt.diagnose.measuring.company import Names
from peftopt.diagnose.measuring.measured import Measured
from peftopt.diagnose.measuring.passing import Pass
from peftopt.diagnose.records import Bottleneck, Row
from peftopt.diagnose.rows import costs
from peftopt.diagnose.rows.advice import advice
from peftopt.diagnose.rows.parts import Part, all_rows, asking, groups, lone, together
from peftopt.diagnose.setting import Setting, abilities
from peftopt.loadtest import summary
from peftopt.loadtest.summary import ATTAINED, CLIFF, Request, Slo
from peftopt.metrics import counted, percent

NAME: Bottleneck = "choice"
PATIENCE = 5.0
"""How many times a lone request's time to the first token users wait at most, where no level is given."""


async def rows(diagnosed: Pass) -> list[Row]:
    """Measure the costs of the choice."""
    setting, names = diagnosed.setting, diagnosed.names
    if not (diagnosed.abilities.apart and names.adapter):
        return [costs.not_asked(NAME, "live adapters", "there is no engine's batch of several adapters to ask")]
    launch = together(setting, names) if diagnosed.abilities.starts else Launch(adapters=names.all)
    wanted = parts(setting, names, launch)
    alone = lone(setting, launch, names.adapter, 1)
    even = live(setting, names, launch, len(names.live))
    ladder = [live(setting, names, launch, count) for count in counts(len(names.live))]
    measured = await diagnosed.measure(NAME, [[alone, even], ladder, *groups(wanted)])
    levels, derived = promised(setting, measured, alone)
    return [
        *all_rows(NAME, setting, wanted, measured),
        *cliff(setting, ladder, measured),
        *within(setting, even, measured, levels, derived),
    ]


def counts(live: int) -> list[int]:
    """Numbers of live adapters to ask: each twice the one before, and all."""
    doubled = [2**power for power in range(live.bit_length())]
    return list(dict.fromkeys([*doubled, live]))


def live(setting: Setting, names: Names, launch: Launch, count: int) -> Cell:
    """A batch that asks the first so many adapters in turn."""
    return settled(asking(setting, launch, evenly(names.live[:count], BATCH)))


def settled(cell: Cell) -> Cell:
    """The cell without the cost of adapters that the cell before has displaced: that would hide where a cliff is."""
    return replace(cell, load=replace(cell.load, settled=True))


def parts(setting: Setting, names: Names, launch: Launch) -> list[Part]:
    """More live adapters against one; even against skewed traffic; a fresh adapter against a warm one."""
    one = live(setting, names, launch, 1)
    words = {"live": len(names.live)}
    found = [
        Part(
            Pair("live adapters", costly=live(setting, names, launch, count), plain=one),
            BATCH,
            ("whole request",),
            f"{BATCH} requests over {count} adapters instead of one",
            words,
        )
        for count in reversed(counts(len(names.live))[1:])
    ]
    if len(names.live) > 2:
        even = live(setting, names, launch, len(names.live))
        zipf = settled(asking(setting, launch, skewed(names.live, BATCH)))
        subject = f"{BATCH} requests over {len(names.live)} adapters evenly, instead of by Zipf's law"
        found.append(Part(Pair("skew", costly=even, plain=zipf), BATCH, ("whole request",), subject, words))
    can = abilities(setting.engine)
    if can.starts and can.loads:
        load = Load((names.adapter,), setting.prompt_tokens, (1,))
        pair = Pair("first request", costly=Cell(launch, replace(load, fresh=True)), plain=Cell(launch, load))
        found.append(Part(pair, 1, ("prefill",), "The first request after a load instead of a later one"))
    return found


# ---- the cliff -----------------------------------------------------------------------------------


def cliff(setting: Setting, ladder: Sequence[Cell], measured: Measured) -> list[Row]:
    """Whether from some number of adapters on a batch takes much longer than its growth so far predicts.

    `ladder`: a batch over 1, 2, 4, … adapters. Growth in proportion to their number is not a cliff. A step is a cliff
    if its ratio is CLIFF times that of the step before, which a straight line never reaches (9/8 at most); for the
    first step, if it is CLIFF times the number of adapters.
    """
    steps = [Pair("the cliff", costly=after, plain=before) for before, after in pairwise(ladder)]
    found = [_excess(number, steps, measured) for number in range(len(steps))]
    sizes = [len(set(cell.load.names)) for cell in ladder]
    if not found or not all(logs for logs in found):
        return []
    judged = [judging.judged(logs, most=CLIFF) for logs in found]
    row = Row(bottleneck=NAME, part="the cliff", phase="whole request", batch=BATCH, finding="no cost", sentence="")
    for step, each in enumerate(judged):
        if each.finding == "costs":
            costly, plain = measured.paired(steps[step], "whole request")
            extra = judging.difference(costly, plain)
            return [
                replace(
                    row,
                    finding="costs",
                    sentence=f"From {sizes[step]} to {counted(sizes[step + 1], 'adapter')} a batch takes "
                    f"{each.ratio.estimate:.1f} times as much more as growth before says: the engine has no room for "
                    "more adapters at once",
                    advice=advice("the cliff", setting.engine, live=sizes[-1], cliff=sizes[step]),
                    ratio=judging.ratio(costly, plain),
                    extra=extra,
                    share=costs.share(measured, ladder[step + 1], "whole request", extra.estimate, setting.new_tokens),
                    blocks=each.blocks,
                )
            ]
    blocks = min(each.blocks for each in judged)
    if all(each.finding == "no cost" for each in judged):
        return [replace(row, sentence=f"No cliff up to {counted(sizes[-1], 'adapter')}", blocks=blocks)]
    sentence = f"Whether there is a cliff up to {counted(sizes[-1], 'adapter')} is open"
    return [replace(row, finding="undecided", sentence=sentence, advice=costs.more(NAME), blocks=blocks)]


def _excess(number: int, steps: Sequence[Pair], measured: Measured) -> list[float]:
    """Log of a step's ratio over what growth before says, in the blocks that have all of it."""
    cells = [steps[number].plain, steps[number].costly, *([steps[number - 1].plain] if number else [])]
    times = [measured.values(cell, "whole request") for cell in cells]
    blocks = sorted(set.intersection(*(set(each) for each in times)))
    step = [math.log(times[1][block] / times[0][block]) for block in blocks]
    if not number:
        sizes = [len(set(cell.load.names)) for cell in cells]
        return [log - math.log(sizes[1] / sizes[0]) for log in step]
    before = [max(0.0, math.log(times[0][block] / times[2][block])) for block in blocks]
    return [log - earlier for log, earlier in zip(step, before, strict=True)]


# ---- service levels ------------------------------------------------------------------------------


def promised(setting: Setting, measured: Measured, alone: Cell) -> tuple[list[Slo], str]:
    """The service levels, and how they were chosen."""
    if setting.slo:
        return [summary.slo(text) for text in setting.slo], ""
    times = list(measured.values(alone, "prefill").values())
    if not times:
        return [], ""
    limit = PATIENCE * stats.median(times)
    return [summary.slo(f"ttft <= {limit:.0f} ms")], f", {PATIENCE:g} times a lone request's (--slo sets another)"


def within(setting: Setting, even: Cell, measured: Measured, levels: Sequence[Slo], derived: str) -> list[Row]:
    """The share of requests and of adapters within their service levels, and the longest wait."""
    turns = [turn for turn in measured.turns(even).values() if len(turn.ttft_ms) == len(turn.names)]
    if not turns or not levels:
        return []
    by_name: dict[str, list[bool]] = defaultdict(list)
    by_block = []
    for turn in turns:
        met = [all(level.met(request) for level in levels) for request in requests_of(turn)]
        by_block.append((sum(met), len(met)))
        for name, holds in zip(turn.names, met, strict=True):
            by_name[name].append(holds)
    share = stats.share_of_groups(by_block)
    served = sum(sum(holds) >= ATTAINED * len(holds) for holds in by_name.values())
    longest = max(wait for turn in turns for wait in turn.ttft_ms)
    text = " and ".join(level.text for level in levels)
    sentence = (
        f"{served} of {counted(len(by_name), 'adapter')} have {percent(ATTAINED)} of their requests within {text}"
        f"{derived}, of all requests {percent(share.estimate)}; the longest wait for a first token is {longest:,.0f} ms"
    )
    row = Row(
        bottleneck=NAME,
        part="service level",
        phase="prefill",
        batch=BATCH,
        finding="undecided",
        sentence=sentence,
        advice=costs.more(NAME),
        extra=share,
        unit="of requests within it",
        blocks=len(turns),
    )
    if share.low >= ATTAINED:
        return [replace(row, finding="no cost", advice="")]
    if share.high < ATTAINED:
        return [replace(row, finding="costs", advice=advice("service level", setting.engine))]
    return [row]


def requests_of(turn: Turn) -> list[Request]:
    """The requests of a turn, as a load test has them, all due at once. A server may send an answer in one piece."""
    gaps = turn.tpot_ms if len(turn.tpot_ms) == len(turn.names) else (0.0,) * len(turn.names)
    whole = zip(turn.names, turn.ttft_ms, gaps, turn.longest_gap_ms, turn.latency_ms, strict=True)
    tokens = turn.new_tokens // len(turn.names)
    return [
        Request(
            id=str(number),
            model=name,
            scheduled=0.0,
            sent=0.0,
            done=latency / 1e3,
            first=ttft / 1e3,
            last=(ttft + tpot * (tokens - 1)) / 1e3,
            gaps_ms=(gap,),
            new_tokens=tokens,
        )
        for number, (name, ttft, tpot, gap, latency) in enumerate(whole)
    ]
