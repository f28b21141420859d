"""Find mistakes before anything slow starts. Reads headers only, and never imports torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt import corpus, environments, plugins, redaction
from peftopt.corpus import Row
from peftopt.decision import stopping
from peftopt.engines._prefix import repeated
from peftopt.errors import BROKEN, BadInput, MissingEnvironment
from peftopt.merging.baking import check_bakeable
from peftopt.metrics import counted, percent
from peftopt.models import drift, template
from peftopt.models.adapter import (
    CONFIG,
    EMBEDDINGS,
    PREFIX,
    Adapter,
    check_mergeable,
    check_names,
    check_trained_on,
    download_hint,
    is_embedding,
    open_adapter,
    plain_pairs,
    unproven_base,
)
from peftopt.models.baked import check_base as check_prompt_base
from peftopt.models.baked import is_baked, open_baked
from peftopt.models.checkpoint import Checkpoint, open_model
from peftopt.models.folders import WEIGHTS, check_files
from peftopt.models.hf import tokenizer_home
from peftopt.models.prompts import check_engine
from peftopt.models.provenance import read as read_provenance
from peftopt.models.rendering import Refused, Unrendered
from peftopt.models.values import damaged
from peftopt.records import SAFETENSORS, YAML, Json, Model, Quality, Recipe, Step, Variant, task_name


def check(recipe: Recipe) -> None:
    """Raises BadInput for the first mistake in the recipe's files, with what to do, and MissingEnvironment where all
    variants to compare would be `skipped`."""
    _check_secrets(recipe)
    _check_endpoints(recipe)
    transforms = any(variant.steps for variant in recipe.variants.values())
    ours = any(variant.engine.environment == environments.MAIN for variant in recipe.variants.values())
    check_base(Path(recipe.base), quantized=not transforms, ours=ours)
    check_adapter(Path(recipe.adapter), Path(recipe.base), _with(recipe, "merge"), _with(recipe, "bake"))
    _check_training_base(recipe)
    _check_virtual_tokens(recipe)
    _check_folders(recipe)
    _check_drafts(recipe)
    lacking = skipped(recipe)
    _check_rest(recipe, lacking)
    texts = corpus.calibration(recipe.calibration)
    for name, variant in recipe.variants.items():
        if name in lacking:
            continue  # the plug-in's check may need what is missing
        for n, step in enumerate((*variant.steps, variant.engine)):
            check_step(step, Path(recipe.base), variant.steps[:n], texts, f"variant {name}: ")
    _check_template(recipe, texts)
    if recipe.quality:
        rows = corpus.read(recipe.quality.prompts, recipe.quality.slice)
        if recipe.calibration:
            corpus.check_apart(rows, texts, recipe.calibration)
        _check_expected(recipe, rows)
        if recipe.quality.schema:
            schema(recipe.quality.schema)
        _check_tasks(recipe, recipe.quality.tasks)


def _check_secrets(recipe: Recipe) -> None:
    """Raises BadInput for a secret among the parameters: records and command lines show them."""
    for name, variant in recipe.variants.items():
        for step in (*variant.steps, *variant.policies, variant.engine):
            for key, value in step.params.items():
                if isinstance(value, str):
                    redaction.check(value, f"variant {name}: {key} of {step.plugin}")


def _check_virtual_tokens(recipe: Recipe) -> None:
    """Raises BadInput for a variant whose engine cannot put the adapter's virtual tokens before a prompt."""
    for name, variant in recipe.variants.items():
        bakes = [step for step in variant.steps if step.technique == "bake"]
        if any(step.technique == "merge" or step.params.get("target", "ours") != "ours" for step in variant.steps):
            continue  # no adapter is left
        try:
            check_engine(variant.engine.plugin, Path(recipe.adapter), bool(bakes))
        except BadInput as error:
            raise BadInput(f"variant {name}: {error.message}", error.hint) from error


def _check_folders(recipe: Recipe) -> None:
    """Raises BadInput for a parameter that names a folder which is not there."""
    for name, variant in recipe.variants.items():
        for step in (*variant.steps, *variant.policies, variant.engine):
            check_folders(step, f"variant {name}: ")


def check_folders(step: Step, who: str = "") -> None:
    """Raises BadInput for a parameter of a step that names a folder which is not there."""
    for name, folder in plugins.folders(step).items():
        if not folder.is_dir():
            hint = "give the path of a folder; in a recipe, relative to its file"
            raise BadInput(f"{who}{step.plugin}: {name}: there is no folder {folder}", hint)


