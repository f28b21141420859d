"""Everything that can be known to be wrong before anything slow starts. Reads headers only, never imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from peftopt import corpus
from peftopt.errors import BadInput
from peftopt.records import Json, Recipe

PROMPT_METHODS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT")
"""PEFT types that add tokens instead of changing weights: they have no weight delta, so nothing to merge."""


def check(recipe: Recipe) -> None:
    """Raises BadInput for the first thing in the recipe's files that cannot work, saying what to do."""
    check_base(Path(recipe.base))
    merges = [v.name for v in recipe.variants.values() if any(s.technique == "merge" for s in v.steps)]
    check_adapter(Path(recipe.adapter), Path(recipe.base), merges)
    for workload in recipe.workloads.values():
        corpus.read(workload.prompts, workload.slice)
    if recipe.quality:
        rows = corpus.read(recipe.quality.prompts)
        if recipe.calibration:
            corpus.check_apart(rows, corpus.read(recipe.calibration), recipe.calibration)
        if recipe.quality.schema:
            schema(recipe.quality.schema)


def schema(path: str) -> Mapping[str, Json]:
    """A JSON schema (draft 2020-12), checked to be one."""
    import jsonschema

    value = _json(Path(path), "a JSON schema")
    try:
        jsonschema.Draft202012Validator.check_schema(value)
    except jsonschema.SchemaError as error:
        raise BadInput(f"{path} is no JSON schema: {error.message}", "see json-schema.org, draft 2020-12") from error
    return value


def check_base(folder: Path, quantized: bool = False) -> None:
    """A causal language model in safetensors, with no code of its own and, unless `quantized`, not quantized yet."""
    if not folder.is_dir():
        raise BadInput(f"no model folder at {folder}", "model.base names a folder with config.json and safetensors")
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} is no model: it has no config.json", "give the folder that save_pretrained wrote")
    config = _json(folder / "config.json", "a model's config")
    if "auto_map" in config:
        raise BadInput(f"{folder} brings its own code (auto_map)", "peftopt runs only architectures of transformers")
    if "quantization_config" in config and not quantized:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise BadInput(f"{folder} is already quantized ({method})", "start from the full-precision base")
    names = config.get("architectures") or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        what = ", ".join(names) or "none named"
        raise BadInput(f"{folder} is no causal language model (architectures: {what})", "supported: …ForCausalLM")
    if not list(folder.glob("*.safetensors")):
        raise BadInput(
            f"{folder} has no safetensors weights",
            "pickled weights (.bin, .pt) are never opened; convert with save_pretrained(safe_serialization=True)",
        )
    for _ in _tensors(folder):
        pass


def check_adapter(folder: Path, base: Path, merges: list[str]) -> None:
    """A PEFT adapter in safetensors whose shapes fit this base."""
    if not folder.is_dir():
        raise BadInput(f"no adapter folder at {folder}", "model.adapter names a folder with adapter_config.json")
    if not (folder / "adapter_config.json").is_file():
        raise BadInput(f"{folder} is no adapter: it has no adapter_config.json", "give the folder that PEFT saved")
    config = _json(folder / "adapter_config.json", "an adapter's config")
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "only a pickle (adapter_model.bin), which is never opened" if pickled else "no adapter_model.safetensors"
        raise BadInput(f"{folder} has {why}", "load it where you trust it and save it again with save_pretrained")
    kind = str(config.get("peft_type", ""))
    if kind in PROMPT_METHODS and merges:
        raise BadInput(
            f"the adapter is {kind}, which cannot be merged (variants: {', '.join(merges)})",
            "a prompt method has no weight delta; quantize the base and keep the adapter apart: [int8]",
        )
    if kind == "LORA":
        _check_fits(folder, base, str(config.get("base_model_name_or_path", "")))


def _check_fits(folder: Path, base: Path, trained_on: str) -> None:
    """Each LoRA pair must sit on a weight of the base and have its shape; else it was trained on another one."""
    weights = dict(_tensors(base))
    advice = f"it says it was trained on {trained_on or 'an unnamed base'}; give that base"
    for name, shape in _tensors(folder):
        module, dot, part = name.removeprefix("base_model.model.").partition(".lora_")
        side = part.split(".")[0]
        if not dot or side not in ("A", "B") or len(shape) != 2:
            continue
        target = weights.get(f"{module}.weight") or weights.get(f"{module}.base_layer.weight")
        if target is None:
            raise BadInput(f"adapter {folder} does not fit {base}: the base has no {module}", advice)
        width = shape[1] if side == "A" else shape[0]
        if width not in target:
            raise BadInput(
                f"adapter {folder} does not fit {base}: {module} is {target} there and lora_{side} is {list(shape)}",
                advice,
            )


def _tensors(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of all tensors, from the headers. Raises BadInput for a broken file."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    yield name, tensors.get_slice(name).get_shape()
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file} is not a whole safetensors file: {error}", "copy or download it again") from error


def _json(path: Path, what: str) -> dict[str, Json]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as {what}: {error}", "restore the file") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} cannot be read as {what}: not a JSON object", "restore the file")
    return value
