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
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "generate.py"))


@pytest.mark.parametrize("page", ["metrics.md", "cli.md"])
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


def test_new_and_the_page_of_recipes_list_every_starter() -> None:
    from typer.main import get_command

    from peftopt.cli.shared import app

    command: Any = get_command(app)
    (like,) = [option.help for option in command.commands["new"].params if option.name == "like"]
    files = {file.stem for file in (ROOT / "recipes").glob("*.yaml")} - {"tradeoffs"}
    assert set(starters()) == files
    assert {*re.findall(r"[\w-]+", like.partition(":")[2])} == files
    assert {*re.findall(r"^\| \[([\w-]+)\]\(\.\./recipes/", (DOCS / "recipes.md").read_text(), re.M)} == files
