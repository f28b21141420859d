"""Virtual tokens: the cost of each for every request, by their number, and whether they are applied at all."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peftopt import stats
from peftopt.diagnose import judging
from peftopt.diagnose.bottlenecks import differs
from peftopt.diagnose.measuring import making
from peftopt.diagnose.measuring.cells import BASE, Cell, Launch, Pair, cells_of
from peftopt.diagnose.measuring.measured import Measured
from peftopt.diagnose.measuring.passing import Pass
from peftopt.diagnose.records import FREE, Bottleneck, Row
from peftopt.diagnose.rows import costs
from peftopt.diagnose.rows.advice import advice
from peftopt.diagnose.rows.costs import Phase
from peftopt.diagnose.rows.parts import Part, gained, lone, rows_of
from peftopt.diagnose.setting import Setting
from peftopt.errors import BadInput, PeftoptError
from peftopt.jobs import TransformJob
from peftopt.measurements import Caching
from peftopt.models.adapter import open_adapter
from peftopt.records import Interval, Model
from peftopt.report.words import bounded
from peftopt.runner import single

NAME: Bottleneck = "prompts"
LENGTHS = (8, 32, 128)
"""Virtual tokens of the soft prompts that are made where the user has none."""

TOGETHER = 4
"""Requests at once, where it is asked whether virtual tokens are batched."""

MADE = "soft-prompt-{tokens}"


async def rows(diagnosed: Pass) -> list[Row]:
    """Measure the costs of virtual tokens."""
    setting, own = diagnosed.setting, diagnosed.names.prompts
    if not (diagnosed.abilities.virtual or (own and not diagnosed.abilities.starts)):
        return [costs.not_asked(NAME, "virtual tokens", f"{setting.engine} serves none; {SERVED}")]
    try:
        made = making_of(diagnosed) if diagnosed.abilities.starts else {}
    except BadInput as error:
        return [costs.not_asked(NAME, "virtual tokens", error.message)]
    diagnosed.servers.folders.update({name: str(folder) for name, (folder, _) in made.items()})
    lengths = {name: tokens for name, (_, tokens) in made.items()} | lengths_of(setting, own)
    baked = await _baked(diagnosed, looked_at(lengths, own)[0])
    launch = Launch(adapters=tuple(filter(None, (*lengths, baked))))
    wanted = parts(setting, launch, lengths, own)
    ladder = {tokens: lone(setting, launch, name, 1) for name, tokens in lengths.items() if name in made}
    first = looked_at(lengths, own)[0]
    after = {
        part.pair.costly: _baked_cell(part.pair.costly, baked)
        for part in wanted
        if baked and part.pair.costly.load.names[0] == first
    }
    asked = [[*cells_of([part.pair]), *_known(after.get(part.pair.costly))] for part in wanted]
    asked.append(list(ladder.values()))
    await diagnosed.servers.up([launch])
    silent = await differs.unchanged(diagnosed, NAME, launch, [*own, *made])
    measured = await diagnosed.measure(NAME, asked)
    told = [
        with_slope(gained(row, _gain(measured, part, after, phase), "baked"), ladder, measured)
        for part in wanted
        for phase, row in rows_of(NAME, setting, part, measured).items()
    ]
    note_bytes(diagnosed, await diagnosed.caching())
    return [*silent, *told, *cache(setting, own, lengths)]


SERVED = "the engine eager does, and any engine once they are baked (peftopt bake)"
"""Who serves virtual tokens."""


def making_of(diagnosed: Pass) -> dict[str, tuple[Path, int]]:
    """Soft prompts of LENGTHS for this base: their folders and lengths by name. Raises BadInput for a base whose config
    does not give their width."""
    base = Path(diagnosed.setting.base)
    made = {}
    for tokens in LENGTHS:
        name = MADE.format(tokens=tokens)
        into = diagnosed.made / name
        made[name] = (into if into.exists() else making.soft_prompt(base, tokens, into), tokens)
    return made


async def _baked(diagnosed: Pass, name: str) -> str:
    """What the adapter is served as once its virtual tokens are baked, to measure what that gains; "" where it is not
    baked here."""
    setting, folder = diagnosed.setting, diagnosed.servers.folders[name]
    if not diagnosed.abilities.starts:
        return ""
    out, served = diagnosed.made / f"{name}-baked", f"{name}-baked"
    model = Model(setting.base, (folder,))
    job = TransformJob(plugin="bake", params={"certify": "own"}, model=model, out=str(out))
    try:
        diagnosed.tell(f"baking {name}, to measure what that gains")
        await asyncio.to_thread(single.transform, job)
    except PeftoptError as error:
        diagnosed.notes.append(f"what baking {name} gains is not measured: {error.message}")
        return ""
    diagnosed.servers.folders[served] = str(out)
    return served


def _baked_cell(live: Cell, baked: str) -> Cell:
    """The same requests, to the baked prompt."""
    return replace(live, load=replace(live.load, names=(baked,) * len(live.load.names)))


def _known(cell: Cell | None) -> list[Cell]:
    return [cell] if cell else []


def _gain(measured: Measured, part: Part, after: Mapping[Cell, Cell], phase: Phase) -> Interval | None:
    """The time baked over the time live, on one server; None where it was not measured, or of another adapter."""
    baked = after.get(part.pair.costly)
    return costs.gain(measured, part.pair.costly, baked, phase) if baked else None


def looked_at(lengths: Mapping[str, int], own: Sequence[str]) -> list[str]:
    """The user's adapters; without one, the longest soft prompt that was made."""
    return list(own) or [max(lengths, key=lambda name: lengths[name])]


