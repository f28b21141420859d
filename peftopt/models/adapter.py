"""What a PEFT adapter folder holds, checked without torch or PEFT: its config, its tensors, and what it can become."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from peftopt import identity
from peftopt.errors import BadInput
from peftopt.models.checkpoint import ADAPTER, Checkpoint, Entry, alike, open_model
from peftopt.models.folders import check_files
from peftopt.records import Json

WEIGHTS, CONFIG = "adapter_model.safetensors", ADAPTER
PREFIX = "base_model.model."

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")
"""PEFT types that put virtual tokens, or their keys and values, before every sequence."""

NO_DELTA = {
    **dict.fromkeys(
        PROMPTS,
        "it adds virtual tokens or key-value pairs to every sequence and has no weight delta",
    ),
    "ADAPTION_PROMPT": "it adds gated prompt tokens inside the attention and has no weight delta",
    **dict.fromkeys(
        ("XLORA", "POLY", "LILY", "SHADOW"), "its delta depends on the input, so there is no one weight to fold in"
    ),
}
"""PEFT types that cannot be folded into weights, and why."""

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "true", "True")
"""Values of `init_lora_weights` that leave the base weights as they were; the others (PiSSA, OLoRA, CorDA, LoftQ, …)
change the base, so that an adapter saved unconverted is a delta to weights which nobody has."""


EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "lm_head", "embed_out")
"""What input and output embeddings are called; PEFT saves a copy of them when they were resized or trained."""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: `config` is its adapter_config.json, `weights` its tensors; `weight` scales its delta."""

    folder: Path
    config: Mapping[str, Json]
    weights: Checkpoint
    weight: float = 1.0

    @property
    def kind(self) -> str:
        """Its PEFT type, in PEFT's capitals: "LORA"."""
        return str(self.config.get("peft_type", "unknown")).upper()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of its weights' file. Raises BadInput for one that is not what was downloaded."""
        return identity.of_download(self.folder / WEIGHTS)


def download_hint(folder: Path) -> str:
    """What to do for a path that is not a folder and looks like a name on the hub, such as org/model; "" for others."""
    parts = folder.parts
    if len(parts) == 2 and not folder.is_absolute() and not Path(parts[0]).exists() and parts[0] not in (".", ".."):
        return f"if it is a name on the hub, download it first: hf download {folder} --local-dir {parts[1]}"
    return ""


def check_names(adapter: Adapter, base: Mapping[str, object]) -> None:
    """Raises BadInput when the adapter's modules are the base's but for what stands before them, and when it adapts
    some experts of a layer only. `base` holds the names of the base's tensors."""
    modules = {
        name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in adapter.weights.entries if ".lora_" in name
    }
    if not modules or any(f"{module}.weight" in base for module in modules):
        _check_experts(adapter, modules, base)
        return
    first = min(modules)
    ends = [name.removesuffix(f"{first}.weight") for name in base if name.endswith(f".{first}.weight")]
    for front in ends:
        if all(f"{front}{module}.weight" in base for module in modules):
            task = adapter.config.get("task_type") or "none"
            raise BadInput(
                f"adapter {adapter.folder} names {first}, and the base {front}{first}: it was trained on the model "
                f"without its head (task_type {task})",
                f"train it on AutoModelForCausalLM, or put {front} behind {PREFIX} in its names",
            )


EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


def _check_experts(adapter: Adapter, modules: Iterable[str], base: Mapping[str, object]) -> None:
    """PEFT loads a pair for each expert as one for all of them, and so needs all."""
    adapted: dict[tuple[str, str], set[str]] = {}
    for match in filter(None, map(EXPERT.fullmatch, modules)):
        adapted.setdefault((match[1], match[3]), set()).add(match[2])
    there: dict[tuple[str, str], set[str]] = {}
    for match in filter(None, (EXPERT.fullmatch(name.removesuffix(".weight")) for name in base)) if adapted else ():
        there.setdefault((match[1], match[3]), set()).add(match[2])
    for (front, back), numbers in sorted(adapted.items()):
        if lacking := sorted(there.get((front, back), set()) - numbers, key=int):
            raise BadInput(
                f"adapter {adapter.folder} adapts some of the experts only: {front}{lacking[0]}{back} has no LoRA, "
                "which PEFT cannot load since transformers holds all experts of a layer as one weight",
                "add pairs of zeros for the other experts, or train all of them",
            )


