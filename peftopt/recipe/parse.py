"""Recipe text -> Recipe: the sections of a recipe and what each key means. Pure."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from peftopt.errors import BadRecipe
from peftopt.recipe import thresholds
from peftopt.recipe.reader import (
    Reader,
    Reading,
    Wrong,
    filled,
    nearest,
    or_off,
    quantity,
    scalar,
    share,
    show,
    text_of,
    typed,
    whole,
    words,
)
from peftopt.recipe.sections import Limit, Rows, Sections, Sources, check, check_formats
from peftopt.records import (
    GENERIC,
    NAME,
    YAML,
    Invariants,
    Measure,
    Plugin,
    Quality,
    Recipe,
    Rule,
    Step,
    Variant,
    Workload,
    task_name,
)
from peftopt.stats import LOOKS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEFAULT_ENGINE = "eager"


def parse(
    text: str,
    path: str,
    catalogue: Mapping[str, Plugin],
    default_tradeoffs: str,
    read: Callable[[str], str] | None = None,
) -> Recipe:
    """The recipe in `text`; raises BadRecipe with all its mistakes.

    Touches no files: paths are resolved as text against the folder of `path`. `default_tradeoffs` is the text
    of recipes/tradeoffs.yaml; `read` opens the user's own table where `tradeoffs` is a path.
    """
    reading = _Reading(path, catalogue, read)
    recipe = reading.document(text, partial(reading.recipe, default_tradeoffs))
    if recipe is None or reading.problems:
        raise BadRecipe(path, sorted(dict.fromkeys(reading.problems), key=lambda problem: problem[0]))
    return recipe


def _name_of(path: str) -> str:
    """A recipe is called as its file is, in the letters that a name may have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", Path(path).stem).lstrip(".")[:64] or "recipe"


# ---- the tables --------------------------------------------------------------------------------

_TOKENS = or_off(quantity({"": 1, "tokens": 1}, 1, 1e9, "a number such as 2048 tokens, or off"))
_RATE = quantity({"": 1}, 0.001, 100_000, "requests a second, such as 2.5")
_SECONDS = quantity({"": 1, "s": 1, "min": 1 / 60}, 1, 86_400, "1 s to a day, such as 600 s or 10 min")

_CRITICAL = share(0.0001, 0.99)  # no sample shows a rate of 0

_SAME_MODEL: Mapping[str, Reader[Limit]] = {
    "gain": share(0, 0.99),
    "parity": share(0, 1),
    "lost": share(0, 1),
    "critical_errors": _CRITICAL,
}
"""The rule of what gives the same model without the adapter's cost."""

RULES: Mapping[str, Mapping[str, Reader[Limit]]] = {
    "variant": {"critical_errors": _CRITICAL},
    "merge": _SAME_MODEL,
    "bake": _SAME_MODEL,
    "quantize": {
        "critical_errors": _CRITICAL,
        "not_slower": share(0, 1),
        "smaller": share(0, 0.99),
        "gain": words({"speed": "speed", "memory": "memory"}),
    },
    "compile": {"gain": share(0, 0.99), "parity": share(0, 1), "critical_errors": _CRITICAL},
    "truncate": {"over": _TOKENS, "gain": share(0, 0.99), "lost": share(0, 1)},
    "shorten": {"by": words({"max_new_tokens": 1.0, "off": None}), "gain": share(0, 0.99), "cut": share(0, 1)},
}
"""The shape of the trade-off table: technique -> the halves of its rule -> how each limit is read."""


def _blocks(node: yaml.Node, at: str) -> int:
    """A planned look, or more than the last one for a race that bets judge after every block."""
    blocks = whole(1, 10_000)(node, at)
    if blocks in LOOKS or blocks > LOOKS[-1]:
        return blocks
    looks = ", ".join(map(str, LOOKS))
    raise Wrong(f"must be one of {looks}, or more than {LOOKS[-1]}, found {show(node)}", "more is judged by bets")


_MEMORY = ("quantize", "gain")
"""What a quantizer is for, "speed" or "memory": it turns the rules on speed and size on and off, and is none itself."""

