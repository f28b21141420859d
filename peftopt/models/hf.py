"""How the torch-side plug-ins load a Model and write one: transformers and PEFT, checked where they only warn."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftopt.errors import BadInput
from peftopt.models import folders
from peftopt.models.adapter import CONFIG, WEIGHTS, is_embedding, open_adapter
from peftopt.models.provenance import FILE as PROVENANCE
from peftopt.records import Model

for _name in ("torchao", "torch.utils._pytree", "torch.fx._symbolic_trace"):
    # On every import they report GPU kernels that a CPU cannot load, and deprecations in the libraries themselves.
    logging.getLogger(_name).setLevel(logging.ERROR)

OWN_FILES = ("config.json", "parity.json", PROVENANCE, "recipe.yaml", CONFIG)
"""What each transform writes for itself: a certificate or a provenance is of the weights beside it, and of no others
(recipe.yaml is llm-compressor's); and an adapter's config, which transformers would look for the weights of."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and nothing on stdout: it is the worker's protocol. Errors and warnings stay on stderr."""
    import sys
    from unittest import mock

    from tqdm import tqdm  # type: ignore[import-untyped]
    from transformers.utils import logging as progress

    bars = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    show = tqdm.__init__

    def hide(bar: Any, *args: Any, **kwargs: Any) -> None:
        show(bar, *args, **{**kwargs, "disable": True})

    # Patched, because TQDM_DISABLE is read only when tqdm is first imported, and some callers override it.
    silent = mock.patch.object(tqdm, "__init__", hide)
    try:
        with silent, contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what matters of them is checked and raised here
            yield
    finally:
        if bars:
            progress.enable_progress_bar()


def config(folder: str) -> Any:
    """The folder's transformers config. Raises BadInput when there is none that transformers can read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        hint = "it needs a config.json"
        if (Path(folder) / "config.json").is_file():
            hint = "its config.json is broken, or of an architecture that this transformers does not know: upgrade it"
        raise BadInput(f"{folder} is not a model folder: {_first_line(error)}", hint) from error


def unquantized_config(model: Model, verb: str) -> Any:
    """The model's config; raises BadInput when its weights are already quantized."""
    loaded = config(model.path)
    if settings := getattr(loaded, "quantization_config", None):
        method = settings.get("quant_method", "?") if isinstance(settings, dict) else "?"
        raise BadInput(
            f"cannot {verb} {model.path}: its weights are already quantized ({method})",
            f"{verb} the full-precision model; an adapter is merged before the model is quantized",
        )
    return loaded


def tokenizer(folder: str, base: str = "") -> Any:
    """The folder's tokenizer, padding on the left as generation needs it; with the chat template of `base`, the folder
    of the model below, where it has none of its own. Raises BadInput without one."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        hint = "copy tokenizer.json and tokenizer_config.json next to the weights"
        raise BadInput(f"{folder} has no usable tokenizer: {_first_line(error)}", hint) from error
    if base and base != folder and not loaded.chat_template:
        with contextlib.suppress(OSError, ValueError, KeyError):  # the base may have no tokenizer at all
            loaded.chat_template = AutoTokenizer.from_pretrained(base, local_files_only=True).chat_template
    return loaded


def load(folder: str, unpacked: bool = False, device: str = "cpu", **kwargs: Any) -> Any:
    """The model of a folder in its own dtype, in eval mode, on `device`. Raises BadInput when it cannot be read, or
    lacks weights that the model has: transformers makes those up at random, and only warns.

    `unpacked`: open packed weights (GPTQ, AWQ) now, not at the first forward pass as transformers does by default;
    PEFT can wrap only layers that have a weight.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    packing = (getattr(config(folder), "quantization_config", None) or {}).get("quant_method")
    if packing == "compressed-tensors" and unpacked:
        kwargs["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if packing == "bitsandbytes" and device != "cpu":
        kwargs["device_map"] = {"": device}  # its 8-bit weights cannot be moved once they are there
    try:
        with quiet():
            kwargs = {"dtype": "auto", "local_files_only": True, **kwargs}
            with building(folder), _whole(folder, strict=(Path(folder) / PROVENANCE).is_file()):
                loaded = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
            if packing == "compressed-tensors" and unpacked:
                # Unpacking leaves a hook on every module that looks for its weights at each call; no graph can hold it.
                from compressed_tensors.offload import remove_dispatch

                remove_dispatch(loaded)
            return loaded if "device_map" in kwargs else loaded.to(device)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load {folder}: {_first_line(error)}", "check that the folder is whole") from error


def check_whole(
    folder: str, shapes: Mapping[str, Sequence[int]], settings: Any = None, any_shape: bool = False
) -> None:
    """Raises BadInput when a checkpoint whose tensors have these names and shapes lacks a weight of the model.

    No weight is read: transformers loads tensors that have shapes and no memory, by its own rules of renaming, fusing
    and tying. `settings` is the model's config, the folder's if None. `any_shape`: packed tensors have other shapes
    than the layers they are of.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settings = config(folder) if settings is None else settings
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with quiet(), _whole(folder, any_shape):
        cls = AutoModelForCausalLM._model_mapping[type(settings)]
        cls.from_pretrained(None, config=settings, state_dict=state, device_map="meta", ignore_mismatched_sizes=True)


def kept_in_fp32(settings: Any, dtype: str, names: Iterable[str]) -> set[str]:
    """Those of a checkpoint's tensors that the model computes with in fp32 though its dtype is another ("bfloat16",
    "float16"), e.g. the biases by which a router chooses experts."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import build_glob_alternation

    with torch.device("meta"), quiet():
        plan = AutoModelForCausalLM.from_config(settings)._get_dtype_plan(getattr(torch, dtype))
    if not plan:
        return set()
    pattern, *_ = build_glob_alternation(list(plan))
    return {name for name in names if pattern.search(name)}


@contextlib.contextmanager
def building(folder: str) -> Iterator[None]:
    """Raises BadInput for a config of which PyTorch can make no layer, such as padding that is not a token."""
    try:
        yield
    except AssertionError as error:
        raise BadInput(
            f"cannot build the model of {folder}: {_first_line(error)}", "correct its config.json"
        ) from error


@contextlib.contextmanager
def _whole(folder: str, any_shape: bool = False, strict: bool = False) -> Iterator[None]:
    """Raises BadInput when transformers, loading a model meanwhile, finds a weight missing or in pieces; where it is
    `strict`, as with what we have quantized ourselves, also when it has no use for one."""
    from unittest import mock

    reports: list[Any] = []

    def note(*_: Any, loading_info: Any, **__: Any) -> None:
        reports.append(loading_info)

    # Patched, because the report says which weights and is lost where loading fails; and it fails for some only.
    with mock.patch("transformers.modeling_utils.log_state_dict_report", note):
        yield
    for report in reports:
        hint = "it is not whole, or its config.json is another model's: copy or download it again"
        if report.error_msgs:
            raise BadInput(f"cannot load {folder}: {report.error_msgs[0]}", hint)
        if lacking := sorted({*report.missing_keys, *report.conversion_errors}):
            raise BadInput(f"the checkpoint {folder} lacks {_some(lacking)}", hint)
        if strict and (unread := sorted(report.unexpected_keys)):
            raise BadInput(f"transformers does not read {_some(unread)} of {folder}", "quantize it by another method")
        for name, have, want in sorted(report.mismatched_keys if not any_shape else ()):
            raise BadInput(f"the checkpoint {folder} has {name} as {list(have)}, its config says {list(want)}", hint)


def positions(model: Any, virtual: int = 0) -> int:
    """How many positions a model has learned, or laid down in a table, less those of `virtual` tokens that stand before
    every prompt; 0 where it has no such bound. Raises BadInput where virtual tokens take them all."""
    import torch

    tables = [
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and re.search(r"wpe|posit", name.rpartition(".")[2])
    ]
    tables += [len(buffer) for name, buffer in model.named_buffers() if name.endswith(".embed_positions")]
    if not tables:
        return 0
    if min(tables) <= virtual:
        raise BadInput(
            f"{virtual} virtual tokens leave no room for a prompt among the {min(tables)} positions of the model",
            "train an adapter with fewer virtual tokens",
        )
    return min(tables) - virtual


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever PEFT raises of an adapter into BadInput, and keep it quiet meanwhile."""
    try:
        with quiet():
            yield
    except BadInput:
        raise
    except (NotImplementedError, AttributeError) as error:
        hint = "serve it unmerged, or train one that can be merged (LoRA)"
        raise BadInput(f"PEFT cannot merge {what}: {_first_line(error)}", hint) from error
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        hint = "check that the adapter was trained on this very base model"
        raise BadInput(f"adapter {what} does not fit the model: {_first_line(error)}", hint) from error


@contextlib.contextmanager
def same_compilers() -> Iterator[None]:
    """Leave CC and CXX as they were. Where PEFT cannot build BOFT's CUDA code it leaves CXX=gcc behind, with which
    TorchInductor's C++ does not link."""
    names = ("CC", "CXX")
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def attach(model: Any, adapter: str, name: str = "default", keep_dtype: bool = False) -> Any:
    """The model with one adapter on it (a PeftModel), every key of the adapter's file accounted for.

    `keep_dtype`: hold the adapter in the model's dtype; otherwise PEFT's default, fp32 where the file is half
    precision. A model whose embeddings are smaller than the adapter's copy of them is resized, as it was in training.
    Raises BadInput for an adapter that is pickled, unreadable, for another base, or not finite: PEFT itself only warns
    of missing and unexpected keys, and loads NaN without a word.
    """
    from peft import PeftModel

    weights = adapter_weights(adapter)
    with refusing(adapter), same_compilers(), _read_once(weights):
        if isinstance(model, PeftModel):
            model.load_adapter(adapter, adapter_name=name, autocast_adapter_dtype=not keep_dtype)
        else:
            _resize(model, weights)
            model = PeftModel.from_pretrained(model, adapter, name, autocast_adapter_dtype=not keep_dtype)
    check_keys(model, adapter, name, weights)
    if keep_dtype:
        # PEFT takes the dtype from the base layer's weight, which for a packed 4-bit layer is not a float type.
        for parameter_name, parameter in model.named_parameters():
            if f".{name}." in parameter_name and parameter.is_floating_point():
                parameter.data = parameter.data.to(model.dtype)
    return model.eval()


@contextlib.contextmanager
def _read_once(weights: dict[str, Any]) -> Iterator[None]:
    """PEFT gets these tensors where it reads an adapter's file, which was read and checked already."""
    from peft.utils import save_and_load

    own = save_and_load.safe_load_file
    save_and_load.safe_load_file = lambda file, device="cpu": {name: w.to(device) for name, w in weights.items()}
    try:
        yield
    finally:
        save_and_load.safe_load_file = own


def _resize(model: Any, weights: dict[str, Any]) -> None:
    rows = {len(value) for key, value in weights.items() if is_embedding(key)}
    if len(rows) == 1 and (size := rows.pop()) != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(size, mean_resizing=False)


def combine(model: Any, names: list[str], weights: list[float], combination: str) -> None:
    """Make several adapters of a PeftModel work as one: their deltas weighted and added ("cat", exact), or by another
    of PEFT's combination types. Raises BadInput for types that PEFT cannot weigh."""
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}
    if any(weight != 1 for weight in weights) or (combination != "cat" and len(names) > 1):
        if kinds != {"LORA"}:
            raise BadInput(f"{kinds.pop()} adapters cannot be weighted", "PEFT weighs LoRA only: leave the weight out")
        layers = [layer for layer in model.modules() if hasattr(layer, "set_scale")]
        if combination == "cat":
            for layer in layers:
                for name, weight in zip(names, weights, strict=True):
                    layer.set_scale(name, weight)
        else:
            extra = {"density": 0.5} if combination.startswith(("ties", "dare", "magnitude")) else {}
            with refusing(", ".join(names)):
                model.base_model.add_weighted_adapter(names, weights, "combined", combination_type=combination, **extra)
            for layer in layers:  # PEFT means 1, and after rsLoRA forgets to say so: it would be the root of the rank
                if "combined" in layer.scaling:
                    layer.scaling["combined"] = 1.0
            names = ["combined"]
    model.base_model.set_adapter(names if len(names) > 1 else names[0])