def _check_drafts(recipe: Recipe) -> None:
    """Raises BadInput for a draft model that is not one, that its variant's engine cannot open, or that has another
    tokenizer than the adapter."""
    for name, variant in recipe.variants.items():
        for step in variant.policies:
            if step.technique == "speculate" and (draft := step.params.get("draft")):
                try:
                    _check_draft(Path(draft), recipe, variant.engine)
                except BadInput as error:
                    raise BadInput(f"variant {name}: draft: {error.message}", error.hint) from error


def _check_draft(draft: Path, recipe: Recipe, engine: Step) -> None:
    plugin, source = plugins.catalogue()[engine.plugin], plugins.module("engine", engine.plugin)
    check_base(draft, quantized=True, weights=plugin.format, ours=engine.environment == environments.MAIN)
    if other := drift.another_tokenizer(_home(recipe), draft):
        hint = "a draft proposes ids of tokens: name a smaller model of the same family, with the same tokenizer"
        raise BadInput(f"{draft} has another tokenizer than the model: {other}", hint)
    if hasattr(source, "check_draft"):
        source.check_draft(Path(recipe.base), draft)


def _check_training_base(recipe: Recipe) -> None:
    """Raises BadInput where merge or bake would use another base than the one the adapter names."""
    asked = [step for v in recipe.variants.values() for step in v.steps if step.technique in ("merge", "bake")]
    if is_baked(Path(recipe.adapter)) or all(step.params.get("allow_base_mismatch") for step in asked):
        return
    base = Path(recipe.base)
    check_trained_on(open_adapter(Path(recipe.adapter)), base, _json(base / "config.json", "a model's config"))


def _with(recipe: Recipe, technique: str) -> list[str]:
    """The variants that have a step of the technique."""
    return [v.name for v in recipe.variants.values() if any(step.technique == technique for step in v.steps)]


def _check_expected(recipe: Recipe, rows: Sequence[Row]) -> None:
    """Raises BadInput where accuracy is required and no prompt has a right answer."""
    asked = next((t for t in recipe.require if t.metric.name == "accuracy"), None)
    if asked and recipe.quality and not any(row.expected for row in rows):
        raise BadInput(
            f"accuracy is required, and none of the {len(rows)} prompts of {recipe.quality.prompts} has a right answer",
            "give each row an `expected` answer (or a last turn of the assistant), or require perplexity instead",
        )


def prompts(recipe: Recipe) -> list[str]:
    """A sentence for each file of prompts: the number of rows, their form, how many have a right answer, and how many
    turns were left out."""
    files = [w.prompts for w in recipe.workloads.values()]
    files += [recipe.quality.prompts] if recipe.quality else []
    lines = []
    for path in dict.fromkeys(files):
        read = corpus.opened(path)
        right = sum(bool(row.expected) for row in read.rows)
        left = f"; {counted(read.empty, 'empty turn')} of the assistant left out" if read.empty else ""
        lines.append(f"{path}: {counted(len(read.rows), 'prompt')} ({read.form}), {right} with a right answer{left}")
    return lines


REPEATS = 0.25
"""The least share of repeated prompt tokens that `repeats` reports."""


def repeats(recipe: Recipe) -> list[str]:
    """A sentence for each workload whose prompts often begin like another prompt of it, as the chat template writes
    them: the repeated share. It is counted in words, which is close enough to tokens."""
    writing, lines = template.read(_home(recipe), Path(recipe.base)), []
    policies = [step.technique for variant in recipe.variants.values() for step in variant.policies]
    for workload in recipe.workloads.values():
        rows = corpus.read(workload.prompts, workload.slice)
        share = repeated([_words(writing, row) for row in rows])
        if share >= REPEATS:
            hint = "" if "prefix" in policies else "; a variant with prefix would reuse their keys and values"
            lines.append(f"workload {workload.name}: {percent(share)} of prompt tokens repeat{hint}")
    return lines


def _words(writing: template.Template, row: Row) -> list[str]:
    """A prompt's words with the spaces before them. If the template refuses it, the words of its messages."""
    try:
        text = writing.render(row.messages, prompt=True) if writing.text else ""
    except (Refused, Unrendered):  # reported elsewhere
        text = ""
    return re.findall(r"\s*\S+", text or "\n".join(message["content"] for message in row.messages))