def open_adapter(folder: Path, weight: float = 1.0) -> Adapter:
    """Read the config and the headers. Raises BadInput for what is not an adapter, a pickle, or a link to elsewhere."""
    if not folder.is_dir():
        raise BadInput(f"no adapter folder at {folder}", download_hint(folder) or f"name a folder with {CONFIG}")
    if not (folder / CONFIG).is_file():
        hint = "give the folder that PEFT saved"
        if below := sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}")):
            hint = f"give one of those inside it: {', '.join(below)}"
        raise BadInput(f"{folder} is not an adapter: it has no {CONFIG}", hint)
    check_files(folder)
    config = _config(folder / CONFIG)
    file = folder / WEIGHTS
    if not file.is_file():
        raise _without_weights(folder)
    _check_config(folder, config)
    adapter = Adapter(folder, config, Checkpoint([file]), weight)
    _check_tensors(adapter)
    return adapter


def _config(file: Path) -> dict[str, Json]:
    hint = "restore it"
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):  # which PEFT does not read either
            hint = "save it as UTF-8 without a byte order mark"
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read as an adapter's config: {error}", hint) from error
    return config


def _without_weights(folder: Path) -> BadInput:
    """What to say of an adapter's folder that has no WEIGHTS, by what lies there instead."""
    if list(folder.glob("adapter_model.bin")) + list(folder.glob("*.pt")):
        return BadInput(
            f"adapter {folder} is pickled (adapter_model.bin), which is never opened: it could run code",
            "load it where you trust it and save it again with save_pretrained(..., safe_serialization=True)",
        )
    if (folder / "adapters.safetensors").is_file():
        return BadInput(
            f"adapter {folder} is one of MLX (adapters.safetensors), not of PEFT",
            "merge it with mlx_lm.fuse, or convert it to PEFT's names",
        )
    if shards := sorted(folder.glob("adapter_model-*-of-*.safetensors")):
        return BadInput(
            f"adapter {folder} is in {len(shards)} shards ({shards[0].name}, …), and PEFT reads one {WEIGHTS}",
            f"join them: load each with safetensors and save all their tensors as one {WEIGHTS}",
        )
    return BadInput(f"adapter {folder} has no {WEIGHTS}", "copy the weights next to its config")


NUMBERS = ("r", "lora_alpha")


def _check_config(folder: Path, config: Mapping[str, Json]) -> None:
    """Raises BadInput for a type that PEFT does not know, and for ranks or scales that are negative or no numbers."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Z0-9_]+", kind):
        name = str(kind or "").rpartition(".")[2].upper()
        hint = f'write "peft_type": "{name or "LORA"}", as PEFT does'
        raise BadInput(f"{folder / CONFIG}: peft_type is {json.dumps(kind)}, which is not a type of PEFT's", hint)
    if kind != "LORA":
        return
    values = {name: config[name] for name in NUMBERS if name in config}
    for pattern in ("rank_pattern", "alpha_pattern"):
        values |= {f"{pattern} of {key}": value for key, value in (config.get(pattern) or {}).items()}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInput(
                f"{folder / CONFIG}: {name} is {json.dumps(value)}, not a number", "write what it was trained with"
            )
        if not 0 <= value < math.inf:
            what = "which would turn the adapter around" if value < 0 else "which is not finite"
            raise BadInput(
                f"{folder / CONFIG}: {name} is {json.dumps(value)}, {what}", "write what it was trained with"
            )


WRAPPERS = {
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_orig_mod": "torch.compile",
}
"""What training wraps modules into, as it shows in names that were saved without unwrapping."""


def _check_tensors(adapter: Adapter) -> None:
    """Raises BadInput for a file without tensors, for empty ones, and for names of a wrapped model."""
    entries = adapter.weights.entries
    if not entries:
        raise BadInput(f"adapter {adapter.folder} holds no tensors", "save it again from the process that has them")
    if empty := [name for name, entry in entries.items() if not entry.items]:
        raise BadInput(
            f"adapter {adapter.folder}: {empty[0]} is empty, as are {len(empty) - 1} more"
            if len(empty) > 1
            else f"adapter {adapter.folder}: {empty[0]} is empty",
            "it was saved under ZeRO-3 or FSDP without gathering: save it again with the parameters gathered",
        )
    for name in entries:
        for part in name.split("."):
            if part in WRAPPERS:
                raise BadInput(
                    f"adapter {adapter.folder} was saved from inside {WRAPPERS[part]}: {name} holds {part}",
                    f"unwrap the model before saving, or take {part}. out of the names",
                )


COPIES = (".base_layer", ".modules_to_save", ".original_module", ".token_adapter")
"""Parts of PEFT's wrappers around an embedding, under which it saves copies of the weight that was resized."""


