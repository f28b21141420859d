"""What an adapter's arithmetic explains of its cost, by the shapes of its matrices and the base's. Pure but for `read`.

A LoRA of rank r multiplies by A [r, in] and B [out, r] beside each matrix [out, in] that it adapts (arXiv:2106.09685,
4.1): r (in + out) items beside in x out. It needs the same share of the base's time, whether a pass waits for weights'
bytes or for multiplications. Three things can cost more than that:

- separate small matmuls: each has work around it that does not depend on its size. A step for one row shows it.
- a rank that the engine pads: matrices of zeros are multiplied as others are.
- a product that a LoRA does not need, such as one by its delta as a whole matrix.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from peftopt import stats
from peftopt.diagnose.records import Row
from peftopt.errors import BadInput
from peftopt.metrics import percent
from peftopt.models.adapter import is_embedding, open_adapter, plain_pairs
from peftopt.models.checkpoint import Entry, open_model
from peftopt.records import Interval

Phase = Literal["prefill", "decode"]

LEVEL = 0.998
"""Of the interval that shows work beyond a LoRA's: ten blocks that all agree reach it."""

BEYOND = 0.5
"""A share of what one more product of each adapted matrix would take. A LoRA's own work, its additions to every layer's
output among it, stays below; such a product is above."""

SWOLLEN, APART = 4.0, 128 * 2**20
"""How many times its matrices' bytes an adapter takes at most that is not padded, and by how many bytes two servers may
differ that were asked other requests: up to 87 MB were measured."""

PACKED_OR_ROUTED = ("quantization_config", "num_local_experts", "num_experts", "n_routed_experts", "vision_config")
"""Keys of a base's config that say that a pass does not multiply by each matrix once, as it lies on disk."""