def _check_template(recipe: Recipe, calibration: Sequence[Row]) -> None:
    """Raises BadInput for prompts that the chat template refuses. A server uses its own template."""
    if all(variant.engine.plugin == "endpoint" for variant in recipe.variants.values()):
        return
    home, base = _home(recipe), Path(recipe.base)
    template.check(home, calibration, answers=True, below=base)
    asked = [(workload.prompts, workload.slice) for workload in recipe.workloads.values()]
    asked += [(recipe.quality.prompts, recipe.quality.slice)] if recipe.quality else []
    for prompts, only in dict.fromkeys(asked):
        template.check(home, corpus.read(prompts, only), below=base)


def _home(recipe: Recipe) -> Path:
    """The folder of the tokenizer and template that the adapter is served with."""
    return Path(tokenizer_home(Model(recipe.base, (recipe.adapter,))))


def warnings(recipe: Recipe) -> list[str]:
    """A sentence for each problem that does not stop a run and spoils its measurements: answers that cannot end, words
    that are not the base's, prompts that a server finds whole."""
    base, home = Path(recipe.base), _home(recipe)
    endless, drifts = template.endless(base, home), drift.drifts(base, home)
    drifted = [drift.described(Path(recipe.adapter), drifts)] if drifts else []
    return [*drifted, *([endless] if endless else []), *_found_whole(recipe)]


def _found_whole(recipe: Recipe) -> Iterator[str]:
    """A sentence for each workload with fewer prompts than a launch asks, if a variant reuses prefixes on a server: its
    own store, other than peftopt's, finds a prompt that is asked again with all its tokens."""
    known = plugins.catalogue()
    servers = [variant for variant in recipe.variants.values() if known[variant.engine.plugin].serves]
    names = [each.name for each in servers if any(policy.technique == "prefix" for policy in each.policies)]
    for workload in recipe.workloads.values() if names else ():
        there = len(corpus.read(workload.prompts, workload.slice))
        block = (recipe.measure.warmup + recipe.timed_requests(workload.name)) * workload.batch
        if (asked := recipe.measure.relaunch * block) > there:
            again = f"workload {workload.name} has {counted(there, 'prompt')}, and a launch asks {asked}"
            bound = f"so the gain of {', '.join(names)} is an upper bound: give it {asked} prompts"
            yield f"{again}: a server finds a repeated prompt whole, {bound}"


def foreseen(recipe: Recipe) -> list[str]:
    """What the recipe cannot decide with its prompts and blocks: see `stopping.undecidable`."""
    return list(stopping.undecidable(recipe, _checked_prompts(recipe.quality)))


def _checked_prompts(quality: Quality | None) -> int:
    """The number of prompts whose answers are checked."""
    if quality is None:
        return 0
    prompts = len(corpus.read(quality.prompts, quality.slice))
    return min(prompts, quality.rows or prompts)


def origins(recipe: Recipe) -> list[str]:
    """A sentence if the adapter names the base of its training, and nothing shows that this base is the same model."""
    adapter, base = Path(recipe.adapter), Path(recipe.base)
    if is_baked(adapter):
        return []
    named = unproven_base(open_adapter(adapter), base, _json(base / "config.json", "a model's config"))
    compared = "only names and shapes of weights could be compared"
    return [f"{adapter} was trained on {named}: make sure that {base} is that model; {compared}"] if named else []


def copies(recipe: Recipe) -> list[str]:
    """A sentence for each file of prompts with copies: a copy does not count again."""
    asked = {(w.prompts, w.slice): f"workload {w.name}" for w in recipe.workloads.values()}
    if recipe.quality:
        asked[recipe.quality.prompts, recipe.quality.slice] = "quality"
    lines = []
    for (prompts, only), who in asked.items():
        rows = corpus.read(prompts, only)
        extra = len(rows) - corpus.distinct(rows)
        if extra:
            lines.append(f"{who}: {extra} of {len(rows)} prompts of {prompts} are copies of others: each counts once")
    return lines


def check_step(step: Step, base: Path, before: Sequence[Step], rows: Sequence[Row], who: str = "") -> None:
    """Ask a plug-in whether it can do its step on this base: see peftopt.transforms."""
    check_folders(step, who)
    source = plugins.module(step.kind, step.plugin)
    if not hasattr(source, "check"):
        return
    try:
        source.check(base, source.Params(**step.params), before, rows)
    except BadInput as error:
        raise BadInput(f"{who}{step.plugin}: {error.message}", error.hint) from error


