"""What may be put before users: an adapter of this base, a prompt baked from it, or a whole model. Read from headers,
but for values that are not finite; pickles are never opened."""

from __future__ import annotations

from pathlib import Path

from peftopt.errors import BadInput
from peftopt.models import baked
from peftopt.models.adapter import WEIGHTS
from peftopt.models.folders import check_link
from peftopt.records import SAFETENSORS


def adapter(folder: Path, base: Path | None, max_rank: int) -> None:
    """Raises BadInput for what is no safe adapter of this base, as merge checks it, and for a rank above `max_rank`
    (0 = any); for what was not baked from this base, where it is a baked prompt."""
    from peftopt.models.adapter import highest_rank, open_adapter
    from peftopt.runner import preflight

    if base:
        preflight.check_adapter(folder, base, [])
    if baked.is_baked(folder):
        _check_prompt(folder, max_rank)
        return
    rank = highest_rank(open_adapter(folder).config)
    if max_rank and rank > max_rank:
        raise BadInput(
            f"{folder} has rank {rank}, and the engine was started for at most {max_rank}",
            "start the gateway again with this adapter, or with --max-rank",
        )
    if wrong := _not_finite(folder / WEIGHTS):
        raise BadInput(f"{folder}: {wrong} holds a value that is not finite", "train or export it again")


def _check_prompt(folder: Path, max_rank: int) -> None:
    """Raises BadInput for a baked prompt that is not whole, or holds a value that is not finite, and for an engine that
    takes LoRAs alone: it was started for a rank."""
    if max_rank:
        hint = "start the gateway with --engine eager"
        raise BadInput(f"{folder} is a baked prompt, and this engine takes LoRA adapters alone", hint)
    for name in (baked.CONFIG, baked.WEIGHTS):
        check_link(folder / name, folder)
    baked.tensors(baked.open_baked(folder))
    if wrong := _not_finite(folder / baked.WEIGHTS):
        raise BadInput(f"{folder}: {wrong} holds a value that is not finite", "bake it again: peftopt bake")


def model(folder: Path, engine: str) -> None:
    """Raises BadInput for what is no safe model, as a base is checked, MissingEnvironment where the engine cannot read
    its weights here."""
    from peftopt import environments, plugins
    from peftopt.runner import preflight

    plugin = plugins.catalogue().get(engine)
    weights = plugin.format if plugin else SAFETENSORS
    ours = plugin is None or plugin.environment == environments.MAIN
    preflight.check_base(folder, quantized=True, weights=weights, ours=ours)


def _not_finite(file: Path) -> str:
    """The first tensor of a file with a value that is not finite; "" for none."""
    import ml_dtypes  # noqa: F401 (teaches numpy bfloat16)
    import numpy as np
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            if not np.isfinite(tensors.get_tensor(name).astype(np.float32)).all():
                return str(name)
    return ""
