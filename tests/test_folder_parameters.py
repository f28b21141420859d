"""A plug-in's parameter may be a folder: where it is looked for, that it must be there, and that its content counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.chains import TRADEOFFS

from peftopt import plugins
from peftopt.cli.shared import params_of
from peftopt.errors import BadInput
from peftopt.recipe import parse, rewriting
from peftopt.recipe import plan as planning
from peftopt.records import NO_FOLDER, Folder, Plugin, Step
from peftopt.runner import preflight

RECIPE = """
model: {base: base, adapter: adapter}
workloads: {chat: {prompts: p.jsonl}}
variants: {adapter: [], small: [merge, {distil: {teacher: ../models/large, bits: 8}}]}
minimize: latency.p50@chat
"""


@dataclass(frozen=True)
class Distils:
    """A transform's parameters, with a folder."""

    teacher: Folder = NO_FOLDER
    bits: int = 4


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Plugin]:
    """With a transform that takes a folder, as another package may have it."""
    known = {**plugins.catalogue(), "distil": Plugin("distil", "transform", "Distil.", "quantize", Distils)}
    monkeypatch.setattr(plugins, "catalogue", lambda: known)
    return known


def test_a_folder_is_relative_to_the_recipe(catalogue: Mapping[str, Plugin]) -> None:
    recipe = parse.parse(RECIPE, "/recipes/own/chat.yaml", catalogue, TRADEOFFS)
    (_, step) = recipe.variants["small"].steps
    assert step.params == {"teacher": "/recipes/models/large", "bits": 8}
    assert plugins.folders(step) == {"teacher": Path("/recipes/models/large")}
    assert plugins.folders(Step("distil", "transform", "quantize", {"teacher": "", "bits": 8})) == {}
    assert plugins.folders(Step("a plug-in that is gone", "transform", "")) == {}


def test_a_recipe_that_moves_takes_its_folders_along(catalogue: Mapping[str, Plugin]) -> None:
    import yaml

    root = yaml.compose(RECIPE, Loader=yaml.SafeLoader)
    assert root is not None
    rewriting.make_absolute(root, Path("/recipes/own"))
    moved = parse.parse(rewriting.written(root), "/elsewhere/chat.yaml", catalogue, TRADEOFFS)
    assert moved.variants == parse.parse(RECIPE, "/recipes/own/chat.yaml", catalogue, TRADEOFFS).variants


def test_a_folder_that_is_not_there_is_refused_by_name(catalogue: Mapping[str, Plugin], tmp_path: Path) -> None:
    step = Step("distil", "transform", "quantize", {"teacher": str(tmp_path / "large"), "bits": 4})
    with pytest.raises(BadInput, match="distil: teacher: there is no folder") as refused:
        preflight.check_folders(step, "variant small: ")
    assert refused.value.hint
    (tmp_path / "large").write_text("a file")
    with pytest.raises(BadInput, match="no folder"):
        preflight.check_folders(step)
    (tmp_path / "large").unlink()
    (tmp_path / "large").mkdir()
    preflight.check_folders(step)


def test_on_the_command_line_a_folder_is_relative_to_where_one_is(
    catalogue: Mapping[str, Plugin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = params_of(catalogue["distil"], {"teacher": "large"}, ["bits=8"])
    assert found == {"teacher": str(tmp_path / "large"), "bits": 8}


def test_an_artifact_is_known_by_the_content_of_its_folders_wherever_they_lie() -> None:
    def named(folder: str, content: str) -> str:
        step = Step("distil", "transform", "quantize", {"teacher": folder, "bits": 4})
        sources = {"base": "b", "adapter": "a", "calibration": "", f"{planning.FOLDER}{folder}": content}
        return planning.artifact_id(step, planning.SOURCE, sources, {}, 0)

    assert named("/a/teacher", "1") == named("/b/teacher", "1") != named("/a/teacher", "2")
    plain = Step("distil", "transform", "quantize", {"bits": 4, "keep": "base"})
    sources = {"base": "b", "adapter": "a", "calibration": ""}
    other = {**sources, f"{planning.FOLDER}/a/teacher": "1"}
    assert planning.artifact_id(plain, "", sources, {}, 0) == planning.artifact_id(plain, "", other, {}, 0)


def test_two_machines_are_compared_by_the_names_of_folders() -> None:
    step = Step("distil", "transform", "quantize", {"teacher": "/a/large", "bits": 4, "args": "--at /a/b"})
    assert planning.by_name(step).params == {"teacher": "large", "bits": 4, "args": "--at /a/b"}