@dataclass(frozen=True)
class Lack:
    """Why a variant is skipped: the libraries, environments and devices that its steps or its engine need and this
    machine lacks. `hint` says how to install them, "" where nothing helps."""

    why: str
    hint: str

    def __str__(self) -> str:
        return f"{self.why}; {self.hint}" if self.hint else self.why


def skipped(recipe: Recipe) -> dict[str, Lack]:
    """The variants that cannot be measured on this machine, by name."""
    return {name: lack for name, variant in recipe.variants.items() if (lack := _lack(variant))}


def _lack(variant: Variant) -> Lack | None:
    needs: dict[str, None] = {}
    hints: dict[str, None] = {}
    for step in (*variant.steps, variant.engine):
        what, hint = environments.lacking(plugins.catalogue()[step.plugin])
        if what:
            needs[f"{step.plugin} needs {', '.join(what)}"] = None
            hints |= {f"install with: {hint}" if hint.startswith(COMMANDS) else hint: None} if hint else {}
    return Lack("; ".join(needs), "; ".join(hints)) if needs else None


COMMANDS = ("pip ", "peftopt ")
"""The beginnings of hints that install what is missing."""


def check_needs(recipe: Recipe) -> None:
    """Raises MissingEnvironment for everything that the variants of a recipe need and this machine lacks."""
    if lacking := skipped(recipe):
        raise _nothing_here(lacking, "leave those variants out, or run the recipe on a machine that has it")


def _check_rest(recipe: Recipe, lacking: Mapping[str, Lack]) -> None:
    """Raises MissingEnvironment where the baseline would be skipped, or all other variants."""
    others = recipe.variants.keys() - {recipe.baseline}
    if recipe.baseline in lacking:
        raise _nothing_here(lacking, f"without the baseline {recipe.baseline} nothing can be judged")
    if others and others <= lacking.keys():
        raise _nothing_here(lacking, "then there is something to compare with the baseline")


def _nothing_here(lacking: Mapping[str, Lack], why: str) -> MissingEnvironment:
    """The error for variants that this machine cannot run; each lack is named once."""
    by_lack: dict[str, list[str]] = {}
    for name, lack in lacking.items():
        by_lack.setdefault(lack.why, []).append(name)
    lacks = "; ".join(f"{what} (variant {', '.join(names)})" for what, names in by_lack.items())
    hints = dict.fromkeys(lack.hint for lack in lacking.values() if lack.hint)
    return MissingEnvironment(f"not on this machine: {lacks}", "; ".join([*hints, why]))


def _check_tasks(recipe: Recipe, tasks: Sequence[str]) -> None:
    """Raises an error unless lm-evaluation-harness is there for each engine, and each task file has its task's name."""
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingEnvironment(
            "quality.tasks needs lm-evaluation-harness, which is not installed", "pip install 'peftopt[eval]'"
        )
    for name, variant in recipe.variants.items():
        environment = variant.engine.environment
        if environment != environments.MAIN:
            raise BadInput(
                f"quality.tasks cannot run on variant {name}: its engine runs in the environment {environment}",
                "measure tasks in a recipe whose variants run on eager or compiled",
            )
    for task in (t for t in tasks if t.endswith(YAML)):
        try:
            line = re.search(r"^task:\s*['\"]?([^'\"\s#]+)", Path(task).read_text(encoding="utf-8"), re.MULTILINE)
        except (OSError, UnicodeError) as error:
            raise BadInput(f"cannot read the task file {task}: {error}", "give the path of its YAML file") from error
        if not line or line[1] != task_name(task):
            problem = f"names its task {line[1]}" if line else "names no task"
            raise BadInput(f"{task} {problem}", f"write task: {task_name(task)} into it, as the file is called")


def _check_endpoints(recipe: Recipe) -> None:
    """Raises BadInput for a variant on a server without a URL, and for its CPU time, which is not known here."""
    for name, variant in recipe.variants.items():
        if variant.engine.plugin != "endpoint":
            continue
        if not variant.engine.params["url"]:
            raise BadInput(
                f"variant {name} names no server", "write {engine: {endpoint: {url: http://localhost:8000}}}"
            )
        if recipe.measure.clock == "cpu":
            raise BadInput(
                f"variant {name} runs on a server, whose CPU time is not known here", "write measure: {clock: wall}"
            )


