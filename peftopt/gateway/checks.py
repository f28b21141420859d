"""Whether a folder may be served: an adapter of this base, a prompt baked from it, or a whole model. Reads headers
only, and values to find damaged ones; pickles are never opened."""

from __future__ import annotations

from pathlib import Path

from peftopt.errors import BadInput
from peftopt.models import baked
from peftopt.models.checkpoint import Checkpoint
from peftopt.models.folders import check_link
from peftopt.records import SAFETENSORS


def adapter(folder: Path, base: Path | None, max_rank: int) -> None:
    """Raises BadInput for an adapter that is unsafe or not of this base, by the checks of a merge, and for a rank above
    `max_rank` (0 = any); also for a prompt that was not baked from this base."""
    from peftopt.models.adapter import highest_rank, open_adapter
    from peftopt.runner import preflight

    if base:
        preflight.check_adapter(folder, base, [])
    if baked.is_baked(folder):
        _check_prompt(folder, max_rank)
        return
    opened = open_adapter(folder)
    rank = highest_rank(opened.config)
    if max_rank and rank > max_rank:
        raise BadInput(
            f"{folder} has rank {rank}, and the engine was started for at most {max_rank}",
            "start the gateway again with this adapter, or with --max-rank",
        )
    if not base:  # else it was looked at with its base
        preflight.check_values(folder, opened.weights)


def _check_prompt(folder: Path, max_rank: int) -> None:
    """Raises BadInput for a baked prompt that is not whole, or holds a damaged value, and for an engine that takes
    LoRAs alone: it was started for a rank."""
    from peftopt.runner import preflight

    if max_rank:
        hint = "start the gateway with --engine eager"
        raise BadInput(f"{folder} is a baked prompt, and this engine takes LoRA adapters alone", hint)
    for name in (baked.CONFIG, baked.WEIGHTS):
        check_link(folder / name, folder)
    baked.tensors(baked.open_baked(folder))
    preflight.check_values(folder, Checkpoint([folder / baked.WEIGHTS]))


def model(folder: Path, engine: str) -> None:
    """Raises BadInput for an unsafe model, by the checks of a base, MissingEnvironment if the engine cannot read its
    weights here."""
    from peftopt import environments, plugins
    from peftopt.runner import preflight

    plugin = plugins.catalogue().get(engine)
    weights = plugin.format if plugin else SAFETENSORS
    ours = plugin is None or plugin.environment == environments.MAIN
    preflight.check_base(folder, quantized=True, weights=weights, ours=ours)
