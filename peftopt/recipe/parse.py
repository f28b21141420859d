"""Recipe text -> Recipe: the sections of a recipe, what each key means, and what must hold between them. Pure."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from peftopt.errors import BadRecipe
from peftopt.metrics import TASK
from peftopt.metrics import known as known_metric
from peftopt.recipe import thresholds
from peftopt.recipe.reader import (
    Reader,
    Reading,
    Wrong,
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
from peftopt.records import (
    GENERIC,
    NAME,
    SAFETENSORS,
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

_JUDGED_ON_ANSWERS = ("ratio", "share", "nats")
"""The units of the metrics that need a `quality` section."""

DEFAULT_ENGINE, DEFAULT_BASELINE = "eager", "adapter"

Rows = Mapping[str, Mapping[str, Any] | None]


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
    found = reading.document(text, partial(reading.recipe, default_tradeoffs))
    if reading.problems:
        raise BadRecipe(path, sorted(dict.fromkeys(reading.problems), key=lambda problem: problem[0]))
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(path).stem).lstrip(".")[:64] or "recipe"
    return Recipe(name=name, path=path, **found)


# ---- the tables --------------------------------------------------------------------------------

_TOKENS = or_off(quantity({"": 1, "tokens": 1}, 1, 1e9, "a number such as 2048 tokens, or off"))
_RATE = quantity({"": 1}, 0.001, 100_000, "requests a second, such as 2.5")
_SECONDS = quantity({"": 1, "s": 1, "min": 1 / 60}, 1, 86_400, "1 s to a day, such as 600 s or 10 min")

_CRITICAL = share(0.0001, 0.99)  # no sample shows a rate of 0

RULES: Mapping[str, Mapping[str, Reader]] = {
    "variant": {"critical_errors": _CRITICAL},
    "merge": {"gain": share(0, 0.99), "parity": share(0, 1), "lost": share(0, 1), "critical_errors": _CRITICAL},
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
    found: int = whole(1, 10_000)(node, at)
    if found in LOOKS or found > LOOKS[-1]:
        return found
    looks = ", ".join(map(str, LOOKS))
    raise Wrong(f"must be one of {looks}, or more than {LOOKS[-1]}, found {show(node)}", "more is judged by bets")


_MEMORY = ("quantize", "gain")
"""What a quantizer is for, "speed" or "memory": it turns the rules on speed and size on and off, and is none itself."""

_MEASURE: Mapping[str, Reader] = {
    "requests": whole(1),
    "warmup": whole(0),
    "relaunch": whole(1),
    "max_blocks": _blocks,
    "clock": words({"wall": "wall", "cpu": "cpu", "auto": "auto"}),
    "threads": whole(0),
    "deadline": _SECONDS,
}

_CLASHES: Mapping[tuple[str, str], tuple[str, str]] = {
    ("merge", "merge"): ("merges the adapter twice", "remove the second merge"),
    ("quantize", "quantize"): ("quantizes twice", "keep one quantizer per variant"),
    ("truncate", "truncate"): ("truncates twice", "keep one"),
    ("shorten", "shorten"): ("caps its answers twice", "keep one"),
    ("quantize", "merge"): (
        "merges into weights that are already quantized",
        "put merge before the quantizer, or leave it out to keep the adapter apart",
    ),
}
"""Chains that make no sense, by the technique of an earlier and of a later step."""


def _pattern(node: yaml.Node, at: str) -> str:
    try:
        re.compile(text := text_of(node))
    except re.error as error:
        raise Wrong(f"is not a regular expression: {error}", "the syntax is that of Python's module re") from error
    return text


def _refusal(node: yaml.Node, at: str) -> str:
    return "kept" if node.value == "kept" else _pattern(node, at)


def _language(node: yaml.Node, at: str) -> str:
    if not re.fullmatch("kept|[a-z]{2}", code := text_of(node)):
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
        self.catalogue, self.read = catalogue, read

    # -- the sections

    def recipe(self, default_tradeoffs: str, node: yaml.Node, at: str) -> dict[str, Any]:
        """Everything a Recipe holds, by field name; complete when no problem was noted."""
        requests = {"prompts": self.file, "new_tokens": whole(1), "batch": whole(1)}
        timed = {"slice": text_of, "lengths": words({"fixed": "fixed", "natural": "natural"})}
        timed |= {"users": whole(1, 10_000), "rate": _RATE, "requests": whole(4)}
        sections: Mapping[str, Reader] = {
            "model": self.keys({"base": self.file, "adapter": self.file}, ["base", "adapter"]),
            "seed": whole(0, 2**32 - 1),
            "calibration": self.calibration,
            "workloads": self.named(lambda name: self.record(Workload, requests | timed, name=name)),
            "quality": self.record(
                Quality,
                {
                    **requests,
                    **{"slice": text_of, "schema": self.file, "rows": whole(0), "invariants": self.invariants},
                    **{"tasks": self.tasks, "task_rows": whole(1)},
                },
            ),
            "measure": self.measure,
            "variants": self.named(self.variant),
            "baseline": text_of,
            "tradeoffs": self.tradeoffs,
            "require": self.list_of(lambda n, _: thresholds.parse(text_of(n))),
            "minimize": lambda n, _: thresholds.parse_metric(text_of(n)),
        }
        found: dict[str, Any] = {
            "baseline": DEFAULT_BASELINE,
            "quality": None,
            "require": (),
            "measure": Measure(),
        }
        found |= self.keys(sections, ["model", "workloads", "variants", "minimize"])(node, at)
        self.check_variants(found)
        self.check_loads(found)
        self.check_metrics(found)
        model, own = found.pop("model", None) or {}, found.pop("tradeoffs", None) or {}
        default = self.table(default_tradeoffs, "recipes/tradeoffs.yaml")
        return {"calibration": None} | found | model | {"rules": self.rules(own, default)}

    def file(self, node: yaml.Node, at: str) -> str:
        return os.path.normpath(Path(self.path).parent / text_of(node))

    def calibration(self, node: yaml.Node, at: str) -> str:
        return GENERIC if text_of(node) == GENERIC else self.file(node, at)

    def tasks(self, node: yaml.Node, at: str) -> tuple[str, ...]:
        """Names of tasks that lm-evaluation-harness knows, or paths of task files."""
        given = self.list_of(lambda n, at: self.file(n, at) if text_of(n).endswith(YAML) else text_of(n))(node, at)
        if odd := [name for name in map(task_name, given) if not NAME.fullmatch(name)]:
            raise Wrong(f"a task cannot be named {show(odd[0])} here", "use letters, digits, - and _")
        return tuple(given)

    def check_task(self, metric: str, tasks: Sequence[str], at: str) -> None:
        if (name := metric.removeprefix(TASK)) not in (known := [*map(task_name, tasks)]):
            hint = nearest(name, known) if known else f"add quality: {{tasks: [{name}]}}"
            self.note(at, f"no task named {show(name)} in quality.tasks", hint)

    def measure(self, node: yaml.Node, at: str) -> Measure:
        values = self.keys(_MEASURE)(node, at)
        if "deadline" in values:
            values["deadline_s"] = values.pop("deadline")
        return Measure(**values)

    def invariants(self, node: yaml.Node, at: str) -> Invariants:
        kept = words({"kept": "kept"})
        readers = {"regex": _pattern, "numbers": kept, "language": _language, "refusal": _refusal}
        readers["labels"] = self.list_of(lambda n, _: scalar(n, "a label"))
        found: Invariants = self.record(Invariants, readers)(node, at)
        return found

    def variant(self, name: str) -> Reader:
        def read(node: yaml.Node, at: str) -> Variant:
            before = len(self.problems)
            steps = [step for step in self.list_of(self.step)(node, at) if step]
            clashes = (_CLASHES.get((a.technique, b.technique)) for a, b in combinations(steps, 2))
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
            self.check_formats(steps, at)
            return Variant(name, tuple(steps[:-1]), steps[-1], policies)

        return read

    def step(self, node: yaml.Node, at: str) -> Step:
        kind, (name, params) = "transform", _call(node)
        if name == "engine":
            kind, (name, params) = "engine", _call(params)
        elif name in self.catalogue and self.catalogue[name].kind == "policy":
            kind = "policy"
        return self.plugged(kind, name, params, at)

    def plugged(self, kind: str, name: str, params: yaml.Node | None, at: str) -> Step:
        """A step of the plug-in `name`, its parameters checked and its defaults filled in."""
        plugin = self.catalogue.get(name)
        if plugin is None:
            kinds = ("engine",) if kind == "engine" else ("transform", "policy")
            known = [p.name for p in self.catalogue.values() if p.kind in kinds]
            raise Wrong(f"no {kind} named {show(name)}", nearest(name, known))
        if plugin.kind != kind:
            right = f"{{engine: {name}}}" if plugin.kind == "engine" else f"{name}, as a step of its own"
            raise Wrong(f"{name} is not a{'n' * (kind == 'engine')} {kind}", f"write {right}")
        annotations = typing.get_type_hints(plugin.params)
        readers = {f.name: typed(annotations[f.name]) for f in dataclasses.fields(plugin.params)}
        node = yaml.MappingNode("", []) if params is None else params
        values = self.record(plugin.params, readers)(node, at if params is None else f"{at}.{name}")
        return Step(name, kind, plugin.technique, dataclasses.asdict(values), plugin.calibrates, plugin.environment)

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
        rows: Rows | None = other.document(text, other.rows)
        for line, message, hint in other.problems:
            self.note("tradeoffs", f"{path}:{line}: {message}", hint)
        return rows or {}

    def rules(self, own: Rows, default: Rows) -> tuple[Rule, ...]:
        """Every half-row that a verdict may need: each quantizer under its own name, its own row first."""
        rules = []
        for technique, halves in RULES.items():
            for owner in self.quantizers() if technique == "quantize" else [technique]:
                rows = (table.get(row) for row in (owner, technique) for table in (own, default))
                limits = dict(ChainMap(*(dict(row or {}) for row in rows)))
                for half in halves:
                    if half not in limits:
                        self.note("tradeoffs", f"{technique}.{half} has no limit")
                if technique == "quantize" and limits.pop("gain", "speed") == "memory":
                    limits |= {"not_slower": None, "smaller": limits.get("smaller") or 0.0}
                rules += [Rule(owner, half, limits.get(half)) for half in halves if (technique, half) != _MEMORY]
        return tuple(rules)

    # -- what must hold between sections

    def check_variants(self, found: Mapping[str, Any]) -> None:
        variants: Mapping[str, Variant | None] = found.get("variants") or {}
        baseline, at = found["baseline"], "baseline" if "baseline" in self.lines else "variants"
        if variants and baseline and baseline not in variants:
            self.note(at, f"no variant named {show(baseline)} as baseline", nearest(baseline, variants))
        if (variant := variants.get(baseline)) and (variant.steps or variant.policies):
            self.note(
                at,
                f"the baseline {baseline} has transforms or policies",
                "the baseline is the adapter as it is served today: write []",
            )
        whole = [variant for variant in variants.values() if variant]
        first: dict[str, str] = {}
        for variant in whole:
            twin = first.setdefault(repr((variant.steps, variant.engine, variant.policies)), variant.name)
            if twin != variant.name:
                self.note(f"variants.{variant.name}", f"is the same chain as {twin}", "remove one of them")
        for variant in whole if "calibration" not in found else ():
            for step in variant.steps:
                if step.calibrates:
                    hint = "add calibration: the path of a JSONL file of prompts and answers, or generic"
                    self.note(f"variants.{variant.name}", f"{step.plugin} needs calibration texts", hint)

    def check_formats(self, steps: Sequence[Step], at: str) -> None:
        """What one step writes, the next has to read: transforms read safetensors, engines the format they name."""
        written = SAFETENSORS
        for step, plugin in ((step, self.catalogue[step.plugin]) for step in steps):
            if step.kind == "transform" and written != SAFETENSORS:
                self.note(at, f"{step.plugin} cannot read what comes before it ({written})", "put it earlier")
            elif step.kind == "engine" and written != plugin.format:
                kind = "engine" if written != SAFETENSORS else "transform"
                wanted = written if kind == "engine" else plugin.format
                fitting = [p.name for p in self.catalogue.values() if p.kind == kind and p.format == wanted]
                written_as = "{engine: …}" if kind == "engine" else "a step before the engine"
                hint = f"{' or '.join(fitting)}, as {written_as}"
                self.note(at, f"engine {step.plugin} opens {plugin.format}, and gets {written}", hint)
            written = plugin.format

    def check_loads(self, found: Mapping[str, Any]) -> None:
        """Users and rates are for servers."""
        for workload in filter(None, (found.get("workloads") or {}).values()):
            at = f"workloads.{workload.name}"
            if not workload.loaded:
                if f"{at}.requests" in self.lines:
                    self.note(at, "requests is only for a load", "add users or rate, or write measure: {requests: …}")
                continue
            if workload.users and workload.rate:
                self.note(
                    at,
                    "has users and a rate: a load has one of them",
                    "keep users for a closed loop, or rate for an open one",
                )
            if workload.batch > 1:
                self.note(
                    at,
                    "has a batch under load, where the server makes the batches",
                    f"write users: {workload.batch} and remove batch",
                )
            variants = filter(None, (found.get("variants") or {}).values())
            if unserved := [v.name for v in variants if not self.catalogue[v.engine.plugin].serves]:
                servers = " or ".join(p.name for p in self.catalogue.values() if p.serves)
                hint = f"give every variant an engine that serves ({servers}), or leave users and rate out"
                self.note(at, f"a load needs servers, and the engine of {', '.join(unserved)} is not one", hint)

    def check_metrics(self, found: Mapping[str, Any]) -> None:
        minimize, known = found.get("minimize"), found.get("workloads")
        limits = [limit and limit.metric for limit in found["require"] or ()]
        if minimize and not (minimize.workload and known_metric(minimize).better == "lower"):
            self.note("minimize", f"{minimize.name} is not a time of a workload", "write one, such as latency.p50@chat")
        for at, metric in [("minimize", minimize), *((f"require[{n}]", m) for n, m in enumerate(limits, 1))]:
            if metric and metric.workload and known and metric.workload not in known:
                self.note(at, f"no workload named {show(metric.workload)}", nearest(metric.workload, known))
            workload = (known or {}).get(metric.workload) if metric else None
            if metric and metric.name == "throughput" and workload and workload.lengths == "natural":
                self.note(
                    at,
                    "throughput compares only answers of one length",
                    f"write lengths: fixed in the workload {metric.workload}",
                )
            if metric and known_metric(metric).unit in _JUDGED_ON_ANSWERS and not self.lines.get("quality"):
                self.note(at, f"{metric.name} needs checked answers", "add quality: {prompts: …}")
            elif metric and metric.name.startswith(TASK) and found.get("quality"):
                self.check_task(metric.name, found["quality"].tasks, at)
