"""Requests computed alone: the gain of computing them together, and its limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from peftopt import stats
from peftopt.diagnose import judging
from peftopt.diagnose.bottlenecks import choice
from peftopt.diagnose.measuring.cells import BASE, BATCH, Cell, Launch, Load, Pair
from peftopt.diagnose.measuring.measured import Measured
from peftopt.diagnose.measuring.passing import Pass
from peftopt.diagnose.records import Bottleneck, Row
from peftopt.diagnose.rows import costs
from peftopt.diagnose.rows.advice import advice
from peftopt.diagnose.rows.parts import Part, all_rows, alone, groups, lone
from peftopt.diagnose.setting import Setting
from peftopt.loadtest.summary import ATTAINED
from peftopt.measurements import Caching
from peftopt.metrics import counted, percent

NAME: Bottleneck = "batching"
BATCHES = (1, 2, 4, BATCH)
SAVED = 0.8
"""The time of a batch, as a share of its requests one after the other: an engine that needs more does not batch."""

JOINED = 0.9
"""The same of requests of different lengths that join and leave, as a share of batches in lockstep."""

SHARED_TOKENS = 128
"""Of a system prompt that all requests have in common."""

WAVES = 2
SHORT, LONG = 2, 8
"""Tokens of answers, where lengths differ."""


async def rows(diagnosed: Pass) -> list[Row]:
    """Measure the gain of batching."""
    setting, names = diagnosed.setting, diagnosed.names
    by_name = names.adapter and diagnosed.abilities.apart
    asked, launch = (names.adapter, alone(setting, names)) if by_name else (BASE, Launch())
    ladder = [lone(setting, launch, asked, batch) for batch in BATCHES]
    joining, waves = uneven(setting, launch, asked)
    wanted = parts(setting, launch, asked)
    cells = [[ladder[0], ladder[-1]], *groups(wanted), [joining, waves], ladder]
    measured = await diagnosed.measure(NAME, cells)
    return [
        *together(setting, ladder, measured),
        *continuous(setting, joining, waves, measured),
        *all_rows(NAME, setting, wanted, measured),
        *kept(setting, await diagnosed.caching()),
    ]


def parts(setting: Setting, launch: Launch, asked: str) -> list[Part]:
    """A system prompt that all requests share, against none."""
    plain = lone(setting, launch, asked, 1)
    shared = replace(plain, load=replace(plain.load, shared_tokens=SHARED_TOKENS))
    if setting.prompts:
        return []
    subject = f"A shared system prompt of about {SHARED_TOKENS} tokens, asked again and again"
    return [Part(Pair("shared prompt", costly=shared, plain=plain), 1, ("prefill",), subject)]


def uneven(setting: Setting, launch: Launch, asked: str) -> tuple[Cell, Cell]:
    """Requests of short and long answers, with continuous batching and in lockstep."""
    load = Load((asked,) * (WAVES * BATCH), setting.prompt_tokens, (SHORT, LONG), order="joining")
    return Cell(launch, load), Cell(launch, replace(load, order="waves"))


# ---- together ------------------------------------------------------------------------------------


def together(setting: Setting, ladder: Sequence[Cell], measured: Measured) -> list[Row]:
    """Whether BATCH requests together take less than one after the other, with the knee and the level's limit."""
    times = {len(cell.load.names): measured.values(cell, "whole request") for cell in ladder}
    most = max(times)
    blocks = sorted(times[1].keys() & times[most].keys())
    row = Row(
        bottleneck=NAME,
        part="batching",
        phase="whole request",
        batch=most,
        finding="undecided",
        sentence=f"What {most} requests together take is open",
        advice=costs.more(NAME),
    )
    if not blocks:
        return [row]
    logs = [math.log(times[most][block] / (most * times[1][block])) for block in blocks]
    judged = judging.judged(logs, most=SAVED)
    return [
        replace(
            row,
            finding=judged.finding,
            sentence=_together(setting, ladder, measured, judged),
            advice=_advice(judged, setting, "batching", rows=most),
            ratio=judged.ratio,
            blocks=judged.blocks,
            why=judged.why,
        )
    ]


def _together(setting: Setting, ladder: Sequence[Cell], measured: Measured, judged: judging.Judged) -> str:
    rates = throughput(ladder, measured)
    shown = ", ".join(f"{batch}: {rate:.0f}" for batch, rate in rates.items())
    least, saved = min(rates), f"{judged.ratio.estimate:.2f}x the time of one after the other"
    text = f"{max(rates)} requests together take {saved}; tokens/s by batch: {shown}; {knee_text(rates)}"
    levels, derived = choice.promised(setting, measured, ladder[0])
    if not levels or least != 1:
        return text
    allowed = allowed_batch(setting, ladder, measured)
    named = " and ".join(level.text for level in levels)
    return f"{text}; {named}{derived} allows {f'a batch of {allowed}' if allowed else 'none of them'}"


