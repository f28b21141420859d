"""What the llm-compressor quantizers share: one run of it, saved in the compressed-tensors format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftopt import progress
from peftopt.corpus import Row
from peftopt.errors import BadInput
from peftopt.metrics import percent
from peftopt.models import hf, provenance
from peftopt.records import Json, Model, Step
from peftopt.transforms import _experts, _layers, _sensitivity, _smoothing

NEEDS = ("torch", "transformers", "llmcompressor", "compressed_tensors", "accelerate")

TEMPLATE = 24
"""Tokens that a chat template puts around a message, at most."""
EXPERTS = r"re:.*\.experts\.\d+\..*"
"""compressed-tensors' pattern of the layers of fused experts, taken apart."""

PASSES = 2
"""Times that llm-compressor sends a row through a layer: to see its inputs, and for those of the next one."""

FEWEST_TOKENS = 512
"""Calibration tokens below which the statistics of a layer's inputs are those of a few sentences."""


def check(bits: int = 4, group_size: int = 0, mixed: float = 0.0, samples: int = 1, max_tokens: int = 1) -> None:
    """Raises ValueError for parameters that no model can make sense of."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    if group_size not in (0, *_layers.GROUP_SIZES):
        sizes = ", ".join(map(str, _layers.GROUP_SIZES))
        raise ValueError(f"group_size must be 0 (the largest that fits), {sizes}, not {group_size}")
    if not 0 <= mixed < 1 or (mixed and bits == 8):
        raise ValueError("mixed must be a share of the weights below 1, such as 0.2, and needs bits: 4")
    if samples < 1 or max_tokens < 1:
        raise ValueError("samples and max_tokens must be at least 1; 32 samples of 512 tokens are a good start")


def check_inputs(folder: Path, params: Any, before: Sequence[Step], rows: Sequence[Row]) -> None:
    """Raises BadInput for a group size that does not divide the layers' inputs, and for calibration rows that are too
    short with any chat template around them, from files alone: neither torch nor a weight is touched."""
    settings = asdict(params)
    if "group_size" in settings:
        _layers.check_group_size(folder, settings["group_size"], settings["keep"])
    file = folder / "tokenizer.json"
    if "samples" not in settings or not rows or not file.is_file():
        return
    from tokenizers import Tokenizer

    encode, used = Tokenizer.from_file(str(file)), rows[: settings["samples"]]
    texts = ["\n".join([*(m["content"] for m in row.messages), row.expected]) for row in used]
    encodings = encode.encode_batch(texts, add_special_tokens=False)
    counts = [len(f.ids) + TEMPLATE * (len(row.messages) + 1) for f, row in zip(encodings, used, strict=True)]
    _check_tokens(sum(min(count, settings["max_tokens"]) for count in counts), len(used))


def _check_tokens(tokens: int, rows: int) -> None:
    if tokens < FEWEST_TOKENS:
        raise BadInput(
            f"the calibration text is too short: {tokens} tokens in {rows} rows, and it takes {FEWEST_TOKENS}",
            "give more rows like the real traffic (or more of their tokens: samples, max_tokens), or generic",
        )


def quantize(
    model: Model,
    params: Any,
    out: Path,
    seed: int,
    method: str,
    recipe: Callable[[dict[str, Any], list[dict[str, Any]]], list[Any]],
    weights: Mapping[str, Json],
    activations: Mapping[str, Json] | None = None,
    texts: Sequence[str] | None = None,
    notices: Sequence[str] = (),
    suits: Callable[[Any], None] = lambda _: None,
    smoothing: float = 0.0,
    scales_norms: bool = False,
) -> Model:
    """Quantize every linear layer but the output head and those that `params.keep` names, and save.

    `weights` and `activations` are compressed-tensors' arguments of what becomes of each; `recipe` makes
    llm-compressor's modifiers from their common arguments and the rows. `suits` is shown the model without weights and
    raises BadInput for one that the method cannot take; `smoothing` is done before (0: none); a method that
    `scales_norms` changes their weights itself. Of `params` these matter where they are there: group_size,
    mixed, samples, max_tokens, keep. The first `samples` texts are used, each cut at `max_tokens` tokens; None for a
    method that needs no texts. Adapters are carried along on the quantized base. All that can be refused is refused
    before the weights are read: raises BadInput for weights already quantized, a group size that does not divide the
    layers' inputs, layers that are not there, and texts that are too few.
    """
    config = hf.unquantized_config(model, "quantize")
    _log_to_stderr()
    settings = asdict(params)
    parts = _layers.find(config, split=True)
    notices = [*notices, *_layers.left_alone(parts, method)]
    kept, more_notices = _layers.kept(parts.layers, settings["keep"])
    if parts.experts:
        kind = parts.empty.config.model_type
        _experts.check(kind, method, weights, activations, parts.experts.intersection(kept))
    suits(parts.empty)
    targets = {name: shape for name, shape in parts.layers.items() if name not in kept}
    notices, weights = [*notices, *more_notices], dict(weights)
    if "group_size" in settings:
        settings["group_size"], more_notices = _layers.group_size(targets, settings["group_size"])
        weights |= {"strategy": "group", "group_size": settings["group_size"]}
        notices += more_notices
    rows: list[dict[str, Any]] = []
    calibration = None
    if texts is not None:
        most = min(settings["max_tokens"], hf.positions(parts.empty) or settings["max_tokens"])
        widest = max(width for _, width in targets.values())
        rows, calibration, more_notices = _encoded(model, texts, settings | {"max_tokens": most}, widest)
        notices += more_notices
    import torch

    torch.manual_seed(seed)
    opened = hf.load(model.path)
    _experts.split(opened)
    more: dict[str, Json] = {}
    if smoothing:
        more["smoothing"], more_notices = _smoothing.smooth(opened, rows, parts.layers, smoothing)
        notices += more_notices
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}
    if share := settings.get("mixed"):
        choice = {name: shape for name, shape in targets.items() if name not in parts.experts}
        spared, more["mixed"] = _sensitivity.spared(opened, rows, choice, share, weights)
        groups = _two_groups(choice, spared, weights, experts=bool(parts.experts))
        notices.append(
            f"{len(spared)} of {len(choice)} layers kept at 8 bits ({percent(more['mixed']['share'], 1)} of weights)"
        )
    odd = [n for n, m in opened.named_modules() if isinstance(m, torch.nn.Linear) and n not in targets]
    scheme = {"config_groups": groups, "ignore": odd}
    with hf.quiet(), _counted(opened, rows), _norms_kept(opened) if not scales_norms else contextlib.nullcontext():
        _run(opened, recipe(scheme, rows), rows, hf.tokenizer(hf.tokenizer_home(model), model.path))
    if parts.experts:
        _experts.name_as_read(opened)
    hf.save(opened, model.path, out, save_compressed=True)
    libraries = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    provenance.write(out, method, libraries, settings, seed, calibration, notices, **more)
    return Model(str(out), model.adapters)


@contextlib.contextmanager
def _norms_kept(model: Any) -> Iterator[None]:
    """Put the norms' weights back: llm-compressor adds 1 to those of Gemma's kind for a while, and rounds them so."""
    weights = [m.weight for m in model.modules() if _smoothing.is_norm(m)]
    before = [weight.detach().clone() for weight in weights]
    yield
    for weight, old in zip(weights, before, strict=True):
        weight.data = old


def _two_groups(
    targets: Mapping[str, Any], spared: Sequence[str], weights: Mapping[str, Json], experts: bool
) -> dict[str, Any]:
    """Config groups of the layers at few bits and of those at 8, each layer by name, and all `experts` at few.

    Not by class: older vLLMs match a fused layer's class before its parts' names, and would read 8 bits as 4. Experts
    by a pattern, by which transformers knows which group is theirs.
    """
    eight = {**weights, "num_bits": 8, "symmetric": True}
    few = [name for name in targets if name not in spared] + [EXPERTS] * experts
    return {
        "group_0": {"targets": few, "weights": weights},
        **({"group_1": {"targets": list(spared), "weights": eight}} if spared else {}),
    }


def _encoded(
    model: Model, texts: Sequence[str], settings: Mapping[str, Json], widest: int
) -> tuple[list[dict[str, Any]], dict[str, Json], list[str]]:
    """The first texts as rows of ids [1, tokens] that the base's embeddings know, what they were, and notices."""
    used = texts[: settings["samples"]]
    if not used:
        raise BadInput("no calibration texts", "give --calibration FILE (a few dozen real prompts), or generic")
    encode = hf.tokenizer(hf.tokenizer_home(model), model.path)
    known = hf.config(model.path).get_text_config().vocab_size
    rows = []
    for text in used:
        # The texts are rendered already: the chat template has put in whatever begins a sequence.
        row = encode(
            text,
            return_tensors="pt",
            truncation=True,
            max_length=settings["max_tokens"],
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        inside = row["input_ids"][0] < known  # tokens that an adapter added have no embedding in its base
        rows.append({name: value[:, inside] for name, value in row.items()})
    rows = [row for row in rows if row["input_ids"].numel()]
    tokens = sum(row["input_ids"].numel() for row in rows)
    _check_tokens(tokens, len(used))
    few = f"{tokens} calibration tokens for inputs up to {widest} wide: more texts would make a better model"
    return rows, provenance.calibrated(used, tokens), [few] * (tokens < widest)


@contextlib.contextmanager
def _counted(model: Any, rows: Sequence[Any]) -> Iterator[None]:
    """Report each decoder layer's calls: llm-compressor sends every row through a layer, quantizes it, and sends the
    rows through again for the next one. What it calls meanwhile (AWQ's search) are parts of a layer, not counted."""
    layers, done = _sensitivity.blocks(model), 0
    numbers = {layer: n for n, layer in enumerate(layers, 1)}

    def count(layer: Any, *_: Any) -> None:
        nonlocal done
        done += 1
        progress.report(
            "calibrating", done, PASSES * len(layers) * len(rows), f"layer {numbers[layer]} of {len(layers)}"
        )

    with contextlib.ExitStack() as stack:
        for layer in layers if rows else ():
            stack.callback(layer.register_forward_hook(count).remove)
        yield


def _log_to_stderr() -> None:
    """Let llm-compressor's warnings go to stderr. By itself it logs to stdout, its own import too: call this before
    anything else imports it."""
    import sys

    with contextlib.redirect_stdout(sys.stderr):
        from llmcompressor import LoggerConfig, configure_logger, logger

    configure_logger(LoggerConfig(console_log_level=None))
    noise = ("METRIC", "get_main_device")  # each layer's error, and "no accelerator" once a layer
    logger.add(sys.stderr, level="WARNING", filter=lambda line: not {line["level"].name, line["function"]} & {*noise})


def _run(model: Any, modifiers: list[Any], rows: list[Any], tokenizer: Any) -> None:
    """llm-compressor's `oneshot`."""
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    if rows:
        loader: Any = DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
        oneshot(model=model, tokenizer=tokenizer, recipe=modifiers, dataset=loader, pipeline="sequential")
    else:
        oneshot(model=model, tokenizer=tokenizer, recipe=modifiers)