def adapter_config(adapter: str) -> Any:
    """The adapter's PeftConfig. Raises BadInput for a folder that holds none."""
    from peft import PeftConfig

    if not (Path(adapter) / CONFIG).is_file():
        raise BadInput(f"{adapter} is not an adapter: it has no {CONFIG}", "point at a folder that PEFT saved")
    try:
        return PeftConfig.from_pretrained(adapter)
    except (ValueError, TypeError, KeyError) as error:
        hint = "the adapter may come from a newer PEFT"
        raise BadInput(f"cannot read {adapter}/{CONFIG}: {_first_line(error)}", hint) from error


def adapter_weights(adapter: str) -> dict[str, Any]:
    """The adapter's tensors by name. Raises BadInput for a pickle, a broken file or a value that is not finite."""
    weights = read_tensors(open_adapter(Path(adapter)).folder / WEIGHTS)
    if bad := not_finite(weights):
        raise BadInput(f"adapter {adapter} holds NaN or infinity in {bad}", "its training diverged: train it again")
    return weights


def read_tensors(file: Path) -> dict[str, Any]:
    """All tensors of a safetensors file by name, for files that a server reads again and again. Raises OSError and
    SafetensorError for one that is broken.

    safetensors' readers of files for torch keep two small objects a tensor for good (0.8.0): 26 KB at each load of 420
    tensors. The one of bytes keeps none, and neither does the one of files for numpy.
    """
    from safetensors.torch import load

    tensors: dict[str, Any] = load(file.read_bytes())
    return tensors


