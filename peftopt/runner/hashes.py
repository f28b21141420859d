"""Content hashes of a run's inputs: base, adapter, tokenizer, prompts. A gate compares two runs by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from peftopt import identity, plugins, store
from peftopt.gate.records import Hashes
from peftopt.measurements import structured
from peftopt.models import checkpoint, hf
from peftopt.recipe.plan import FOLDER
from peftopt.records import YAML, Model, Quality, Recipe, Variant, Workload

FILE = "hashes.json"
"""The file of a run's folder with the hashes."""

NOT_ASKED = ("batch", "rows")
"""Settings of `quality` that change no prompt: the answers tell which rows were asked."""


def of(recipe: Recipe, sources: Mapping[str, str]) -> Hashes:
    """The hashes of a recipe's files as they are now. `sources` has the known hashes of its base, its adapter, and the
    folders that its parameters name."""
    named = {f"{name}.{where}": f for name, v in recipe.variants.items() for where, f in folders(v).items()}
    return Hashes(
        base=sources["base"],
        adapter=sources["adapter"],
        adapter_shape=_shape(Path(recipe.adapter)),
        tokenizer=_tokenizer(Model(recipe.base, (recipe.adapter,))),
        answers=_answers(recipe.quality) if recipe.quality else "",
        workloads={name: _workload(each, recipe) for name, each in recipe.workloads.items()},
        folders={where: sources[f"{FOLDER}{folder}"] for where, folder in named.items()},
    )


def folders(variant: Variant) -> dict[str, Path]:
    """The folders that a variant's parameters name, by step and parameter: "speculate.draft"."""
    steps = (*variant.steps, *variant.policies, variant.engine)
    return {f"{s.plugin}.{name}": folder for s in steps for name, folder in plugins.folders(s).items()}


def read(folder: Path) -> Hashes | None:
    """The hashes in a run's folder; None for a run of an older peftopt, and for imported measurements. Raises BadInput
    for a damaged file."""
    file = folder / FILE
    if not file.exists():
        return None
    return structured(Hashes, store.read_object(file), "hashes")


def _shape(adapter: Path) -> str:
    """The hash of the tensors' names, dtypes and shapes; without safetensors, the hash of the configuration."""
    files = sorted(adapter.glob("*.safetensors"))
    if not files:
        config = adapter / "adapter_config.json"
        return identity.of_file(config) if config.exists() else ""
    entries = [entry for file in files for entry in checkpoint.read_header(file)[0]]
    return identity.of_value(sorted([entry.name, entry.dtype, list(entry.shape)] for entry in entries))


def _tokenizer(model: Model) -> str:
    """The hash of the files that turn a chat into tokens, wherever they lie."""
    home = Path(hf.tokenizer_home(model))
    files = {home / name for name in hf.TOKENIZER_FILES} | {Path(hf.template_home(model)) / hf.TEMPLATE}
    return identity.of_value(sorted([file.name, identity.of_file(file)] for file in files if file.is_file()))


def _answers(quality: Quality) -> str:
    settings = {name: value for name, value in asdict(quality).items() if name not in NOT_ASKED}
    tasks = [identity.of_file(Path(task)) if task.endswith(YAML) else task for task in quality.tasks]
    schema = identity.of_file(Path(quality.schema)) if quality.schema else ""
    files = {"prompts": identity.of_file(Path(quality.prompts)), "schema": schema, "tasks": tasks}
    return identity.of_value(settings | files)


def _workload(workload: Workload, recipe: Recipe) -> str:
    settings = asdict(workload) | {"prompts": identity.of_file(Path(workload.prompts))}
    return identity.of_value(settings | {"requests": recipe.timed_requests(workload.name)})
