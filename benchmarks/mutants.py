"""How many small faults in the pure core the tests notice: each mutant is one change, killed when a test fails.

    python benchmarks/mutants.py                             # all modules below: the score and what survived
    python benchmarks/mutants.py --module stats --sample 100 # a hundred of one module's, drawn from --seed
    python benchmarks/mutants.py --changed HEAD~1            # of the lines changed since a revision only

One process collects the tests and runs them once, noting which lines each covers. For each mutant it forks: the child
puts the changed code into the functions that were imported and runs the tests that cover the line, fastest first, up
to the first failure. Exit 1: some survived that `benchmarks/survivors.yaml` gives no reason for, more than --floor
allows of those that were judged, or of FEWEST.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import itertools
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import coverage
import pytest
import yaml
from _pytest.runner import runtestprotocol
from hypothesis import HealthCheck, Phase, settings

RULES = ("limits", "speed", "answers", "parity", "requirements", "ratios", "table")

MODULES = {
    path: tuple(f"tests/test_{name}.py" for name in names)
    for place, names in {
        "peftopt/decision/stopping.py": ("stopping", "decide", "honest_times", "next_step"),
        "peftopt/decision/decide.py": ("next_step", "judged_interval", "trust_decisions", "evidence", "decide"),
        "peftopt/decision/index.py": ("trust_times", "trust_answers", "judged", "evidence", "decide"),
        "peftopt/decision/evidence.py": (
            *("speculation_rules", "prefix_rules", "trust_times", "trust_answers", "judged", "evidence", "decide"),
        ),
        "peftopt/decision/rules": (
            *(f"rules_{name}" for name in RULES),
            *("judged_interval", "speculation_rules", "prefix_rules", "broken_models", "decide", "honest_times"),
        ),
        "peftopt/stats": ("stats", "trust_stats"),
    }.items()
    for path in (sorted(map(str, Path(place).glob("[a-z]*.py"))) or [place])
}
"""What is changed, and the tests that should notice, the closest first."""

SLOW = (
    "tests/test_decide.py::test_what_is_not_foreseen_as_undecidable_can_be_decided",
    "tests/test_honest_times.py::test_a_limit_at_its_true_value_is_neither_met_nor_missed",
    "tests/test_stats.py::test_adding_blocks_until_it_suits_spends_no_more_than_the_budget",
    "tests/test_stats.py::test_betting_stays_below_its_error_however_often_it_is_judged",
)
"""Tests that are left out: simulations, for which every survivor would have to wait."""

ACCEPTED = Path("benchmarks/survivors.yaml")
"""Survivors with a reason each: {module: {the line this script prints: why no test can or need tell}}."""

EXAMPLES = 8
"""Inputs that Hypothesis draws for a test, the same in every run."""

SPARE_S, SLOWER, SPARE_BYTES = 5.0, 10.0, 2 << 30
"""A mutant is killed when a test takes so many seconds of processor over so many times its own, or so much more memory.
Processor time, as a busy machine kills nobody that way."""

ASLEEP_S = 900.0
"""A mutant is stopped after so long by the clock, should it wait without end."""

PATIENCE_S = 30.0
"""So much processor time of tests is spent on a mutant, the likeliest first; what they do not notice has survived. Less
can only lower the score."""

FEWEST = 40
"""Mutants that the floor is a share of at least: of three, one that survives says nothing of the tests."""

OTHERWISE = 255

COMPARED = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
REPLACED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
PAIRS = [("min", "max"), ("any", "all"), ("ceil", "floor"), ("low", "high"), ("left", "right")]
NAMES = {"accepted": "rejected", "rejected": "accepted", "inconclusive": "accepted"}
NAMES |= {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
UNTOUCHED = {"annotation", "returns", "decorator_list"}


@dataclass
class Mutant:
    """One change: `new` in place of what `parent` holds in `slot` (and at `index`, if that is a list)."""

    path: str
    scope: tuple[str, ...]
    lines: range
    key: str
    parent: ast.AST
    slot: str
    index: int | None
    new: ast.AST | None
    statement: ast.stmt
    files: tuple[str, ...] = ()
    """Those whose tests should notice, the closest first."""
    tests: list[pytest.Item] = field(default_factory=list)

    def apply(self) -> None:
        if self.index is None:
            setattr(self.parent, self.slot, self.new)
        elif self.new is None:
            del getattr(self.parent, self.slot)[self.index]
        else:
            getattr(self.parent, self.slot)[self.index] = self.new


# ---- what is changed ---------------------------------------------------------------------------


def variants(  # noqa: C901 (a case for each kind of node)
    node: ast.AST, parent: ast.AST, slot: str
) -> Iterator[ast.AST | None]:
    """What may stand in the node's place; None: nothing at all."""

    def but(**fields: Any) -> Any:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    if slot == "test" and isinstance(node, ast.expr) and not isinstance(node, (ast.Compare, ast.UnaryOp)):
        yield ast.UnaryOp(ast.Not(), node)
    if slot == "ifs":
        yield ast.Constant(True)
    if (isinstance(parent, ast.Slice) and slot != "step") or (isinstance(node, ast.keyword) and node.arg != "strict"):
        yield None
    match node:
        case ast.Compare():
            for n, op in enumerate(node.ops):
                yield from (but(ops=[*node.ops[:n], to(), *node.ops[n + 1 :]]) for to in COMPARED[type(op)])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in REPLACED:
            yield but(op=REPLACED[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool() as value) if getattr(parent, "arg", "") != "strict":
            yield ast.Constant(not value)
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            yield from (ast.Constant(n) for n in (value + 1, value - 1) if n >= 0)
        case ast.Constant(value=float() as value):
            yield ast.Constant(1 - 2 * (1 - value) if 0.5 < value < 1 else 2 * value or 1.0)
        case ast.Constant(value=str() as value) if value in NAMES:
            yield ast.Constant(NAMES[value])
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield but(id=NAMES[name])
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in NAMES:
            yield but(attr=NAMES[name])
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and not value.value):
            yield but(value=ast.Constant(None))  # of what is not as good as None already
    match node:
        case ast.AugAssign() | ast.Raise() | ast.Break() | ast.Continue() | ast.Expr():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()


