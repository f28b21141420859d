"""The architecture holds: packages import only from those named before them, heavy libraries only when used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent / "peftopt"
GROUND = "errors records metrics identity stats progress machine measurements corpus store plugins environments models"
LOW = "recipe loadtest decision report canary merging transforms engines policies probes"
LAYERS = f"{GROUND} {LOW} jobs server worker runner gateway cli".split()
PURE = {"recipe", "decision", "report"}
EFFECTS = {"torch", "time", "datetime", "subprocess", "socket", "random", "shutil"}
LIBRARIES = "torch torchao transformers peft numpy scipy pandas matplotlib safetensors jinja2 httpx"
HEAVY = {*f"{LIBRARIES} aiohttp starlette uvicorn fastapi prometheus_client orjson".split()}
COMPILED = ROOT / "merging" / "kernel.py"  # numba compiles its functions when it is imported
OWN_PROCESS = "server"  # nobody imports it: it is run


def imports(nodes: list[ast.stmt] | list[ast.AST]) -> set[str]:
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return plain | {str(n.module) for n in named} | {f"{n.module}.{alias.name}" for n in named for alias in n.names}


@pytest.mark.parametrize("path", [*ROOT.glob("[a-z]*.py"), *ROOT.glob("*/**/*.py")], ids=lambda path: path.stem)
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    package, tree = path.relative_to(ROOT).parts[0].removesuffix(".py"), ast.parse(path.read_text())
    used, at_once = imports([*ast.walk(tree)]), {name.split(".")[0] for name in imports(tree.body)}
    assert {n.split(".")[1] for n in used if n[:8] == "peftopt."} & {*LAYERS[LAYERS.index(package) + 1 :]} == set()
    assert package == OWN_PROCESS or "peftopt.server" not in "".join(used)
    assert package not in PURE or EFFECTS & {name.split(".")[0] for name in used} == set()
    assert (
        package == OWN_PROCESS
        or path == COMPILED
        or (HEAVY & at_once == set() and "peftopt.merging.kernel" not in imports(tree.body))
    )


def test_help_imports_no_heavy_library() -> None:
    code = f"import sys, peftopt.cli; print(sorted({HEAVY!r} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("path", TESTS.rglob("*.py"), ids=lambda path: path.stem)
def test_a_test_imports_no_other_test(path: Path) -> None:
    """What two of them need is in `helpers`."""
    used = {part for name in imports([*ast.walk(ast.parse(path.read_text()))]) for part in name.split(".")}
    assert used & {"tests", "conftest", *(file.stem for file in TESTS.glob("test_*.py"))} == set()