def not_finite(tensors: dict[str, Any]) -> str:
    """The name of the first tensor that holds NaN or infinity, "" when all are finite."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            # min and max carry a NaN along; one pass, no mask in memory: 23 times cheaper than isfinite().all()
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                return name
    return ""


def save(model: Any, source: str, out: Path, **settings: Any) -> None:
    """Write a model made from the folder `source`, with that one's tokenizer and generation config.

    transformers would validate the generation config, and refuses many that it reads (a temperature without sampling,
    as Llama 2 has it); nothing of it is changed here, so it is copied, and where there is none none is made up.
    """
    from transformers import GenerationConfig

    with quiet():
        model.generation_config = GenerationConfig()
        model.save_pretrained(out, **settings)
    (out / "generation_config.json").unlink(missing_ok=True)
    copy_extras(source, out)


def copy_extras(source: str, out: Path) -> None:
    """Copy what serving needs beside weights and config, byte for byte: tokenizer, chat template, generation config.

    Saving them through transformers instead would rewrite them, and a changed chat template is a changed model.
    """
    for file in Path(source).iterdir():
        kept = (
            file.suffix not in folders.WEIGHTS and not file.name.endswith(".index.json") and file.name not in OWN_FILES
        )
        if file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, out / file.name, dirs_exist_ok=True)
        elif file.is_file() and kept and not file.name.startswith("."):
            shutil.copyfile(file, out / file.name)


def copy_all_but_weights(source: str, out: Path, quantization: dict[str, str]) -> None:
    """What `copy_extras` copies, and the config with a note of how the weights beside it are quantized."""
    copy_extras(source, out)
    settings = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def brings_tokenizer(adapter: Path) -> bool:
    """Whether an adapter's folder holds a whole tokenizer: the one it was trained with, which then is the model's."""
    names = {file.name for file in adapter.iterdir()} if adapter.is_dir() else set()
    return "tokenizer_config.json" in names and bool(names & {"tokenizer.json", "tokenizer.model", "vocab.json"})


TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"


def brings_template(folder: Path) -> bool:
    """Whether a folder's tokenizer has a chat template: in a file of its own, or as older versions saved it."""
    return (folder / TEMPLATE).is_file() or bool(_inline_template(folder))


