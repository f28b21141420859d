"""Fold adapters into the base weights: the same model, certified, without their cost per token."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt import plugins, store
from peftopt.errors import BadInput
from peftopt.merging.certificate import Check
from peftopt.merging.job import Merge
from peftopt.merging.training import SCHEMES, TrainingBase, is_packed
from peftopt.models.adapter import check_mergeable, check_trained_on, open_adapter
from peftopt.records import Json, Model

DTYPES = {"": "", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
ONE_GB = 10**9
CHOICES = {
    "dtype": tuple(DTYPES),
    "certify": ("auto", "blocks", "full"),
    "merge_base": ("full", "dequantized", "auto", "in-place"),
    "scheme": SCHEMES,
    "combination": ("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune"),
}


@dataclass(frozen=True)
class Params:
    """`dtype`: "bf16", "fp16", "fp32", or "" for the base's own. `certify`: "blocks" (while streaming), "full" (the
    saved folder's predictions too) or "auto", which is "full" for a base of up to 1 GB. `weights`: one per adapter,
    separated by commas ("" = all 1). `combination`: how several LoRAs become one, "cat" (their exact weighted sum) or
    another type of PEFT's. `merge_base`: the weights that the delta is added to, "full" as they are, "dequantized" as
    `scheme` (nf4, fp4) left them in training, "auto" for whichever is nearer to the adapter on its 4-bit base,
    "in-place" for packed weights that stay packed. `allow_base_mismatch`: merge though names or revisions say that the
    base is another one."""

    dtype: str = ""
    certify: str = "auto"
    weights: str = ""
    combination: str = "cat"
    merge_base: str = "full"
    scheme: str = "nf4"
    allow_base_mismatch: bool = False


PLUGIN = plugins.merger(Params, needs=("torch", "transformers", "peft", "safetensors"))


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """Merge the adapters: W <- W + delta, e.g. scaling * B A of LoRA (arXiv:2106.09685, 4.1), computed in fp32 or
    better and rounded once. Plain LoRA streams through small blocks, every other type goes module by module through
    PEFT's own code; the model is never loaded, except for the predictions of a full certificate.

    Leaves a folder that loads as the base did (same shards, dtype, tokenizer, chat template) with parity.json in it,
    which says whether every check passed. Embeddings stay tied unless an adapter changes one side only. Raises
    BadInput without an adapter, for one that has no weight delta or depends on the input, does not fit, is not finite
    or changes nothing, and for a quantized base that `merge_base` does not say how to read.
    """
    if params.merge_base == "auto" and not _packed(model):
        _nearer(model, params, out, texts)
    else:
        certify = _depth(model, params)
        with _opened(model, params) as job:
            if certify == "full":
                job.check_whole()  # needs what predictions need too
            job.write(out) if params.merge_base != "in-place" else job.write_packed(out)
            if certify == "full" or params.merge_base == "in-place":
                job.checks.append(job.predictions(out, texts, lossy=params.merge_base == "in-place"))
            job.certify(out, certify)
    return Model(str(out))


def _depth(model: Model, params: Params) -> str:
    """How deeply the merge is certified: predictions need the whole model in memory, twice, in fp32."""
    if params.certify != "auto":
        return params.certify
    return "blocks" if store.size(Path(model.path)) > ONE_GB else "full"


def preview(model: Model, params: Params) -> list[dict[str, Json]]:
    """What a merge would change, tensor by tensor: its name, shape, dtype, bytes, and the norm of its delta and of its
    weight (Frobenius). Nothing is written."""
    with _opened(model, params) as job:
        return list(job.preview())


def _nearer(model: Model, params: Params, out: Path, texts: Sequence[str]) -> None:
    """Merge into the base as it is and as 4 bits left it, compare each with the adapter on its 4-bit base, and keep the
    one that is nearer. The other is gone afterwards."""
    merges: list[tuple[float, str, Path, Merge]] = []
    trained_on = TrainingBase(params.scheme)
    for base, training in (("full", TrainingBase()), ("dequantized", trained_on)):
        side = out.with_name(f"{out.name}.{base}")
        with _opened(model, params, training) as job:
            job.write(side)
            job.training = trained_on  # whatever was written, the live adapter is compared on the base of its training
            job.checks.append(job.predictions(side, texts, lossy=base == "full"))
        merges.append((float(job.checks[-1].values["kl"]), base, side, job))
    figures = {base: kl for kl, base, *_ in merges}
    shown = ", ".join(f"KL {kl:.2g} when merged into the {base} weights" for base, kl in figures.items())
    _, kept, side, job = min(merges, key=lambda one: one[0])
    for _, _, other, _ in merges:
        if other != side:
            shutil.rmtree(other)
    side.rename(out)
    job.checks.insert(-1, Check("merge base", True, f"{kept}: {shown}", figures))
    job.certify(out, "full")


def _opened(model: Model, params: Params, training: TrainingBase | None = None) -> Merge:
    """Everything that can be refused before a weight is read is refused here."""
    folder = Path(model.path)
    if not model.adapters:
        raise BadInput(f"nothing to merge: {model.path} has no adapter", "name one as model.adapter, or drop `merge`")
    for name, known in CHOICES.items():
        if (value := getattr(params, name)) not in known:
            raise BadInput(f"merge has no {name}: {value}", f"use {', '.join(filter(None, known))}")
    config = _config(folder)
    packed = _packed(model)
    _check_quantized(folder, config, params.merge_base, packed)
    weights = _weights(params, model.adapters)
    adapters = [open_adapter(Path(a), weight) for a, weight in zip(model.adapters, weights, strict=True)]
    if len(kinds := sorted({a.kind for a in adapters})) > 1:
        raise BadInput(f"adapters of different types: {', '.join(kinds)}", "merge one, then the other into the result")
    for adapter in adapters:
        check_mergeable(adapter)
        if not params.allow_base_mismatch:
            check_trained_on(adapter, folder, config)
    scheme = params.scheme if params.merge_base == "dequantized" and not packed else ""
    training = training or TrainingBase(scheme, packed)
    job = Merge(folder, config, adapters, training, DTYPES[params.dtype], params.combination)
    eights = sorted(name for name, entry in job.base.entries.items() if entry.dtype.startswith("F8"))
    if eights and not packed:
        job.stack.close()
        raise BadInput(
            f"{folder} holds {eights[0]} in 8-bit floats, and its config says nothing of a quantization",
            "merge into the 16-bit model; the scales of these weights are not known",
        )
    return job


def _config(folder: Path) -> dict[str, Json]:
    config: dict[str, Json] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _packed(model: Model) -> bool:
    return is_packed(_config(Path(model.path)).get("quantization_config"))


def _check_quantized(folder: Path, config: Mapping[str, Json], merge_base: str, packed: bool) -> None:
    settings = config.get("quantization_config")
    if merge_base == "in-place" and not packed:
        raise BadInput(f"{folder} holds no 4-bit weights to merge into in place", "leave --merge-base out")
    if settings and not (packed and merge_base != "full"):
        method = settings.get("quant_method", "?")
        hint = "merge into the full-precision model, then quantize the result"
        if packed:
            hint = (
                f"--merge-base dequantized writes 16-bit weights from these; or {hint}; "
                "--merge-base in-place does it all the same, and measures what is left"
            )
        raise BadInput(
            f"cannot merge into {folder}: its weights are already quantized ({method}), and rounding the sum to so few "
            "bits again would round most of the delta away",
            hint,
        )


def _weights(params: Params, adapters: Sequence[str]) -> list[float]:
    if not params.weights:
        return [1.0] * len(adapters)
    try:
        weights = [float(text) for text in params.weights.split(",")]
    except ValueError as error:
        raise BadInput(f"weights: {params.weights!r} are not numbers", "one per adapter, such as 0.7,0.3") from error
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise BadInput(f"{len(weights)} weights for {len(adapters)} adapters", "one finite number per adapter")
    return weights
