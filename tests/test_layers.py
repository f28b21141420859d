"""The architecture holds: a module imports only from the lines above its own, and heavy libraries only when used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "peftopt"

LAYERS = (
    "errors",
    "records",
    "identity",
    # pure thought
    "thresholds",
    "stats",
    "jsonl",
    "traffic",
    "goodput",
    "prometheus",
    "fingerprint",
    "protocols",
    "reading",
    "recipe",
    "plan",
    "evidence",
    "figures",
    "rules",
    "need",
    "answers",
    "decide",
    "render",
    # hands
    "store",
    "moments",
    "machine",
    "progress",
    "provenance",
    "corpus",
    "events",
    "proxies",
    "client",
    "meters",
    "player",
    "load",
    "canary",
    "lifecycle",
    "checkpoint",
    "adapter",
    "template",
    "plugins",
    "environments",
    "hf",
    "preflight",
    "merging",
    "transforms",
    "engines",
    "policies",
    "probes",
    # conduct
    "worker",
    "child",
    "building",
    "oneshot",
    "runner",
    "console",
    "cli",
)
PURE = LAYERS[: LAYERS.index("store")]
HEAVY = {"torch", "transformers", "peft", "numpy", "scipy", "pandas", "matplotlib", "safetensors", "jinja2", "torchao"}
HEAVY |= {"httpx"}


def modules() -> list[Path]:
    return sorted(f for f in ROOT.rglob("*.py") if f.name != "__init__.py" or f.parent != ROOT)


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_imports_only_from_above(path: Path) -> None:
    own = LAYERS.index(layer(path))
    used = {name.split(".")[1] for name in imports(path, False) if name.startswith("peftopt.") and name.count(".")}
    assert {name for name in used & set(LAYERS) if LAYERS.index(name) > own} == set()


COMPILED = "merging/kernel.py"
"""Its functions are numba's when it is imported, which happens inside functions only."""


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_heavy_libraries_are_imported_only_inside_functions(path: Path) -> None:
    used = set(imports(path, True))
    assert path == ROOT / COMPILED or HEAVY & {name.split(".")[0] for name in used} == set()
    assert "peftopt.merging.kernel" not in used


@pytest.mark.parametrize("path", [p for p in modules() if layer(p) in PURE], ids=lambda p: p.stem)
def test_pure_modules_know_no_clock_no_process_and_no_torch(path: Path) -> None:
    effects = {"torch", "time", "datetime", "subprocess", "socket", "random", "shutil"}
    assert effects & {name.split(".")[0] for name in imports(path, False)} == set()


def test_help_imports_no_heavy_library() -> None:
    code = f"import sys, peftopt.cli; print(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
