"""Compares an adapter's measured cost with the cost of its arithmetic. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peftopt.diagnose.measuring.cells import Pair
from peftopt.diagnose.measuring.company import Names
from peftopt.diagnose.measuring.measured import Measured
from peftopt.diagnose.records import Row
from peftopt.diagnose.rows import expected
from peftopt.diagnose.rows.expected import Work
from peftopt.diagnose.rows.parts import Part

ADAPTER, PADDING = "the adapter", "rank padding"
"""Parts that are looked at."""


def rows(work: Work, names: Names, wanted: Sequence[Part], measured: Measured, swollen: bool = False) -> list[Row]:
    """A fault if the adapter's prefill does more than a LoRA's own work; else none. A whole batch is judged first: it
    computes the most compared with the overhead that a step of one row shows. `swollen`: see expected."""
    own = {part.batch: part.pair for part in wanted if part.pair.part == ADAPTER}
    if 1 not in own:
        return []
    for batch in sorted(own, reverse=True):
        times = _times(own[batch], own[1], measured)
        padding = _padding(names, wanted, measured, batch)
        judged = expected.judged(work, times, padding, names.padded_rank, swollen)
        if row := expected.row(work, names.adapter, batch, judged):
            return [row]
    return []


def _times(prompts: Pair, lone: Pair, measured: Measured) -> expected.Times:
    """Prefills of one pair beside steps of the other, in the blocks that have both."""
    prefills = [measured.values(cell, "prefill") for cell in (prompts.plain, prompts.costly)]
    steps = [measured.values(cell, "decode") for cell in (lone.plain, lone.costly)]
    sides = [*prefills, *steps]
    blocks = sorted(set.intersection(*(set(side) for side in sides)))
    return expected.Times(*([side[block] for block in blocks] for side in sides))


def _padding(names: Names, wanted: Sequence[Part], measured: Measured, batch: int) -> list[float]:
    """How much longer the padded adapter's prefills take, by block; [] where its zeros were there before."""
    pairs = [part.pair for part in wanted if (part.pair.part, part.batch) == (PADDING, batch)]
    if names.cut or not pairs:
        return []
    high, low = measured.paired(pairs[0], "prefill")
    return [with_it - without for with_it, without in zip(high, low, strict=True)]


def explained(row: Row, work: Work | None) -> Row:
    """The row with the part of its cost that the adapter's arithmetic explains, for a LoRA."""
    if work is None or row.part != ADAPTER or row.finding != "costs" or row.ratio is None:
        return row
    phase: expected.Phase = "prefill" if row.phase == "prefill" else "decode"
    return replace(row, sentence=f"{row.sentence}; {expected.explained(work, phase, row.ratio.estimate)}")