def places(node: ast.AST, scope: tuple[str, ...], statement: ast.stmt) -> Iterator[tuple[Any, ...]]:
    """Every (parent, slot, index, child, scope, statement) below the node that may be changed: no words, no types."""
    for slot, value in ast.iter_fields(node):
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or slot in UNTOUCHED or isinstance(child, (ast.JoinedStr, ast.Assert)):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            here = child if isinstance(child, ast.stmt) else statement
            yield node, slot, index, child, scope, here
            if not isinstance(child, ast.Raise):
                name = (child.name,) if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else ()
                yield from places(child, (*scope, *name), here)


def mutants_of(path: str) -> tuple[ast.Module, list[Mutant]]:
    source = Path(path).read_text()
    tree, lines = ast.parse(source), source.splitlines()
    found, seen = [], Counter[str]()
    for parent, slot, index, child, scope, statement in places(tree, (), ast.Pass()):
        for new in variants(child, parent, slot):
            was, becomes = ast.unparse(child), "" if new is None else ast.unparse(new)
            if isinstance(child, ast.AugAssign | ast.Return):
                was, becomes = was.split("\n")[0], becomes.split("\n")[0]
            line = getattr(child, "lineno", statement.lineno)
            key = f"{'.'.join(scope) or 'module'}: {was} -> {becomes}   in   {lines[line - 1].strip()}"
            seen[key] += 1
            key += f" ({seen[key]})" if seen[key] > 1 else ""
            span = range(line, (getattr(child, "end_lineno", None) or line) + 1)
            found.append(Mutant(path, scope, span, key, parent, slot, index, new, statement))
    return tree, found


def changed_lines(base: str) -> dict[str, set[int]]:
    """For each file the lines that are not those of the revision."""
    git = ["git", "diff", "--unified=0", "--find-renames", "--no-color", base, "--"]
    ran = subprocess.run(git, check=False, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"error: git cannot compare with {base}: {ran.stderr.strip()}")
    found: dict[str, set[int]] = defaultdict(set)
    path = ""
    for line in ran.stdout.splitlines():
        if line.startswith("+++ "):
            path = line.removeprefix("+++ ").removeprefix("b/")
        elif hunk := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            start, count = int(hunk[1]), int(hunk[2] or 1)
            found[path] |= set(range(start, start + count))
    return found