_MEASURE: Mapping[str, Reader[object]] = {
    "requests": whole(1),
    "warmup": whole(0),
    "relaunch": whole(1),
    "min_blocks": whole(0),
    "max_blocks": _blocks,
    "clock": words({"wall": "wall", "cpu": "cpu", "auto": "auto"}),
    "threads": whole(0),
    "deadline": _SECONDS,
}

_MERGED_AND_BAKED = (
    "merges and bakes the adapter",
    "keep one: bake for virtual tokens (prompt tuning, p-tuning, prefix tuning, …), merge for adapters of weights",
)

_CLASHES: Mapping[tuple[str, str], tuple[str, str]] = {
    ("merge", "merge"): ("merges the adapter twice", "remove the second merge"),
    ("quantize", "quantize"): ("quantizes twice", "keep one quantizer per variant"),
    ("truncate", "truncate"): ("truncates twice", "keep one"),
    ("shorten", "shorten"): ("caps its answers twice", "keep one"),
    ("quantize", "merge"): (
        "merges into weights that are already quantized",
        "put merge before the quantizer, or leave it out to keep the adapter apart",
    ),
    ("bake", "bake"): ("bakes the adapter twice", "remove the second bake"),
    ("bake", "quantize"): (
        "bakes before it quantizes",
        "put bake after the quantizer: keys and values belong to the weights that compute them",
    ),
    ("bake", "merge"): _MERGED_AND_BAKED,
    ("merge", "bake"): _MERGED_AND_BAKED,
}
"""Chains that make no sense, by the technique of an earlier and of a later step."""


def _clash(earlier: Step, later: Step) -> tuple[str, str] | None:
    """What is wrong with the two in one chain, and a hint; None for nothing. Virtual tokens that were baked as words of
    the base are weights, which a quantizer may follow."""
    as_words = earlier.technique == "bake" and earlier.params.get("target", "ours") != "ours"
    if as_words and later.technique == "quantize":
        return None
    return _CLASHES.get((earlier.technique, later.technique))


def _pattern(node: yaml.Node, at: str) -> str:
    text = text_of(node)
    try:
        re.compile(text)
    except re.error as error:
        raise Wrong(f"is not a regular expression: {error}", "the syntax is that of Python's module re") from error
    return text


def _refusal(node: yaml.Node, at: str) -> str:
    return "kept" if node.value == "kept" else _pattern(node, at)


def _language(node: yaml.Node, at: str) -> str:
    code = text_of(node)
    if not re.fullmatch("kept|[a-z]{2}", code):
        raise Wrong(f"must be kept or the two letters of a language, found {show(node)}", "write kept, or de")
    return code


def _call(node: yaml.Node | None) -> tuple[str, yaml.Node | None]:
    """`gptq` or `{gptq: {bits: 4}}` as the name and the node of its parameters."""
    if isinstance(node, yaml.ScalarNode):
        return text_of(node), None
    if not isinstance(node, yaml.MappingNode) or len(node.value) != 1:
        raise Wrong("must be one name", "write merge, {gptq: {bits: 4}} or {engine: compiled}")
    ((name, params),) = node.value
    return text_of(name), params


# ---- a whole recipe ----------------------------------------------------------------------------