def lengths_of(setting: Setting, names: Sequence[str]) -> dict[str, int]:
    """The number of virtual tokens of each of the user's adapters."""
    configs = {name: open_adapter(Path(setting.adapters[name])).config for name in names}
    return {name: int(config.get("num_virtual_tokens") or 0) for name, config in configs.items()}


def parts(setting: Setting, launch: Launch, lengths: Mapping[str, int], own: Sequence[str]) -> list[Part]:
    """Each of the user's adapters against the base; without one, the longest soft prompt that was made."""
    found = []
    for name in looked_at(lengths, own):
        words = {"base": setting.base, "adapter": setting.adapters.get(name, "your prompt-tuning adapter")}
        subject = f"{name} with {lengths[name]} virtual tokens against none"
        pair = Pair("virtual tokens", costly=lone(setting, launch, name, 1), plain=lone(setting, launch, BASE, 1))
        found.append(Part(pair, 1, ("prefill", "decode"), subject, words))
    name = looked_at(lengths, own)[0]
    several = Pair(
        "virtual tokens",
        costly=lone(setting, launch, name, TOGETHER),
        plain=lone(setting, launch, BASE, TOGETHER),
    )
    subject = f"{TOGETHER} requests with {lengths[name]} virtual tokens each, against none"
    words = {"base": setting.base, "adapter": setting.adapters.get(name, "your prompt-tuning adapter")}
    found.append(Part(several, TOGETHER, ("whole request",), subject, words))
    return found


# ---- the slope -----------------------------------------------------------------------------------


def with_slope(row: Row, ladder: Mapping[int, Cell], measured: Measured) -> Row:
    """The row with the cost of one more virtual token."""
    phase: Phase | None = "prefill" if row.phase == "prefill" else "decode" if row.phase == "decode" else None
    if phase is None or row.finding == "fault":
        return row
    each = slope(ladder, measured, phase)
    if each is None:
        return row
    bounds = f" ({each.low:.3g} to {each.high:.3g})" if bounded(each) else ""
    lengths = ", ".join(map(str, ladder))
    return replace(row, sentence=f"{row.sentence}; {each.estimate:.3g} ms{bounds} per virtual token over {lengths}")


def slope(ladder: Mapping[int, Cell], measured: Measured, phase: Phase) -> Interval | None:
    """Milliseconds per virtual token: the least-squares slope of each block over the lengths, and its centre."""
    times = {tokens: measured.values(cell, phase) for tokens, cell in ladder.items()}
    if len(times) < 2:
        return None
    blocks = sorted(set.intersection(*(set(each) for each in times.values())))
    slopes = [fitted({tokens: each[block] for tokens, each in times.items()}) for block in blocks]
    return stats.hodges_lehmann(slopes, judging.LEVEL) if slopes else None


def fitted(values: Mapping[int, float]) -> float:
    """The slope of the straight line through points, by least squares."""
    x = sum(values) / len(values)
    y = sum(values.values()) / len(values)
    spread = sum((each - x) ** 2 for each in values)
    return sum((each - x) * (value - y) for each, value in values.items()) / spread


# ---- the cache -----------------------------------------------------------------------------------


def note_bytes(diagnosed: Pass, seen: Caching | None) -> None:
    """Add a note if the cache does not have the size in the config."""
    if seen is None:
        return
    said = making.shape_of(Path(diagnosed.setting.base)).kv_bytes
    if seen.kv_bytes != said:
        diagnosed.notes.append(f"the cache holds {seen.kv_bytes:,} bytes a token, and the config says {said:,}")


def cache(setting: Setting, own: Sequence[str], lengths: Mapping[str, int]) -> list[Row]:
    """The cache of the user's virtual tokens in every request: exact, from the base's config."""
    try:
        each = making.shape_of(Path(setting.base)).kv_bytes
    except BadInput:
        return []
    request = setting.prompt_tokens + setting.new_tokens
    found = []
    for name in own:
        taken = lengths[name] * each
        ratio = (lengths[name] + request) / request
        exact = Interval(float(taken), float(taken), float(taken), 1, 1.0)
        found.append(
            Row(
                bottleneck=NAME,
                part="KV cache",
                phase="memory",
                batch=1,
                finding="costs" if ratio > FREE else "no cost",
                sentence=f"{name}: {lengths[name]} virtual tokens take {taken:,} bytes of each request's cache "
                f"({each:,} a token), beside {request * each:,} of its own {request} tokens",
                advice=advice("KV cache", setting.engine) if ratio > FREE else "",
                ratio=Interval(ratio, ratio, ratio, 1, 1.0),
                extra=exact,
                unit="bytes",
            )
        )
    return found