# ---- what is run -------------------------------------------------------------------------------


def install(module: ModuleType, tree: ast.Module, mutant: Mutant) -> None:
    """Put the changed code into the functions there are, so that whoever imported one has it; constants by name."""
    mutant.apply()
    fresh: dict[str, Any] = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), fresh)
    if not mutant.scope:
        for name in stored(mutant.statement):
            was = vars(module)[name]
            for holder in [m for m in list(sys.modules.values()) if vars(m).get(name, fresh) is was]:
                setattr(holder, name, fresh[name])
    graft(module, fresh, module.__name__)


def stored(statement: ast.stmt) -> set[str]:
    """The names that a statement gives values to."""
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def graft(owner: Any, fresh: Mapping[str, Any], module: str) -> None:
    for name, new in fresh.items():
        was = vars(owner).get(name)
        old, code = function(was), function(new)
        if isinstance(was, type) and was.__module__ == module:
            graft(was, vars(new), module)
        elif isinstance(old, FunctionType) and old.__module__ == module:
            old.__code__, old.__defaults__, old.__kwdefaults__ = code.__code__, code.__defaults__, code.__kwdefaults__
            getattr(was, "cache_clear", lambda: None)()
        elif isinstance(owner, type) and not name.startswith("__") and isinstance(new, (int, float, str, tuple)):
            setattr(owner, name, new)  # a field's default


def function(value: Any) -> Any:
    """The function within a property, a cached one, a static method or one with a cache."""
    inner = (getattr(value, name, None) for name in ("fget", "func", "__func__", "__wrapped__"))
    return next((found for found in inner if isinstance(found, FunctionType)), value)


def reach(mutant: Mutant, trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, int]]:
    """The lines where a change shows; of what runs at import, those that use its names, or all of the module."""
    statement, tree = mutant.statement, trees[mutant.path]
    end = statement.end_lineno or statement.lineno
    fields = [each for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for each in node.body]
    if isinstance(statement, ast.FunctionDef):  # a default
        yield from ((mutant.path, n) for n in range(statement.body[0].lineno, end + 1))
    elif statement in fields:
        yield from ((mutant.path, n) for n in range(1, (tree.body[-1].end_lineno or 0) + 1))
    elif mutant.scope:
        body = getattr(statement, "body", None)
        last = max(body[0].lineno - 1, statement.lineno) if body else end
        yield from ((mutant.path, n) for n in range(statement.lineno, last + 1))
    else:
        names, used = stored(statement), []
        for path, each in trees.items():
            nodes = [n for n in ast.walk(each) if isinstance(n, ast.expr)]
            used += [(path, n.lineno) for n in nodes if getattr(n, "id", getattr(n, "attr", None)) in names]
        yield from used