@dataclass(frozen=True)
class Matrices:
    """Matrices that each new token is multiplied by: their items and bytes in all."""

    items: int
    nbytes: int

    def __add__(self, other: Matrices) -> Matrices:
        return Matrices(self.items + other.items, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class Work:
    """The matrices of a pass: the `layers` of the base, its output embedding (`head`), the `adapter`'s matrices, and
    those of the base that it `adapted`. `modules`: the number of these; `rank`: the adapter's highest."""

    layers: Matrices
    head: Matrices
    adapter: Matrices
    adapted: Matrices
    modules: int
    rank: int

    def share(self, phase: Phase) -> float:
        """The part of the base's time that the adapter's arithmetic needs: 0.08 = 8 % more."""
        return self._of_base(self.adapter, phase)

    def dense(self, phase: Phase) -> float:
        """The part of the base's time that one more product of each adapted matrix needs."""
        return self._of_base(self.adapted, phase)

    def _of_base(self, more: Matrices, phase: Phase) -> float:
        """A prompt's tokens but the last need no output embedding. A step waits for bytes or for multiplications: the
        higher of both shares is an upper bound."""
        whole = self.layers if phase == "prefill" else self.layers + self.head
        return max(more.items / whole.items, more.nbytes / whole.nbytes)


def read(base: Path, adapter: Path) -> Work | None:
    """From the headers of both folders' files; None where shapes do not say what a pass computes: an adapter that is
    not plain LoRA, or one of other modules than the base has; packed weights, experts, several towers.

    Raises BadInput for folders that are broken.
    """
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{base} is not a model folder: {error}", "it needs a config.json") from error
    pairs = plain_pairs(open_adapter(adapter))
    if not pairs or any(config.get(key) for key in PACKED_OR_ROUTED):
        return None
    return work(open_model(base).entries.values(), {module: (pair.a, pair.b) for module, pair in pairs.items()})


def work(base: Iterable[Entry], pairs: Mapping[str, tuple[Entry, Entry]]) -> Work | None:
    """The work of a base's tensors and of a LoRA's pairs (A, B) by module; None where a module is not among them."""
    matrices = {entry.name.removesuffix(".weight"): entry for entry in base if len(entry.shape) == 2}
    embeddings = [entry for entry in matrices.values() if is_embedding(entry.name)]
    layers = [entry for entry in matrices.values() if not is_embedding(entry.name)]
    if not layers or not pairs or not pairs.keys() <= matrices.keys():
        return None
    heads = [entry for entry in embeddings if "lm_head" in entry.name or "embed_out" in entry.name]
    return Work(
        layers=summed(layers),
        head=summed((heads or embeddings)[:1]),
        adapter=summed(entry for pair in pairs.values() for entry in pair),
        adapted=summed(matrices[module] for module in pairs),
        modules=len(pairs),
        rank=max(a.shape[0] for a, _ in pairs.values()),
    )


def summed(entries: Iterable[Entry]) -> Matrices:
    """All of them together."""
    return sum((Matrices(entry.items, entry.nbytes) for entry in entries), Matrices(0, 0))


# ---- what was measured beside it -----------------------------------------------------------------


def explained(work: Work, phase: Phase, ratio: float) -> str:
    """The explanation of a cost: the part of the arithmetic, and the cause of the rest. `ratio` of times."""
    share, cost = work.share(phase), ratio - 1
    if cost <= share:
        return f"a LoRA of rank {work.rank} on {work.modules} layers needs up to {_percent(share)} more arithmetic"
    rest = f"the engine applies it in small matmuls of their own at {work.modules} layers, which a merge removes"
    return f"its arithmetic explains {_percent(share)} of these {_percent(cost)}: {rest}"


@dataclass(frozen=True)
class Times:
    """Times of the base and of the adapter (ms), paired by block. `prefill`: of several prompts together; `step`: per
    token of one row."""

    base_prefill: Sequence[float]
    prefill: Sequence[float]
    base_step: Sequence[float]
    step: Sequence[float]


def computed(times: Times) -> Interval:
    """How much more a prefill takes with the adapter, as a part of the base's, without the part that does not grow with
    the tokens. That part is at most the extra time of a step for one row."""
    rows = zip(times.base_prefill, times.prefill, times.base_step, times.step, strict=True)
    parts = [(with_it - base - max(step - base_step, 0.0)) / base for base, with_it, base_step, step in rows]
    return stats.hodges_lehmann(parts, LEVEL)


Reason = Literal["its own", "padded rank", "more work"]
"""What computes so much: the LoRA's own work; the same at a higher rank; something that a LoRA does not need."""


@dataclass(frozen=True)
class Judged:
    """Why a prefill takes `extra` more with an adapter (a part of the base's time)."""

    reason: Reason
    extra: Interval


def judged(
    work: Work, times: Times, padding: Sequence[float] = (), padded_rank: int = 0, swollen: bool = False
) -> Judged:
    """Why a prefill takes longer with the adapter. `padding`: the extra time (ms, by block) of the same adapter padded
    with zeros to `padded_rank` before it was loaded; () without one. If it should cost more and does not, the engine
    has padded both. `swollen`: adapters take far more memory than their matrices do."""
    extra = computed(times)
    if not extra.low > work.share("prefill") + BEYOND * work.dense("prefill"):
        return Judged("its own", extra)
    base_ms = stats.median(times.base_prefill)
    more = stats.hodges_lehmann([ms / base_ms for ms in padding], LEVEL)
    needed = work.share("prefill") * (padded_rank - work.rank) / work.rank
    return Judged("padded rank" if swollen or more.high < needed / 2 else "more work", extra)


def swollen(held: float, files: float) -> bool:
    """Whether adapters take far more memory than their matrices do: `held` bytes more with them than without, against
    `files` bytes. Half of a padded rank's zeros are enough; leftovers of requests (APART) are not."""
    return held > SWOLLEN * files + APART


WHY: Mapping[Reason, str] = {
    "padded rank": "The engine pads it: in memory adapters are larger than their files, or more zeros cost no more",
    "more work": "Something is computed that a LoRA does not need",
}

WHAT_TO_DO: Mapping[Reason, str] = {
    "padded rank": "set the engine's highest rank to that of the adapters (vLLM: --max-lora-rank), or merge",
    "more work": "merge the adapter, or look with a profiler at what the engine computes for it",
}


def row(work: Work, name: str, batch: int, found: Judged) -> Row | None:
    """A fault for an adapter whose prefill does more than its own work; None for one that does not. `batch` prompts
    were run together."""
    if found.reason == "its own":
        return None
    longer, low, high = (_percent(bound) for bound in (found.extra.estimate, found.extra.low, found.extra.high))
    rank = round(work.rank * found.extra.estimate / work.share("prefill"))
    sentence = (
        f"{name}: prompts take {longer} longer ({low} to {high}), and the arithmetic of its rank {work.rank} explains "
        f"{_percent(work.share('prefill'))}; a rank of {rank} would need as much. {WHY[found.reason]}"
    )
    extra = found.extra
    ratio = replace(extra, estimate=1 + extra.estimate, low=1 + extra.low, high=1 + extra.high)
    return Row(
        bottleneck="unfused",
        part=found.reason,
        phase="prefill",
        batch=batch,
        finding="fault",
        sentence=sentence,
        advice=WHAT_TO_DO[found.reason],
        ratio=ratio,
        blocks=found.extra.n,
    )


def _percent(share: float) -> str:
    return percent(share, 0 if share >= 0.095 else 1)