class _Reading(Reading):
    """One pass over one recipe, which knows the plug-ins and can read a table that the recipe names."""

    def __init__(self, path: str, catalogue: Mapping[str, Plugin], read: Callable[[str], str] | None = None) -> None:
        super().__init__(path)
        self.catalogue = catalogue
        self.read = read

    # -- the sections

    def recipe(self, default_tradeoffs: str, node: yaml.Node, at: str) -> Recipe:
        """The whole recipe. Raises Wrong when a mistake was noted."""
        written = self.sections(node, at)
        check(written, self, self.catalogue)
        default = self.table(default_tradeoffs, "recipes/tradeoffs.yaml")
        rules = self.rules(written.tradeoffs or {}, default)
        return written.recipe(_name_of(self.path), self.path, rules)

    def sections(self, node: yaml.Node, at: str) -> Sections:
        """Every section by itself."""
        readers: Mapping[str, Reader[object]] = {
            "model": self.record(Sources, {"base": self.file, "adapter": self.file}),
            "seed": whole(0, 2**32 - 1),
            "calibration": self.calibration,
            "workloads": self.named(self.workload),
            "quality": self.quality,
            "measure": self.measure,
            "variants": self.named(self.variant),
            "baseline": text_of,
            "tradeoffs": self.tradeoffs,
            "require": self.list_of(lambda n, _: thresholds.parse(text_of(n))),
            "minimize": lambda n, _: thresholds.parse_metric(text_of(n)),
        }
        return filled(Sections, self.keys(readers, ["model", "workloads", "variants", "minimize"])(node, at))

    def workload(self, name: str) -> Reader[Workload]:
        readers: Mapping[str, Reader[object]] = {
            "prompts": self.file,
            "new_tokens": whole(1),
            "batch": whole(1),
            "slice": text_of,
            "lengths": words({"fixed": "fixed", "natural": "natural"}),
            "users": whole(1, 10_000),
            "rate": _RATE,
            "requests": whole(4),
        }
        return self.record(Workload, readers, name=name)

    def quality(self, node: yaml.Node, at: str) -> Quality:
        readers: Mapping[str, Reader[object]] = {
            "prompts": self.file,
            "new_tokens": whole(1),
            "batch": whole(1),
            "slice": text_of,
            "schema": self.file,
            "rows": whole(0),
            "invariants": self.invariants,
            "tasks": self.tasks,
            "task_rows": whole(1),
        }
        return self.record(Quality, readers)(node, at)

    def file(self, node: yaml.Node, at: str) -> str:
        return os.path.normpath(Path(self.path).parent / text_of(node))

    def calibration(self, node: yaml.Node, at: str) -> str:
        return GENERIC if text_of(node) == GENERIC else self.file(node, at)

    def tasks(self, node: yaml.Node, at: str) -> tuple[str, ...]:
        """Names of tasks that lm-evaluation-harness knows, or paths of task files."""
        tasks = [task for task in self.list_of(self.task)(node, at) if task]
        for task in tasks:
            name = task_name(task)
            if not NAME.fullmatch(name):
                raise Wrong(f"a task cannot be named {show(name)} here", "use letters, digits, - and _")
        return tuple(tasks)

    def task(self, node: yaml.Node, at: str) -> str:
        return self.file(node, at) if text_of(node).endswith(YAML) else text_of(node)

    def measure(self, node: yaml.Node, at: str) -> Measure:
        values = self.keys(_MEASURE)(node, at)
        if "deadline" in values:
            values["deadline_s"] = values.pop("deadline")
        fewest, most = (values.get(name, getattr(Measure, name)) for name in ("min_blocks", "max_blocks"))
        if isinstance(fewest, int) and isinstance(most, int) and fewest > most:
            self.note(f"{at}.min_blocks", "is more than max_blocks", "more blocks than the most are never run")
        return filled(Measure, values)

    def invariants(self, node: yaml.Node, at: str) -> Invariants:
        kept = words({"kept": "kept"})
        readers: Mapping[str, Reader[object]] = {
            "regex": _pattern,
            "labels": self.list_of(lambda n, _: scalar(n, "a label")),
            "numbers": kept,
            "language": _language,
            "refusal": _refusal,
        }
        return self.record(Invariants, readers)(node, at)

    def variant(self, name: str) -> Reader[Variant]:
        def read(node: yaml.Node, at: str) -> Variant:
            before = len(self.problems)
            steps = [step for step in self.list_of(self.step)(node, at) if step]
            clashes = (_clash(a, b) for a, b in combinations(steps, 2))
            for clash in dict.fromkeys(filter(None, clashes)):
                self.note(at, *clash)
            policies = tuple(step for step in steps if step.kind == "policy")
            steps = [step for step in steps if step.kind != "policy"]
            if any(step.kind == "engine" for step in steps[:-1]):
                self.note(at, "has steps after its engine", "write one {engine: …}, after the transforms")
            if len(self.problems) > before:
                raise Wrong
            if not steps or steps[-1].kind != "engine":
                steps.append(self.plugged("engine", DEFAULT_ENGINE, None, at))
            check_formats(steps, at, self, self.catalogue)
            return Variant(name, tuple(steps[:-1]), steps[-1], policies)

        return read

    def step(self, node: yaml.Node, at: str) -> Step:
        name, params = _call(node)
        if name == "engine":
            engine, params = _call(params)
            return self.plugged("engine", engine, params, at)
        is_policy = name in self.catalogue and self.catalogue[name].kind == "policy"
        return self.plugged("policy" if is_policy else "transform", name, params, at)

    def plugged(self, kind: str, name: str, params: yaml.Node | None, at: str) -> Step:
        """A step of the plug-in `name`, its parameters checked and its defaults filled in."""
        plugin = self.catalogue.get(name)
        if plugin is None:
            kinds = ("engine",) if kind == "engine" else ("transform", "policy")
            known = [p.name for p in self.catalogue.values() if p.kind in kinds]
            raise Wrong(f"no {kind} named {show(name)}", nearest(name, known))
        if plugin.kind != kind:
            a_kind = "an engine" if kind == "engine" else f"a {kind}"
            right = f"{{engine: {name}}}" if plugin.kind == "engine" else f"{name}, as a step of its own"
            raise Wrong(f"{name} is not {a_kind}", f"write {right}")
        if params is None:
            values = self.params(plugin.params, yaml.MappingNode("", []), at)
        else:
            values = self.params(plugin.params, params, f"{at}.{name}")
        return Step(name, kind, plugin.technique, values, plugin.calibrates, plugin.environment)

    def params(self, record: type[DataclassInstance], node: yaml.Node, at: str) -> dict[str, object]:
        """A plug-in's parameters by name. Its record has their types and their defaults, and may refuse a value."""
        annotations = typing.get_type_hints(record)
        readers = {field.name: typed(annotations[field.name]) for field in dataclasses.fields(record)}
        return dataclasses.asdict(self.record(record, readers)(node, at))

    # -- the trade-off table

    def quantizers(self) -> list[str]:
        return sorted(p.name for p in self.catalogue.values() if p.technique == "quantize")

    def rows(self, node: yaml.Node, at: str) -> Rows:
        halves = {**dict.fromkeys(self.quantizers(), RULES["quantize"]), **RULES}
        return self.keys({owner: self.keys(readers) for owner, readers in halves.items()})(node, at)

    def tradeoffs(self, node: yaml.Node, at: str) -> Rows:
        """`default`, rows of the user's own, or the path of a file that holds them."""
        if not isinstance(node, yaml.ScalarNode):
            return self.rows(node, at)
        if text_of(node) == "default":
            return {}
        if self.read is None:
            raise Wrong("must be default or a mapping", "a file of limits cannot name another file")
        path = self.file(node, at)
        try:
            return self.table(self.read(path), path)
        except (OSError, UnicodeError) as error:
            raise Wrong(
                f"cannot read {path}: {error}", "write default, a mapping, or the path of a YAML file"
            ) from error

    def table(self, text: str, path: str) -> Rows:
        """The rows of another file; its mistakes are noted where the recipe names it."""
        other = _Reading(path, self.catalogue)
        rows = other.document(text, other.rows)
        for line, message, hint in other.problems:
            self.note("tradeoffs", f"{path}:{line}: {message}", hint)
        return rows or {}

    def rules(self, own: Rows, default: Rows) -> tuple[Rule, ...]:
        """Every half-row that a verdict may need: each quantizer under its own name, its own row first."""
        rules = []
        for technique, halves in RULES.items():
            for owner in self.quantizers() if technique == "quantize" else [technique]:
                rows = (table.get(row) for row in (owner, technique) for table in (own, default))
                written: dict[str, Limit] = dict(ChainMap(*(dict(row or {}) for row in rows)))
                for half in halves:
                    if half not in written:
                        self.note("tradeoffs", f"{technique}.{half} has no limit")
                limits = {half: limit for half, limit in written.items() if not isinstance(limit, str)}
                if technique == "quantize" and written.get("gain") == "memory":
                    limits["not_slower"] = None
                    limits["smaller"] = limits.get("smaller") or 0.0
                rules += [Rule(owner, half, limits.get(half)) for half in halves if (technique, half) != _MEMORY]
        return tuple(rules)