def schema(path: str) -> Mapping[str, Json]:
    """The JSON schema (draft 2020-12) in a file. Raises BadInput for a file that holds none."""
    import jsonschema

    value = _json(Path(path), "a JSON schema")
    try:
        jsonschema.Draft202012Validator.check_schema(value)
    except jsonschema.SchemaError as error:
        raise BadInput(f"{path} is not a JSON schema: {error.message}", "see json-schema.org, draft 2020-12") from error
    return value


def check_base(folder: Path, quantized: bool = False, weights: str = SAFETENSORS, ours: bool = True) -> None:
    """Raises BadInput unless the folder holds a causal language model with weights of that format, without code of its
    own and, unless `quantized` is set, not quantized. `ours`: an engine of this environment opens it, so the library
    that reads its weights must be installed."""
    if not folder.is_dir():
        hint = download_hint(folder) or "name a folder with config.json and safetensors"
        raise BadInput(f"no model folder at {folder}", hint)
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} is not a model: it has no config.json", "give the folder that save_pretrained wrote")
    check_files(folder, but=WEIGHTS)
    config = _json(folder / "config.json", "a model's config")
    with _readable(folder / "config.json", "a model's config"):
        if "auto_map" in config:
            raise BadInput(
                f"{folder} brings its own code (auto_map)", "peftopt runs only architectures of transformers"
            )
        settings = config.get("quantization_config")
        if settings:
            method = settings.get("quant_method", "unknown")
            if not quantized:
                raise BadInput(f"{folder} is already quantized ({method})", "start from the full-precision base")
            if ours:
                _check_reader(folder, method)
        _check_architecture(folder, config)
    _check_format(folder, weights)
    if weights == SAFETENSORS:
        open_model(folder)


def _check_architecture(folder: Path, config: Json) -> None:
    names = config.get("architectures") or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        what = ", ".join(names) or "none named"
        raise BadInput(
            f"{folder} is not a causal language model (architectures: {what})",
            "its config.json must name a …ForCausalLM",
        )


def _check_format(folder: Path, weights: str) -> None:
    """Raises BadInput for a folder with the weights of another format."""
    for plugin in plugins.catalogue().values():
        if not plugin.weights:
            continue
        there = (folder / plugin.weights).is_file()
        if plugin.format == weights and not there:
            hint = f"make one: peftopt quantize --method {plugin.name} --model {folder} --out …"
            raise BadInput(f"{folder} holds no {plugin.weights}", hint)
        if plugin.format != weights and there and not list(folder.glob("*.safetensors")):
            hint = f"use --engine {plugin.reader}"
            raise BadInput(f"{folder} holds {plugin.format} weights, not {weights}", hint)


READERS = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "compressed-tensors": ("compressed_tensors",),
}
"""The modules with which transformers reads each kind of quantized weights."""

INSTALL = {
    "gptqmodel": "pip install 'gptqmodel>=7' (where its torch is not yours: with --no-deps --no-build-isolation, see "
    "docs/decisions/quantizers.md)",
}


def _check_reader(folder: Path, method: str) -> None:
    """Raises MissingEnvironment for quantized weights whose reader is not installed."""
    lacking = [name for name in READERS.get(method, ()) if importlib.util.find_spec(name) is None]
    if lacking:
        hint = "; ".join(INSTALL.get(name, f"pip install {name.replace('_', '-')}") for name in lacking)
        what = f"{folder} holds {method} weights, which transformers reads through {' and '.join(lacking)}"
        raise MissingEnvironment(f"{what}: not installed", hint)


def quantized(folder: Path) -> bool:
    """Whether the weights are quantized, as the config says."""
    return "quantization_config" in _json(folder / "config.json", "a model's config")


def quantized_elsewhere(folder: Path) -> bool:
    """Whether another tool than peftopt quantized the weights: then it is not verified that they are read correctly."""
    return quantized(folder) and not read_provenance(folder)