def _inline_template(folder: Path) -> Any:
    file = folder / TOKENIZER_CONFIG
    return json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None


def copy_tokenizer(model: Model, out: Path) -> None:
    """Put the tokenizer that an adapter brings in the place of the base's; the base's chat template stays where that
    one has none: training tools save tokenizers without it."""
    home, base = Path(tokenizer_home(model)), Path(model.path)
    if home == base:
        return
    kept = () if brings_template(home) else (TEMPLATE,)
    for name in TOKENIZER_FILES:
        if name in kept:
            continue
        (out / name).unlink(missing_ok=True)
        if (home / name).is_file():
            shutil.copyfile(home / name, out / name)
    if kept and not (out / TEMPLATE).is_file() and (template := _inline_template(base)):
        settings = json.loads((out / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        text = json.dumps({**settings, "chat_template": template}, indent=2, ensure_ascii=False)
        (out / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def carry_tokenizer(model: Model, out: Path) -> None:
    """Put a tokenizer that an adapter brings into the folder that stands in the adapter's place."""
    home = Path(tokenizer_home(model))
    for name in TOKENIZER_FILES if home != Path(model.path) else ():
        if (home / name).is_file():
            shutil.copyfile(home / name, out / name)


def template_home(model: Model) -> str:
    """The folder whose chat template the model is served with: its tokenizer's, or the base's where that has none."""
    home = tokenizer_home(model)
    return home if brings_template(Path(home)) else model.path


def tokenizer_home(model: Model) -> str:
    """The folder whose tokenizer the model is served with: an adapter's where it brings one, else the base's."""
    return next((a for a in reversed(model.adapters) if brings_tokenizer(Path(a))), model.path)


def check_keys(model: Any, adapter: str, name: str, weights: dict[str, Any]) -> None:
    """Raises BadInput when an adapter's file lacks a tensor that its config calls for, or has one too many."""
    from peft import get_peft_model_state_dict

    with refusing(adapter):
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        weights = _as_loaded(model, name, weights)
    # PEFT saves a copy of the embeddings too when they were resized or trained: no adapter key, and no mistake. Of new
    # tokens in embeddings that are tied, it saves both sides' rows and loads one.
    copies = {key for key in weights if is_embedding(key)}
    copies |= _twins({key: value for key, value in weights.items() if key.endswith(NEW_TOKENS)}, expected)
    problems = {
        "lacks": sorted(expected.keys() - weights.keys()),
        "has unknown": sorted(weights.keys() - expected.keys() - copies),
        "has mis-shaped": sorted(k for k in expected.keys() & weights.keys() if expected[k].shape != weights[k].shape),
    }
    for what, keys in problems.items():
        if keys:
            raise BadInput(
                f"adapter {adapter} {what} weights: {_some(keys)}",
                "it was trained on another base model, saved half, or its keys were renamed; save it again with PEFT",
            )


NEW_TOKENS = ".token_adapter.trainable_tokens_delta"


def _twins(rows: dict[str, Any], expected: Mapping[str, Any]) -> set[str]:
    """Those rows of new tokens that are not expected and equal others that are."""
    known = [value for key, value in rows.items() if key in expected]
    return {key for key, value in rows.items() if key not in expected and any(value.equal(one) for one in known)}


def _as_loaded(model: Any, name: str, weights: dict[str, Any]) -> dict[str, Any]:
    """An adapter's tensors by the names that PEFT loads them under: a pair for each expert, as older versions of
    transformers had them, becomes one for all."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as convert

    tensors: dict[str, Any] = convert(model, model.peft_config[name], dict(weights), name)
    return tensors


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
