"""What GPTQ and AWQ share: one llm-compressor run over calibration texts, saved in the compressed-tensors format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftopt import hf
from peftopt.errors import BadInput
from peftopt.records import Model

NEEDS = ("torch", "transformers", "llmcompressor", "compressed_tensors", "accelerate")
GROUP_SIZES = (32, 64, 128, 256)
"""What vLLM's and transformers' kernels read."""


def calibrate(
    model: Model,
    out: Path,
    texts: Sequence[str],
    seed: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    samples: int,
    max_tokens: int,
    recipe: Callable[[dict[str, Any]], list[Any]],
) -> Model:
    """Quantize every linear layer but the output head to `bits` in groups of `group_size` weights, and save.

    `recipe` makes llm-compressor's modifiers from their common arguments. The first `samples` texts are used, each
    cut at `max_tokens` tokens. Adapters are carried along on the quantized base. All that can be refused is
    refused before the weights are read: raises BadInput for weights already quantized, a group size that does not
    divide the layers' inputs, unknown bits, and no texts.
    """
    _check(hf.unquantized_config(model, "quantize"), bits, group_size, samples, max_tokens)
    if not texts:
        raise BadInput("no calibration texts", "give the recipe a `calibration:` file; a few dozen real prompts do")
    import torch
    from torch.utils.data import DataLoader

    torch.manual_seed(seed)
    encode = hf.tokenizer(model.path)
    # The texts are rendered already: the chat template has put in whatever begins a sequence.
    rows: Any = [
        dict(encode(text, return_tensors="pt", truncation=True, max_length=max_tokens, add_special_tokens=False))
        for text in texts[:samples]
    ]
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    quantized = hf.load(model.path)
    with hf.quiet():
        oneshot = _oneshot()
        oneshot(model=quantized, tokenizer=encode, recipe=recipe(scheme), dataset=DataLoader(rows, batch_size=None))
        quantized.save_pretrained(out, save_compressed=True)
    hf.copy_extras(model.path, out)
    return Model(str(out), model.adapters)


def _oneshot() -> Callable[..., Any]:
    """llm-compressor's entry point; its warnings go to stderr, where by itself it logs every layer to stdout."""
    import sys

    from llmcompressor import LoggerConfig, configure_logger, logger, oneshot

    configure_logger(LoggerConfig(console_log_level=None))
    noise = ("METRIC", "get_main_device")  # each layer's error, and "no accelerator" once a layer
    logger.add(sys.stderr, level="WARNING", filter=lambda line: not {line["level"].name, line["function"]} & {*noise})
    run: Callable[..., Any] = oneshot
    return run


def _check(config: Any, bits: int, group_size: int, samples: int, max_tokens: int) -> None:
    """Refuse settings that llm-compressor, or a later loader, would only refuse after minutes of work."""
    if bits not in (4, 8):
        raise BadInput(f"bits: {bits} is not supported", "use 4 or 8")
    if samples < 1 or max_tokens < 1:
        raise BadInput("samples and max_tokens must be at least 1", "32 samples of 512 tokens are a good start")
    widths = _input_widths(config)
    common = math.gcd(*widths.values())
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    if group_size not in fitting:
        misfit = next((f"{name} ({width})" for name, width in widths.items() if width % max(group_size, 1)), "")
        why = f"does not divide the input width of {misfit}" if misfit else f"is not one of {GROUP_SIZES}"
        sizes = " or ".join(map(str, fitting))
        raise BadInput(
            f"group_size: {group_size} {why}", f"use {sizes}" if sizes else "no size fits this model: use int8"
        )


def _input_widths(config: Any) -> dict[str, int]:
    """Input width of each linear layer that is quantized; no weights are read, the model is built on `meta`."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    linear = {name: m for name, m in empty.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: m.in_features for name, m in linear.items() if m is not empty.get_output_embeddings()}