def is_embedding(key: str) -> bool:
    """Whether an adapter's key is a whole copy of an embedding's weight."""
    module = key.removesuffix(".weight")
    while ending := next((part for part in COPIES if module.endswith(part)), ""):
        module = module.removesuffix(ending)
    return key.endswith(".weight") and module.rpartition(".")[2] in EMBEDDINGS


def check_mergeable(adapter: Adapter) -> None:
    """Raises BadInput for an adapter that has no one weight delta: what it is, why, and what to do instead."""
    config, kind = adapter.config, adapter.kind
    reason = NO_DELTA.get(kind, "")
    init = config.get("init_lora_weights", True)
    if config.get("alora_invocation_tokens"):
        reason = "an aLoRA works only after its invocation tokens, so its delta depends on the input"
    elif config.get("arrow_config"):
        reason = "Arrow routes each token to other experts, so its delta depends on the input"
    elif config.get("layer_replication"):
        reason = "its replicated layers share base weights but have deltas of their own, and PEFT merges them wrongly"
    if reason:
        hint = (
            "serve it unmerged (what that costs, `peftopt run` measures) and take `merge` out of this variant; "
            "quantizing or compiling the base still helps"
        )
        if kind in PROMPTS:
            hint = "bake it: put `bake` where `merge` is, after a quantizer; peftopt bake does it outside a recipe"
        raise BadInput(f"adapter {adapter.folder} ({kind}) cannot be merged: {reason}", hint)
    if kind == "LORA" and not any(init is plain or init == plain for plain in PLAIN_INITS):
        raise BadInput(
            f"adapter {adapter.folder} was saved unconverted after {init!r} initialisation: its delta is to base "
            "weights that the initialisation changed, not to the ones on disk",
            "convert it where it was trained: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )


def task_of(config: Mapping[str, Json], task: int) -> int | None:
    """The task whose prompt a multitask adapter gives, by its number; None for other adapters. `task` is what the user
    named, -1 for nothing. Raises BadInput for a task that there is not, and for a multitask adapter without one."""
    kind = str(config.get("peft_type", "")).upper()
    if kind != "MULTITASK_PROMPT_TUNING":
        if task >= 0:
            raise BadInput(f"a {kind} adapter has no tasks, and task {task} is asked for", "leave the task out")
        return None
    tasks = int(config.get("num_tasks") or 1)
    if task < 0 and tasks == 1:
        return 0
    if not 0 <= task < tasks:
        what = f"task {task}" if task >= 0 else "no task"
        raise BadInput(
            f"the adapter has prompts for {tasks} tasks, and {what} is named",
            f"name one of 0 to {tasks - 1}: --task of peftopt bake, or engine: {{eager: {{task: 0}}}} in a recipe",
        )
    return task


def check_trained_on(adapter: Adapter, folder: Path, config: Mapping[str, Json]) -> None:
    """Raises BadInput when what the adapter says of its base contradicts the base: class, name, revision or weights.

    Names and revisions are compared where the base is known by name, in the hub's cache layout; weights, by samples,
    where the adapter names a folder that is here and is not packed.
    """
    trained = adapter.config
    mapping = trained.get("auto_mapping") or {}
    wanted, architectures = mapping.get("base_model_class"), config.get("architectures") or []
    problems = []
    if wanted and architectures and wanted not in architectures:
        problems.append(f"was trained on a {wanted}, and the base is a {architectures[0]}")
    home = folder.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        name = home.parent.parent.name.removeprefix("models--").replace("--", "/")
        trained_on = str(trained.get("base_model_name_or_path") or name)
        if trained_on != name and not Path(trained_on).exists():
            problems.append(f"was trained on {trained_on}, and the base is {name}")
        revision = trained.get("revision")
        if revision and re.fullmatch(r"[0-9a-f]{7,40}", revision) and not home.name.startswith(revision):
            problems.append(f"was trained on revision {revision}, and the base is {home.name}")
    other = Path(str(trained.get("base_model_name_or_path") or ""))
    if (other / "config.json").is_file() and other.resolve() != home:
        settings = json.loads((other / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        if not settings:
            with open_model(other) as theirs, open_model(folder) as ours:
                if not alike(theirs, ours):
                    problems.append(f"was trained on {other}, whose weights are not those of {folder}")
    if problems:
        hint = "give the base it was trained on; --allow-base-mismatch takes this one all the same"
        raise BadInput(f"adapter {adapter.folder} {problems[0]}", hint)


def unproven_base(adapter: Adapter, folder: Path, config: Mapping[str, Json]) -> str:
    """The base that an adapter says it was trained on, where neither the base's folder nor its config has that name,
    and no folder of that name is here to compare weights with; "" elsewhere."""
    trained_on = str(adapter.config.get("base_model_name_or_path") or "")
    if not trained_on or Path(trained_on).exists():
        return ""
    names = [str(folder.resolve()).replace("--", "/"), str(config.get("_name_or_path") or "")]
    wanted = _letters(trained_on.rstrip("/").rpartition("/")[2])
    return "" if any(wanted in map(_letters, name.split("/")) for name in names) else trained_on


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# ---- plain LoRA ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One module's LoRA: delta = scale * B A, with A [r, in] and B [out, r] (arXiv:2106.09685, 4.1)."""

    adapter: Adapter
    a: Entry
    b: Entry
    scale: float


NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
    "megatron_config",
    "layers_to_transform",
    "exclude_modules",
    "monteclora_config",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "fan_in_fan_out",
)
"""LoRA settings that change the mathematics, or which weights are touched: PEFT's own code handles those."""


def plain_pairs(adapter: Adapter) -> dict[str, Pair] | None:
    """Module name -> its LoRA pair when this is plain LoRA on linear layers and nothing else; None otherwise.

    Raises BadInput when the tensors and the config contradict each other in a rank or in the targeted modules.
    """
    config = adapter.config
    if adapter.kind != "LORA" or any(config.get(key) for key in NOT_PLAIN) or config.get("bias", "none") != "none":
        return None
    sides: dict[str, dict[str, Entry]] = {}
    for name, entry in adapter.weights.entries.items():
        module, dot, side = name.removeprefix(PREFIX).rpartition(".lora_")
        if not name.startswith(PREFIX) or not dot or side not in ("A.weight", "B.weight") or len(entry.shape) != 2:
            return None
        sides.setdefault(module, {})[side[0]] = entry
    if not sides or any(len(pair) != 2 for pair in sides.values()):
        return None  # half a pair: the way through PEFT names the missing key
    pairs = {}
    for module, pair in sides.items():
        rank = pair["A"].shape[0]
        configured = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        if pair["B"].shape[1] != rank:
            return None
        if rank != configured:
            raise BadInput(
                f"adapter {adapter.folder}: {module} has rank {rank} in the weights and r: {configured} in {CONFIG}",
                "the config was edited or belongs to another adapter; restore it",
            )
        if not targets(config, module):
            if config.get("target_modules") is None:
                names = json.dumps(sorted({module.rpartition(".")[2] for module in sides}))
                raise BadInput(
                    f"{adapter.folder / CONFIG} has no target_modules, and the weights are for {module}",
                    f'write what was trained: "target_modules": {names}',
                )
            raise BadInput(
                f"adapter {adapter.folder} has weights for {module}, which target_modules does not name",
                "the config was edited or belongs to another adapter; restore it",
            )
        scale = adapter.weight * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[module] = Pair(adapter, pair["A"], pair["B"], scale)
    return pairs


def highest_rank(config: Mapping[str, Json]) -> int:
    """The highest rank of a LoRA's pairs, those of its rank_pattern among them; 0 for other kinds of adapters."""
    return max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])


def targets(config: Mapping[str, Json], module: str) -> bool:
    """Whether `target_modules` names this module, as PEFT matches it: a pattern, or the end of a dotted name."""
    wanted = config.get("target_modules")
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted or ())


def _by_pattern(patterns: Mapping[str, Json] | None, module: str, default: Json) -> Json:
    """PEFT's rank_pattern and alpha_pattern: the first key that matches a whole end of the dotted name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
