"""What holds of the tests themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", TESTS.rglob("*.py"), ids=lambda path: path.stem)
def test_a_test_imports_no_other_test(path: Path) -> None:
    """What two of them need is in `helpers`."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    parts = {part for name in names for part in name.split(".")}
    assert parts & {"tests", "conftest", *(file.stem for file in TESTS.glob("test_*.py"))} == set()
