"""The docs say what the code is: generated pages are up to date, links lead somewhere, starters are all listed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from peftopt.cli.around import starters

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted(DOCS.rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "generate.py"))


SCHEMAS = [f"../schemas/{name}.schema.json" for name in ("recipe", "decision", "measurement", "diagnosis")]


@pytest.mark.parametrize("page", ["metrics.md", "cli.md", "deploying.md", "data.md", "faults.md", *SCHEMAS])
def test_a_generated_page_is_up_to_date(page: str, generator: dict[str, Any]) -> None:
    assert (DOCS / page).read_text() == generator["pages"]()[page], "run python docs/generate.py"


def test_no_terminal_changes_a_generated_page(generator: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = generator["cli_page"]()
    for name, value in (("COLUMNS", "40"), ("FORCE_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    assert generator["cli_page"]() == before


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_row_of_a_table_ends_on_its_line(page: Path) -> None:
    """Else the rest of the page is drawn into the table."""
    for line in page.read_text().splitlines():
        assert not line.startswith("| ") or line.rstrip().endswith("|"), line


def test_the_tests_that_security_names_are_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


def test_the_page_of_the_architecture_names_every_file_in_its_folders_row() -> None:
    page = (DOCS / "architecture.md").read_text()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    for file in (ROOT / "peftopt").rglob("*.py"):
        folder, *rest = file.relative_to(ROOT / "peftopt").parts
        if not rest:
            assert f"`{folder}`" in page or folder == "__init__.py", folder
        elif not file.stem.startswith("__"):
            named = f"`{file.stem}`" if len(rest) == 1 else f"`{rest[0]}/`"
            assert named in rows[f"{folder}/"], file


@pytest.mark.parametrize("name", starters())
def test_a_new_recipe_has_the_users_paths_and_is_otherwise_its_starter(name: str, tmp_path: Path) -> None:
    import yaml
    from typer.testing import CliRunner

    from peftopt.cli.shared import app

    paths = {"base": "b", "adapter": "a", "prompts": "p.jsonl"}
    options = [word for key, value in paths.items() for word in (f"--{key}", value)]
    assert CliRunner().invoke(app, ["new", str(tmp_path / "r.yaml"), "--like", name, *options]).exit_code == 0
    written, starter = (yaml.safe_load(file.read_text()) for file in (tmp_path / "r.yaml", starters()[name]))
    assert written["model"] == {"base": "b", "adapter": "a"}
    assert {workload["prompts"] for workload in written["workloads"].values()} == {"p.jsonl"}
    assert written["variants"] == starter["variants"] and written.keys() == starter.keys()


def test_new_and_the_page_of_recipes_list_every_starter() -> None:
    from typer.main import get_command

    from peftopt.cli.shared import app

    command: Any = get_command(app)
    (like,) = [option.help for option in command.commands["new"].params if option.name == "like"]
    files = {file.stem for file in (ROOT / "recipes").glob("*.yaml")} - {"tradeoffs"}
    assert set(starters()) == files
    assert {*re.findall(r"[\w-]+", like.partition(":")[2])} == files
    assert {*re.findall(r"^\| \[([\w-]+)\]\(\.\./recipes/", (DOCS / "recipes.md").read_text(), re.M)} == files
