"""Reads what launch scripts ask of a run's variant: its folders and its measurements. The only file here that reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from peftopt import machine, store
from peftopt.deploy.chosen import Chosen
from peftopt.engines import llamacpp_server, vllm
from peftopt.gateway import decided
from peftopt.measurements import Launch
from peftopt.models import adapter, prompts, provenance
from peftopt.models.baked import is_baked
from peftopt.plugins import catalogue
from peftopt.records import SAFETENSORS, Json, Model
from peftopt.runner import preflight


def chosen(run: Path, variant: str = "") -> Chosen:
    """The chosen variant of a run, or another one that is named. Raises BadInput as `decided.of_run` does."""
    served = decided.of_run(run, variant)
    plugin = catalogue().get(served.measured_on.plugin)
    format_ = plugin.format if plugin else SAFETENSORS
    folder = Path(served.model.path)
    preflight.check_base(folder, quantized=True, weights=format_, ours=False)
    if served.draft:
        preflight.check_base(Path(served.draft), quantized=True, weights=format_, ours=False)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    made_by = provenance.read(folder)
    launch = _launch(run, served.origin.variant)
    lora = _adapter(served.model)
    return Chosen(
        decided=served,
        folder=str(run.resolve()),
        format=format_,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
        quantized=str((config.get("quantization_config") or {}).get("quant_method", "")),
        gpu_only=vllm.without_kernels(served.model.path),
        provenance=f"{made_by['method']}: {provenance.summary(made_by)}" if made_by else "",
        rank=adapter.highest_rank(lora),
        odd=_odd(served.model, lora),
        prompt=prompts.facts(served.model) != {},
        scaled=llamacpp_server.scaled(served.model) if format_ == "gguf" else "",
        threads=(launch.threads if launch else None) or 0,
        device=launch.device if launch else "",
        amx="amx_int8" in machine.processor(),
    )


def _adapter(model: Model) -> dict[str, Json]:
    """The config of the adapter that is not merged, {} for none and for a baked prompt."""
    live = [Path(folder) for folder in model.adapters if not is_baked(folder)]
    return dict(adapter.open_adapter(live[0]).config) if live else {}


def _odd(model: Model, lora: Mapping[str, Json]) -> str:
    """What the adapter is where that is no plain LoRA."""
    if any(map(is_baked, model.adapters)):
        return "a baked prompt"
    return vllm.not_plain(lora) if lora else ""


def _launch(run: Path, variant: str) -> Launch | None:
    """The last time that the run loaded the variant."""
    measured = store.read(run / "measurements.jsonl")
    launches = [each.values for each in measured if each.variant == variant and isinstance(each.values, Launch)]
    return launches[-1] if launches else None
