"""The facts for a first recipe, from a user's folders, prompts and machine."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from peftopt import corpus, machine, store
from peftopt.errors import BadInput
from peftopt.merging.baking import check_bakeable
from peftopt.models.adapter import PROMPTS, Adapter, check_mergeable, open_adapter
from peftopt.models.baked import is_baked
from peftopt.models.checkpoint import open_model
from peftopt.models.hf import tokenizer, tokenizer_home
from peftopt.recipe.starter import Facts
from peftopt.records import Model, Recipe
from peftopt.runner import preflight


def facts(base: Path, adapter: Path, prompts: Path, file: Path) -> Facts:
    """The facts for a recipe in `file`. Raises BadInput for a base, an adapter or prompts that cannot be used."""
    preflight.check_base(base, quantized=True)
    preflight.check_adapter(adapter, None if preflight.quantized(base) else base)
    rows = corpus.read(str(prompts))
    model = Model(str(base), (str(adapter),))
    words = tokenizer(tokenizer_home(model), model.path)
    method, why = _method(adapter, preflight.quantized(base))
    answers = [row.expected for row in rows if row.expected]

    def named(path: Path) -> str:
        return str(path) if path.is_absolute() else os.path.relpath(path, file.parent)

    return Facts(
        base=named(base),
        adapter=named(adapter),
        prompts=named(prompts),
        method=method,
        why=why,
        distinct=corpus.distinct(rows),
        answer_tokens=[len(words(answer, add_special_tokens=False).input_ids) + 1 for answer in answers],
        base_bytes=store.size(base),
        memory_bytes=machine.free_memory(),
        gpu=", ".join(machine.gpus()),
        widen=_slow(base),
    )


WORTH = {
    "bake": "would compute the adapter's virtual tokens once",
    "merge": "would remove the adapter's cost per token, if the adapter need not be switched",
}
"""The benefit of a variant with the technique."""


def proposals(recipe: Recipe) -> list[str]:
    """Sentences for what the adapter and this machine allow and no variant has: bake for virtual tokens, else merge; a
    merge in fp32 where the processor is slow at the base's dtype."""
    adapter = Path(recipe.adapter)
    method = "" if is_baked(adapter) else _method(adapter, preflight.quantized(Path(recipe.base)))[0]
    steps = [step for variant in recipe.variants.values() for step in variant.steps]
    if method and method not in {step.technique for step in steps}:
        return [f"no variant has {method}: [{method}] {WORTH[method]}"]
    if method == "merge" and not any(step.params.get("dtype") == "fp32" for step in steps) and _slow(Path(recipe.base)):
        return [f"no variant is in fp32: {FP32}"]
    return []


FP32 = (
    "this processor has no instructions for the base's dtype, and converts every number before it multiplies; "
    "[{merge: {dtype: fp32}}] would take less time for prompts, perhaps more for answers, and twice the memory"
)


def _slow(base: Path) -> bool:
    """Whether this machine has no GPU, and its processor no instructions for the base's dtype, that of most bytes."""
    if machine.gpus() or preflight.quantized(base):
        return False
    sizes: Counter[str] = Counter()
    with open_model(base) as model:
        for entry in model.entries.values():
            sizes[entry.dtype] += entry.nbytes
    return not machine.multiplies(sizes.most_common(1)[0][0])


def _method(adapter: Path, quantized: bool) -> tuple[str, str]:
    """The technique that removes this adapter's cost, "" for none, and why there is none."""
    opened = open_adapter(adapter)
    if opened.kind in PROMPTS:
        return _bakeable(opened)
    if quantized:
        return "", "The base is quantized already: a merge into it would round most of the adapter away."
    try:
        check_mergeable(opened)
    except BadInput as error:
        return "", error.message
    return "merge", ""


def _bakeable(opened: Adapter) -> tuple[str, str]:
    try:
        check_bakeable(opened)
    except BadInput as error:
        return "", error.message
    return "bake", ""