def throughput(ladder: Sequence[Cell], measured: Measured) -> dict[int, float]:
    """Tokens a second by batch, the median of blocks."""
    found = {}
    for cell in ladder:
        turns = [turn for turn in measured.turns(cell).values() if not turn.failed]
        if turns:
            found[len(cell.load.names)] = stats.median([1e3 * turn.new_tokens / turn.whole_ms for turn in turns])
    return found


def knee(rates: Mapping[int, float]) -> int | None:
    """The first batch size at which a further request adds less than half of the throughput of a single one; None if
    each adds more up to the largest. `rates`: throughput by batch."""
    sizes = sorted(rates)
    share = rates[sizes[0]] / sizes[0]
    for before, after in pairwise(sizes):
        if (rates[after] - rates[before]) / (after - before) < share / 2:
            return before
    return None


def knee_text(rates: Mapping[int, float]) -> str:
    """The knee as a sentence."""
    at = knee(rates)
    most = max(rates)
    if at is None:
        return f"no knee up to {most}"
    return f"the knee is at {at}: a request more adds less than half of what one alone gives"


def allowed_batch(setting: Setting, ladder: Sequence[Cell], measured: Measured) -> int:
    """The largest batch whose requests meet the service levels, 0 for none."""
    levels, _ = choice.promised(setting, measured, ladder[0])
    allowed = 0
    for cell in ladder:
        turns = [turn for turn in measured.turns(cell).values() if len(turn.ttft_ms) == len(turn.names)]
        requests = [request for turn in turns for request in choice.requests_of(turn)]
        met = sum(all(level.met(request) for level in levels) for request in requests)
        if requests and met >= ATTAINED * len(requests):
            allowed = len(cell.load.names)
    return allowed


# ---- static against continuous -------------------------------------------------------------------


def continuous(setting: Setting, joining: Cell, waves: Cell, measured: Measured) -> list[Row]:
    """Whether requests of different lengths gain by continuous batching: in an engine of static batches they do not."""
    row = Row(
        bottleneck=NAME,
        part="static batches",
        phase="whole request",
        batch=BATCH,
        finding="undecided",
        sentence="Whether rows join and leave is open",
        advice=costs.more(NAME),
    )
    times = measured.paired(Pair("static batches", costly=joining, plain=waves), "whole request")
    logs = judging.logs_of(*times)
    if not logs:
        return [row]
    judged = judging.judged(logs, most=JOINED)
    requests = counted(len(joining.load.names), "request")
    sentence = (
        f"{requests} with answers of {SHORT} and {LONG} tokens take "
        f"{judged.ratio.estimate:.2f}x the time when each new one joins as soon as one is done, instead of {BATCH} in "
        f"lockstep ({percent(1 - expected(joining))} less were to be had)"
    )
    advised = _advice(judged, setting, "static batches")
    return [
        replace(
            row,
            finding=judged.finding,
            sentence=sentence,
            advice=advised,
            ratio=judged.ratio,
            blocks=judged.blocks,
            why=judged.why,
        )
    ]


def expected(joining: Cell) -> float:
    """The steps of full batches for so many tokens, as a share of those of lockstep."""
    answers = joining.load.answers
    waves = [answers[start : start + BATCH] for start in range(0, len(answers), BATCH)]
    return sum(answers) / BATCH / sum(max(wave) for wave in waves)


# ---- the KV cache --------------------------------------------------------------------------------


def kept(setting: Setting, caching: Caching | None) -> list[Row]:
    """Whether the KV cache saves time at a usual request's length; other engines than peftopt's do not show that."""
    if caching is None:
        return [costs.not_asked(NAME, "no KV cache", f"{setting.engine} has no switch for it")]
    judged = judging.judged(judging.logs_of(caching.kept_ms, caching.anew_ms), most=SAVED)
    tokens = setting.prompt_tokens + setting.new_tokens
    row = costs.not_asked(NAME, "no KV cache", "")
    sentence = (
        f"With its KV cache a token after {tokens} others takes {judged.ratio.estimate:.2f}x the time of computing all "
        f"anew; the cache holds {caching.kv_bytes:,} bytes a token"
    )
    return [
        replace(
            row,
            phase="decode",
            finding=judged.finding,
            sentence=sentence,
            advice=_advice(judged, setting, "no KV cache"),
            ratio=judged.ratio,
            blocks=judged.blocks,
            why=judged.why,
        )
    ]


def _advice(judged: judging.Judged, setting: Setting, part: str, **words: object) -> str:
    if judged.finding == "costs":
        return advice(part, setting.engine, **words)
    return costs.more(NAME) if judged.finding == "undecided" else ""