def check_adapter(folder: Path, base: Path | None, merges: Sequence[str] = (), bakes: Sequence[str] = ()) -> None:
    """Raises BadInput unless the folder holds a PEFT adapter in safetensors whose shapes fit this base, or a prompt
    baked from it. With variants in `merges` or `bakes`, merge or bake must be able to take the adapter. `base` is None
    where names and shapes of its weights cannot be compared with an adapter's."""
    if is_baked(folder):
        prompt = open_baked(folder)
        if merges:
            raise BadInput(f"{folder} is a baked prompt, which has no weight delta", "take `merge` out")
        if bakes:
            raise BadInput(f"{folder} is baked already", "take `bake` out, or name the adapter that it was baked from")
        if base:
            check_prompt_base(prompt, base)
        return
    with _readable(folder / CONFIG, "an adapter's config"):
        adapter = open_adapter(folder)
        if merges:
            check_mergeable(adapter)
        if bakes:
            check_bakeable(adapter)
        if adapter.kind == "POLY":
            what = "needs the number of a task with every request, which no engine here gives it"
            raise BadInput(f"adapter {folder} (POLY) {what}", "train an adapter for each task, such as a LoRA")
        if base and adapter.kind == "LORA" and not adapter.config.get("target_parameters"):
            _check_fits(adapter, base)
        if adapter.kind == "LORA":
            plain_pairs(adapter)  # config and weights agree in ranks and modules
    check_values(folder, adapter.weights)


def check_weights(base: Path) -> None:
    """The same for a base, every byte of which is read. Scales of quantized weights know other sizes."""
    if not quantized(base):
        check_values(base, open_model(base), "its file is damaged: copy or download it again")


def check_values(
    folder: Path,
    weights: Checkpoint,
    hint: str = "its file is damaged, or its training diverged: copy or train it again",
) -> None:
    """Raises BadInput for weights that no training produces: see models/values.py."""
    with weights:
        if problem := next(damaged(weights), ""):
            raise BadInput(f"{folder}: {problem}", hint)


def _check_fits(adapter: Adapter, base: Path) -> None:
    """Raises BadInput where a LoRA pair does not fit a weight of the base: then it was trained on another base.

    Compares only if base and adapter use the same names: a checkpoint may use older names, which the loader translates.
    """
    entries = open_model(base).entries
    # packed by bitsandbytes: the shape is not the layer's
    packed = {name for name in entries if f"{name}.absmax" in entries}
    weights = {name: list(entry.shape) for name, entry in entries.items() if name not in packed}
    check_names(adapter, entries)
    brought = any(is_embedding(name) for name in adapter.weights.entries)
    trained_on = adapter.config.get("base_model_name_or_path") or "an unnamed base"
    advice = f"it says it was trained on {trained_on}; give that base"
    sides = [(*_side(entry.name), list(entry.shape)) for entry in adapter.weights.entries.values()]
    sides = [(module, side, shape) for module, side, shape in sides if side in ("A", "B") and len(shape) == 2]
    alike = any(f"{module}.weight" in weights for module, _, _ in sides)
    for module, side, shape in sides if alike else ():
        target = weights.get(f"{module}.weight")
        if target is None and f"{module}.weight" not in packed and not module.endswith(EMBEDDINGS):
            raise BadInput(f"adapter {adapter.folder} does not fit {base}: the base has no {module}", advice)
        if target and shape[1 if side == "A" else 0] not in target:
            if module.endswith(EMBEDDINGS) and side == "B":
                if brought:
                    continue
                raise BadInput(
                    f"adapter {adapter.folder} was trained on {shape[0]} words, and {base} has {target[0]}: tokens "
                    "were added, and the adapter does not bring their embeddings",
                    "save it with save_embedding_layers=True, or resize the base as in training and save it",
                )
            raise BadInput(
                f"adapter {adapter.folder} does not fit {base}: {module} is {target} there and lora_{side} is {shape}",
                advice,
            )


def _side(key: str) -> tuple[str, str]:
    """The module and "A" or "B" of a LoRA tensor's name."""
    module, _, part = key.removeprefix(PREFIX).partition(".lora_")
    return module, part.split(".")[0]


@contextlib.contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Raises BadInput where the file's values have the wrong types."""
    try:
        yield
    except BROKEN as error:
        raise BadInput(f"{path} cannot be read as {what}: {error!r}", "restore the file") from error


def _json(path: Path, what: str) -> dict[str, Json]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *BROKEN) as error:
        raise BadInput(f"{path} cannot be read as {what}: {error}", "restore the file") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} cannot be read as {what}: not a JSON object", "restore the file")
    return value
