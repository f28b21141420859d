"""The architecture holds: packages import only from those named before them, heavy libraries only when used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "peftopt"
LAYERS = [
    "errors",
    "records",
    "identity",
    "stats",
    "jsonl",
    "progress",
    "machine",
    "store",
    "plugins",
    "corpus",
    "environments",
    "models",
]
LAYERS += [
    "recipe",
    "loadtest",
    "decision",
    "report",
    "canary",
    "merging",
    "transforms",
    "engines",
    "policies",
    "probes",
    "worker",
    "runner",
    "cli",
]
PURE = {"recipe", "decision", "report"}
EFFECTS = {"torch", "time", "datetime", "subprocess", "socket", "random", "shutil"}
HEAVY = set(
    [
        "torch",
        "transformers",
        "peft",
        "numpy",
        "scipy",
        "pandas",
        "matplotlib",
        "safetensors",
        "jinja2",
        "torchao",
        "httpx",
    ]
)
COMPILED = ROOT / "merging" / "kernel.py"  # numba compiles its functions when it is imported


def imports(tree: ast.Module, top_level_only: bool = False) -> Iterator[str]:
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*/**/*.py")) + sorted(ROOT.glob("[a-z]*.py")), ids=lambda path: path.stem
)
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    package, tree = path.relative_to(ROOT).parts[0].removesuffix(".py"), ast.parse(path.read_text())
    used, at_once = {*imports(tree)}, {*imports(tree, top_level_only=True)}
    ours = {name.split(".")[1] for name in used if name.startswith("peftopt.")} & {*LAYERS}
    assert ours <= {*LAYERS[: LAYERS.index(package) + 1]}
    assert package not in PURE or not EFFECTS & {name.split(".")[0] for name in used}
    assert path == COMPILED or not (HEAVY | {"peftopt.merging.kernel"}) & {
        *at_once,
        *(n.split(".")[0] for n in at_once),
    }


def test_help_imports_no_heavy_library() -> None:
    code = f"import sys, peftopt.cli; print(sorted({HEAVY!r} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