class Mutation:
    """The plug-in that takes over once pytest has collected the tests."""

    def __init__(
        self, chosen: list[Mutant], trees: dict[str, ast.Module], jobs: int, minutes: float, patience: float
    ) -> None:
        self.chosen, self.trees, self.jobs, self.minutes, self.patience = chosen, trees, jobs, minutes, patience
        self.judged: list[Mutant] = []
        self.stopped = 0  # for their time, or as they crash at once
        self.kills = Counter[tuple[tuple[str, ...], pytest.Item]]()  # what kills in a function is tried first there
        self.survived: list[Mutant] = []
        self.seconds: dict[pytest.Item, float] = {}
        self.unfit = set[pytest.Item]()  # what fails without a change, such as a test of time on a busy machine
        self.out = os.fdopen(os.dup(1), "w")  # pytest captures the other

    def pytest_sessionstart(self) -> None:
        phases = (Phase.explicit, Phase.generate)  # a failure need not be made small
        settings.register_profile(
            "mutants",
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        )
        settings.load_profile("mutants")

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.cover(session.items)
        reaching = {item for mutant in self.chosen for item in mutant.tests} - self.unfit
        tests = [item for item in session.items if item in reaching]
        took = sum(self.seconds[item] for item in tests)
        self.say(f"{len(self.chosen)} mutants; {len(tests)} tests reach them and take {took:.0f} s")
        self.unfit |= self.failing(tests)
        gc.collect()
        gc.freeze()  # else each child copies what the collector touches
        waiting, running = list(self.chosen), dict[int, Mutant]()
        end = time.monotonic() + 60 * self.minutes
        while running or (waiting and time.monotonic() < end):
            while waiting and len(running) < self.jobs and time.monotonic() < end:
                mutant = waiting.pop(0)
                self.plan(mutant)
                running[self.fork(mutant, mutant.tests)] = mutant
            pid, status = os.wait()
            self.judged.append(mutant := running.pop(pid))
            if 0 < (nth := os.waitstatus_to_exitcode(status)) < OTHERWISE:
                self.kills[mutant.scope, mutant.tests[nth - 1]] += 1
            self.stopped += not 0 <= nth < OTHERWISE
            if not status:
                self.survived.append(mutant)
                self.say(f"{mutant.path}:{mutant.lines[0]}  {mutant.key}" + ("" if mutant.tests else "  (not reached)"))
        return True

    def failing(self, tests: Sequence[pytest.Item]) -> set[pytest.Item]:
        """Those that fail in a forked process without any change."""
        found = set[pytest.Item]()
        waiting = list(tests)
        while waiting:
            batch = waiting[: OTHERWISE - 1]
            nth = os.waitstatus_to_exitcode(os.waitpid(self.fork(None, batch), 0)[1])
            if not 0 <= nth < OTHERWISE:
                raise pytest.UsageError("the tests crash in a forked process without any change: nothing can be told")
            if nth:
                found.add(batch[nth - 1])
                self.say(f"left out, as it fails in a forked process without any change: {batch[nth - 1].nodeid}")
            waiting = waiting[nth or len(batch) :]
        return found

    def plan(self, mutant: Mutant) -> None:
        """Its tests, those first that killed in the same function, then those of the first file, as long as patience
        lasts."""

        def order(test: pytest.Item) -> tuple[float, int, float]:
            rank = mutant.files.index(test.nodeid.split("::")[0])
            return -self.kills[mutant.scope, test] / self.seconds[test], rank, self.seconds[test]

        mutant.tests = sorted((test for test in mutant.tests if test not in self.unfit), key=order)
        spent = itertools.accumulate(self.seconds[test] for test in mutant.tests)
        mutant.tests = [test for test, s in zip(mutant.tests, spent, strict=True) if s <= self.patience]

    def cover(self, items: Sequence[pytest.Item]) -> None:
        """Run every test once, timed, and give each mutant those that reach it."""
        watch, of = coverage.Coverage(data_file=None, include=list(MODULES)), {item.nodeid: item for item in items}
        watch.start()
        for item, following in itertools.zip_longest(items, items[1:]):
            watch.switch_context(item.nodeid)
            start = time.process_time()
            if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
                self.unfit.add(item)
                self.say(f"left out, as it fails without any change: {item.nodeid}")
            self.seconds[item] = time.process_time() - start + 1e-4
        watch.stop()
        data = watch.get_data()
        reached = {path: data.contexts_by_lineno(str(Path(path).resolve())) for path in self.trees}
        for mutant in self.chosen:
            names = {name for path, line in reach(mutant, self.trees) for name in reached[path].get(line, ())}
            mutant.tests = [of[n] for n in names if n.split("::")[0] in mutant.files]

    def fork(self, mutant: Mutant | None, tests: Sequence[pytest.Item]) -> int:
        """A child that runs the tests until the n-th fails; its exit status is n, 0 for none, OTHERWISE for a crash."""
        if pid := os.fork():
            return pid
        status = OTHERWISE
        try:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            signal.setitimer(signal.ITIMER_REAL, ASLEEP_S)
            signal.setitimer(signal.ITIMER_PROF, SPARE_S)
            if mutant:
                name = mutant.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                install(sys.modules[name], self.trees[mutant.path], mutant)
            for n, (item, following) in enumerate(itertools.zip_longest(tests, tests[1:]), 1):
                signal.setitimer(signal.ITIMER_PROF, SPARE_S + SLOWER * self.seconds[item])
                if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
                    status = min(n, OTHERWISE)
                    break
            else:
                status = 0
        finally:
            os._exit(status)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--module", action="append", help="a module's or package's name, or a path; may be repeated")
    parser.add_argument("--changed", metavar="BASE", help="only lines that differ from this git revision")
    parser.add_argument("--again", type=Path, metavar="LOG", help="only what survived in the output of an earlier run")
    parser.add_argument("--sample", type=int, metavar="N", help="judge so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no mutant after so many")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, metavar="S", help="seconds of tests for a mutant")
    parser.add_argument("--tests", action="append", metavar="ID", help="run these only, such as those that are new")
    parser.add_argument("--survivors", type=Path, default=ACCEPTED, help="accepted survivors with a reason each")
    parser.add_argument("--floor", type=float, default=1.0, help="the share killed, or accepted, that is enough")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    found = {path: mutants_of(path) for path in MODULES}
    named = set(options.module or MODULES)
    wanted = [path for path in MODULES if {path, *Path(path).with_suffix("").parts} & named]
    chosen = [mutant for path in wanted for mutant in found[path][1]]
    reasons = yaml.safe_load(options.survivors.read_text()) or {} if options.survivors.exists() else {}
    accepted = {(path, key) for path, keys in reasons.items() for key in keys}
    if options.changed:
        changed = changed_lines(options.changed)
        chosen = [m for m in chosen if changed[m.path] & set(m.lines) and (m.path, m.key) not in accepted]
    if options.again:
        printed = set(re.findall(r"(?m)^(\S+\.py):\d+  (.+?)(?:  \(not reached\))?$", options.again.read_text()))
        chosen = [m for m in chosen if (m.path, m.key) in printed]
    total = len(chosen)
    random.Random(options.seed).shuffle(chosen)  # so that those that were judged when time was up are a sample too
    if options.sample and options.sample < total:
        del chosen[options.sample :]
        print(f"a sample of {len(chosen)} of {total} mutants, seed {options.seed}", flush=True)
    if not chosen:
        print("no line that could be changed")
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    trees = {path: tree for path, (tree, _) in found.items()}
    plugin = Mutation(chosen, trees, options.jobs, options.minutes, options.patience)
    for mutant in chosen:  # a constant is the business of those modules too that use it
        modules = [mutant.path] if mutant.scope else [mutant.path, *(path for path, _ in reach(mutant, trees))]
        mutant.files = tuple(dict.fromkeys(test for path in modules for test in MODULES[path]))
    usual = dict.fromkeys(test for mutant in chosen for test in mutant.files)
    left_out = [f"--deselect={name}" for name in SLOW]
    quiet = ["-qq", "-p", "no:cacheprovider", "--tb=native", "--disable-warnings"]
    code = pytest.main([*quiet, *left_out, *(options.tests or usual)], plugins=[plugin])
    if code != pytest.ExitCode.OK:
        return int(code)

    for path in wanted:
        judged, alive = (sum(m.path == path for m in each) for each in (plugin.judged, plugin.survived))
        if judged:
            print(f"{path}: {judged - alive} of {judged} killed, {1 - alive / judged:.1%}")
    print(f"{plugin.stopped} of those killed were stopped for their time or crashed before a test")
    if left := len(chosen) - len(plugin.judged):
        print(f"time was up: {left} of {len(chosen)} were not judged")
    dead = {(m.path, m.key) for m in plugin.judged} - {(m.path, m.key) for m in plugin.survived}
    for path, key in sorted(accepted & dead):
        print(f"killed now, needs no reason any more: {path}  {key}")
    new = [m for m in plugin.survived if (m.path, m.key) not in accepted]
    print(f"{len(plugin.survived)} survived, {len(new)} of them without a reason in {options.survivors}")
    return int(len(new) > (1 - options.floor) * max(len(plugin.judged), FEWEST))


if __name__ == "__main__":
    sys.exit(main())
