"""Whether an adapter's folder may be served: as merge checks it, before anything of it is copied or loaded."""

from __future__ import annotations

from pathlib import Path

from peftopt.errors import BadInput
from peftopt.models.adapter import WEIGHTS, highest_rank, open_adapter


def check(folder: Path, base: Path | None, max_rank: int) -> None:
    """Raises BadInput for what is no safe adapter of this base, or of a higher rank than the engine holds (0 = any)."""
    from peftopt.runner import preflight

    if base:
        preflight.check_adapter(folder, base, [])
    rank = highest_rank(open_adapter(folder).config)
    if max_rank and rank > max_rank:
        raise BadInput(
            f"{folder} has rank {rank}, and the engine was started for at most {max_rank}",
            "start the gateway again with this adapter, or with --max-rank",
        )
    if wrong := _not_finite(folder / WEIGHTS):
        raise BadInput(f"{folder}: {wrong} holds a value that is not finite", "train or export it again")


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
