"""Fold the adapter into the base weights: the same model, without the adapter's cost per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt.errors import BadInput
from peftopt.records import Model
from peftopt.transforms import _hf

TECHNIQUE = "merge"
NEEDS = ("torch", "transformers", "peft", "safetensors")

INPUT_DEPENDENT = {"XLORA", "POLY", "LILY", "SHADOW"}
"""Tuners whose delta is computed from each input: there is no one weight to fold in."""


@dataclass(frozen=True)
class Params:
    """Nothing to choose: PEFT merges in fp32 and rounds once, to the base's own dtype."""


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """Merge the adapters, in order, with PEFT: W <- W + delta, e.g. scaling * B A of LoRA (arXiv:2106.09685, 4.1).

    The merged folder keeps the base's dtype, tokenizer and chat template. Embeddings stay tied unless an adapter
    changes one side only. Raises BadInput without an adapter, for one that has no weight delta (prompt methods,
    X-LoRA, …), does not fit, is not finite or changes nothing, and for a quantized base.
    """
    if not model.adapters:
        raise BadInput(f"nothing to merge: {model.path} has no adapter", "name one as model.adapter, or drop `merge`")
    base_config = _hf.unquantized_config(model, "merge into")
    for adapter in model.adapters:
        _check_mergeable(adapter)
    merged = _hf.load(model.path)
    if getattr(base_config, "tie_word_embeddings", False):
        _untie(merged)
    for adapter in model.adapters:
        try:
            on_top = _hf.attach(merged, adapter)
            with _hf.quiet():
                merged = on_top.merge_and_unload()
        except (NotImplementedError, AttributeError, ValueError) as error:
            hint = "serve it unmerged, or train one that can be merged (LoRA)"
            raise BadInput(f"PEFT cannot merge adapter {adapter}: {error}", hint) from error
    if getattr(base_config, "tie_word_embeddings", False):
        _tie_again(merged)
    weights = merged.state_dict()
    if bad := _hf.not_finite(weights):
        raise BadInput(f"the merged weight {bad} holds NaN or infinity", "the adapter's scaling is too large: check it")
    if _same_as_files(weights, Path(model.path)):
        raise BadInput(
            f"merging changed nothing: every weight equals the base's ({', '.join(model.adapters)})",
            "the adapter is untrained, or its delta is lost in the base's rounding",
        )
    with _hf.quiet():
        merged.save_pretrained(out)
    _hf.copy_extras(model.path, out)
    return Model(str(out))


def _check_mergeable(adapter: str) -> None:
    settings = _hf.adapter_config(adapter)
    kind = getattr(settings.peft_type, "value", str(settings.peft_type))
    reason = ""
    if settings.is_prompt_learning or kind == "ADAPTION_PROMPT":
        reason = "it has no weight delta"
    elif kind in INPUT_DEPENDENT or getattr(settings, "alora_invocation_tokens", None):
        reason = "its delta depends on the input"
    elif getattr(settings, "layer_replication", None):
        reason = "its replicated layers share weights, and PEFT merges them wrongly"
    if reason:
        raise BadInput(
            f"adapter {adapter} ({kind}) cannot be merged: {reason}",
            "serve it unmerged and take `merge` out of this variant; quantizing or compiling the base still helps",
        )


def _untie(model: Any) -> None:
    """Give the output head its own copy: a delta for one side must not reach the other through shared memory."""
    import torch

    head = model.get_output_embeddings()
    if head is not None:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _tie_again(model: Any) -> None:
    """Tie head and embeddings when they are still equal; otherwise say in the config that they no longer are."""
    import torch

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None:
        model.config.tie_word_embeddings = tied = torch.equal(head.weight, embeddings.weight)
        if tied:
            head.weight = embeddings.weight


def _same_as_files(weights: dict[str, Any], folder: Path) -> bool:
    """Whether every stored tensor equals the model's; stops at the first that differs or has another name."""
    import torch
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (not a mapping)
                if key not in weights or not torch.equal(stored.get_tensor(key), weights[key]):
                    return False
    return True
