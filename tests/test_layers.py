"""The architecture holds: packages import only from those named before them, heavy libraries only when used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "peftopt"
GROUND = (
    "docstrings errors redaction records forms metrics identity stats progress machine measurements corpus store "
    "scratch plugins environments forking models"
)
LOW = "recipe loadtest decision report gate canary merging transforms engines policies probes"
LAYERS = f"{GROUND} {LOW} jobs server worker runner gateway watch diagnose deploy schema api cli".split()
STEPS = "measuring keeping planning rows bottlenecks screen page diagnosing"
DIAGNOSE = f"records setting judging unloading {STEPS}".split()
PURE = {"recipe", "decision", "report", "gate"}
IMPURE = {"torch", "time", "datetime", "subprocess", "socket", "random", "shutil", "peftopt.records.Json"}
LIBRARIES = "torch torchao transformers peft numpy scipy pandas matplotlib safetensors jinja2 aiohttp"
HEAVY = {*f"{LIBRARIES} aiohttp starlette uvicorn fastapi prometheus_client orjson opentelemetry pynvml".split()}
RUN = {ROOT / "merging" / "kernel.py", *(ROOT / "server").glob("*.py")}  # imported in a function, or run: by no module


def imports(nodes: list[ast.stmt] | list[ast.AST]) -> set[str]:
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return plain | {str(n.module) for n in named} | {f"{n.module}.{alias.name}" for n in named for alias in n.names}


@pytest.mark.parametrize("path", [*ROOT.glob("[a-z]*.py"), *ROOT.glob("*/**/*.py")], ids=lambda path: path.stem)
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    package, tree = path.relative_to(ROOT).parts[0].removesuffix(".py"), ast.parse(path.read_text())
    used, at_once = imports([*ast.walk(tree)]), imports(tree.body)
    assert {n.split(".")[1] for n in used if n[:8] == "peftopt."} & {*LAYERS[LAYERS.index(package) + 1 :]} == set()
    assert package not in PURE or IMPURE & ({name.split(".")[0] for name in used} | used) == set()  # Json is Any
    heavy = HEAVY & {name.split(".")[0] for name in at_once} or "peftopt.merging.kernel" in at_once
    assert path in RUN or not heavy


@pytest.mark.parametrize("path", (ROOT / "diagnose").glob("**/[a-z]*.py"), ids=lambda path: path.stem)
def test_a_part_of_diagnose_imports_only_parts_before_it(path: Path) -> None:
    part, tree = path.relative_to(ROOT / "diagnose").parts[0].removesuffix(".py"), ast.parse(path.read_text())
    used = {name.split(".")[2] for name in imports([*ast.walk(tree)]) if name[:17] == "peftopt.diagnose."}
    assert used & {*DIAGNOSE[DIAGNOSE.index(part) + 1 :]} == set()


def test_help_imports_no_heavy_library() -> None:
    code = f"import sys, peftopt.cli; print(sorted({HEAVY!r} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
