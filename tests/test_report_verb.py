"""`peftopt report`: a part alone, a price, the browser, and decisions of older versions."""

from __future__ import annotations

import json
import shutil
import webbrowser
from pathlib import Path

import pytest
from helpers.command_line import command

from peftopt.report import parts

EXAMPLE = Path(__file__).parent.parent / "results" / "example" / "quick"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "quick"
    shutil.copytree(EXAMPLE, folder)
    return folder


def test_the_example_of_an_older_version_still_gives_its_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = json.loads((run / "decision.json").read_text())["chosen"]
    (run / "report.html").unlink()
    assert command("report", run) == 0
    assert f"Ship {chosen}" in capsys.readouterr().out
    assert f"Ship {chosen}" in (run / "report.html").read_text()


@pytest.mark.parametrize("name", ["scorecard", "rules", "answers", "failures"])
def test_a_part_is_printed_alone(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("report", run, "--only", name) == 0
    printed = capsys.readouterr().out
    assert parts.TITLES[name] in printed
    assert not any(title in printed for other, title in parts.TITLES.items() if other != name)


def test_every_command_on_the_page_is_one_that_the_verb_knows(run: Path) -> None:
    assert command("report", run) == 0
    page = (run / "report.html").read_text()
    shown = {line.partition("--only ")[2].partition("<")[0] for line in page.split("<code>")[1:] if "--only" in line}
    assert {"scorecard", "variants", "rules", "answers", "method", "words"} <= shown <= {*parts.TITLES}


def test_an_unknown_part_is_refused_with_the_names(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("report", run, "--only", "rulez") == 2
    assert "rules" in capsys.readouterr().err


def test_a_price_gives_the_cost_of_tokens_and_a_bad_one_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("report", run, "--price-per-hour", "2.10 EUR") == 0
    assert "EUR" in (run / "report.html").read_text() and "EUR" in (run / "report.md").read_text()
    assert command("report", run, "--price-per-hour", "cheap") == 2
    assert "2.10 USD" in capsys.readouterr().err


def test_a_price_in_the_recipe_is_every_reports_and_the_options_goes_before_it(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["recipe"]["price_per_hour"] = "3.5 CHF"
    (run / "plan.json").write_text(json.dumps(plan))
    assert command("report", run) == 0 and "CHF" in (run / "report.md").read_text()
    assert command("report", run, "--price-per-hour", "2.10 EUR") == 0
    assert "EUR" in (run / "report.md").read_text() and "CHF" not in (run / "report.md").read_text()


@pytest.mark.parametrize("has_browser", [True, False])
def test_open_shows_the_page_or_says_where_it_is(
    run: Path, has_browser: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []

    def browser(url: str) -> bool:
        opened.append(url)
        return has_browser

    monkeypatch.setattr(webbrowser, "open", browser)
    assert command("report", run, "--open") == 0
    assert opened == [(run / "report.html").resolve().as_uri()]
    assert ("no browser" in " ".join(capsys.readouterr().err.split())) != has_browser


def test_without_open_no_browser_is_started(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda url: pytest.fail("opened"))
    assert command("report", run) == 0
