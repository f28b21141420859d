"""Adapters of prompt methods on a tiny base, with random virtual tokens that change its answers; and their baking."""

from __future__ import annotations

from pathlib import Path

KINDS = {
    "PROMPT_TUNING": "PromptTuningConfig",
    "P_TUNING": "PromptEncoderConfig",
    "PREFIX_TUNING": "PrefixTuningConfig",
}


def make_prompt(base: Path, folder: Path, kind: str, tokens: int, seed: int = 1) -> Path:
    """Write an adapter of PEFT's `kind` ("P_TUNING") with so many virtual tokens."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    made = peft.get_peft_model(model, getattr(peft, KINDS[kind])(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    for parameter in made.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    made.save_pretrained(folder)
    return folder


def bake(base: Path, adapter: Path, out: Path) -> Path:
    """Bake it, with a certificate in the base's own dtype."""
    from peftopt.records import Model
    from peftopt.transforms import bake as transform

    transform.transform(Model(str(base), (str(adapter),)), transform.Params(certify="own"), out, [], 0)
    return out
