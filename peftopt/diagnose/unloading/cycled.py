"""The rows of the bottleneck "unloading", from load-use-unload cycles of a server. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from peftopt import stats
from peftopt.diagnose.records import Row
from peftopt.diagnose.unloading import leaks
from peftopt.diagnose.unloading.leaks import LEVEL, TOLERATED, Kept
from peftopt.metrics import counted, format_value
from peftopt.records import Interval

PARTS = {"host": "memory at rest", "gpu": "GPU memory at rest"}
MEMORY = {"host": "the host's memory", "gpu": "the GPU's memory"}


@dataclass(frozen=True)
class Step:
    """One step of a cycle: "load", "request", "request that is left", "unload", "unload under way", "request under
    way". `error` is "" if it worked; `late`: it had no answer within its limit."""

    what: str
    seconds: float
    error: str = ""
    late: bool = False


@dataclass
class Cycled:
    """The results of cycles. `host` and `gpu`: bytes at rest, before the first cycle and after each; [] if not known.
    `stopped`: why they ended early, "" = they did not; `others_answer`: whether other names still answered after a step
    without an answer, None if that was not asked."""

    cycles: int = 0
    host: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    stopped: str = ""
    others_answer: bool | None = None

    @property
    def late(self) -> Step | None:
        """The step that had no answer within its limit."""
        return next((step for step in self.steps if step.late), None)

    @property
    def series(self) -> dict[str, list[float]]:
        """The memories that are known."""
        return {name: levels for name, levels in (("host", self.host), ("gpu", self.gpu)) if levels}


def decided(cycled: Cycled) -> bool:
    """Whether every known memory is decided, so that more cycles are useless. Without any known memory it is never
    decided."""
    series = cycled.series.values()
    return bool(series) and all(leaks.decided(levels) for levels in series)


def leaky(cycled: Cycled) -> bool:
    """Whether a memory leaks."""
    return any(leaks.judge(levels).outcome == "leaks" for levels in cycled.series.values())


def grows(cycled: Cycled) -> bool:
    """Whether a few cycles are enough to show the growth of a memory that is known to leak."""
    rises = [[after - before for before, after in pairwise(levels)] for levels in cycled.series.values()]
    return any(stats.hodges_lehmann(rise, LEVEL).low > TOLERATED for rise in rises)


def so_far(cycled: Cycled) -> str:
    """The progress of cycles, in a line."""
    failed = sum(bool(step.error) for step in cycled.steps)
    held = f"{_size(cycled.host[-1])} at rest" if cycled.host else "memory is not known"
    return f"{held}, {failed} failed" if failed else held


def rows(cycled: Cycled, blamed: Sequence[str] = (), free: int = 0) -> tuple[Row, ...]:
    """A row for each memory, and one for loads and unloads. `blamed`: the use that causes a leak; `free`: free bytes of
    the machine, 0 if not known."""
    memories = [_memory(name, levels, cycled, blamed, free) for name, levels in cycled.series.items()]
    if not memories:
        why = "the server's processes are not known, or are not on this machine"
        memories = [_row(part="memory at rest", finding="not asked", sentence="memory was not read", why=why)]
    return (*memories, _answers(cycled))


def _memory(name: str, levels: Sequence[float], cycled: Cycled, blamed: Sequence[str], free: int) -> Row:
    late = cycled.late
    kept = leaks.judge(levels, returned=not (late and late.what.startswith("unload")))
    row = _row(part=PARTS[name], finding="no cost", sentence="", blocks=kept.cycles)
    row = replace(row, extra=_in_mb(kept.per_cycle), unit="MB a cycle")
    what, often = MEMORY[name], counted(kept.cycles, "cycle")
    between = f"{_size(kept.per_cycle.low)} to {_size(kept.per_cycle.high)}"
    match kept.outcome:
        case "leaks":
            with_ = f", by {'; '.join(blamed)}" if blamed else ""
            sentence = (
                f"each cycle keeps {_size(kept.per_cycle.estimate)} of {what} for good ({between}, {often}){with_}"
            )
            return replace(row, finding="costs", sentence=sentence, advice=_against(kept, free))
        case "caches":
            sentence = f"{_size(kept.bound)} of {what} are kept at most, and then no more ({between} a cycle, {often})"
            return replace(row, sentence=sentence)
        case "frees":
            return replace(row, sentence=f"{what} is given back ({between} a cycle, {often})")
        case "never returned":
            sentence = f"an unload never returned, so nobody knows what it frees ({often})"
            return replace(row, finding="fault", sentence=sentence, advice=_ADVICE_LATE)
        case _:
            why = f"{often}, and {leaks.LEAK_FROM} or more tell" if kept.cycles < leaks.LEAK_FROM else "it is noisy"
            sentence = f"whether {what} leaks is not decided ({between} a cycle)"
            return replace(row, finding="undecided", sentence=sentence, why=why, advice="--more unloading")


_ADVICE_LATE = "let requests end before their adapter is unloaded; set a time limit, and start the engine anew after it"


def _against(kept: Kept, free: int) -> str:
    keep = "keep adapters loaded, with a slot for each"
    if not free or not kept.per_cycle.estimate > 0:
        return keep
    cycles = max(1, int(free / 2 / kept.per_cycle.estimate))
    return f"{keep}; start the engine anew after {cycles} cycles, when half of the {_size(free)} that are free is gone"


def _answers(cycled: Cycled) -> Row:
    """Whether loads, unloads and the requests between them were answered, and how long they took."""
    row = _row(part="load and unload", finding="no cost", sentence="", phase="whole request", blocks=cycled.cycles)
    if late := cycled.late:
        others = {None: "", True: "; others are still answered", False: "; nobody else is answered either"}
        at = f"in cycle {cycled.cycles}, {late.what!r} {late.error.replace('no', 'had no', 1)}"
        advice = _ADVICE_LATE if late.what.startswith("unload") else "look into the engine's log"
        return replace(row, finding="fault", sentence=f"{at}{others[cycled.others_answer]}", advice=advice)
    failed = Counter(f"{step.what}: {step.error}" for step in cycled.steps if step.error)
    if failed:
        worst, times = failed.most_common(1)[0]
        sentence = f"{failed.total()} of {len(cycled.steps)} steps failed, {times} times {worst}"
        advice = "look into the engine's log" if not cycled.stopped else ""
        nothing = not any(step.what == "load" and not step.error for step in cycled.steps)
        if nothing:
            return replace(row, finding="not asked", sentence="no adapter was loaded", why=cycled.stopped or worst)
        return replace(row, finding="fault", sentence=sentence, advice=advice)
    loads = [1e3 * step.seconds for step in cycled.steps if step.what == "load"]
    unloads = [1e3 * step.seconds for step in cycled.steps if step.what == "unload"]
    times_ = " and ".join(
        f"{stats.median(each):.0f} ms {to}" for each, to in ((loads, "to load"), (unloads, "to unload"))
    )
    return replace(
        row, sentence=f"every load and unload was answered: {times_} (P50)", extra=stats.quantile(unloads, 0.5)
    )


def _row(part: str, finding: str, sentence: str, why: str = "", phase: str = "memory", blocks: int = 0) -> Row:
    return Row(
        bottleneck="unloading",
        part=part,
        phase=phase,
        batch=1,
        finding=finding,  # type: ignore[arg-type]
        sentence=sentence,
        why=why,
        blocks=blocks,
    )


def _in_mb(bytes_: Interval) -> Interval:
    return replace(bytes_, estimate=bytes_.estimate / 1e6, low=bytes_.low / 1e6, high=bytes_.high / 1e6)


def _size(value: float) -> str:
    return format_value("bytes", value)
