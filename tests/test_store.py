"""A path that exists is whole, and what is not whole is set aside, never used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from peftopt import store
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.records import Build, Json, Measurement, Model, Step

BUILD = Build("ab" + "0" * 62, "", Step("merge", "transform", "merge"))


def make(out: Path) -> tuple[Model, dict[str, Json]]:
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"weights")
    return Model(str(out)), {"seconds": 1.5, "tier0": []}


def test_an_artifact_is_found_again_with_its_size_and_content(tmp_path: Path) -> None:
    home = store.Store(tmp_path)
    built = home.build(BUILD, make)
    found = home.find(BUILD)
    assert found is not None and found.cached and not built.cached
    assert (found.size_bytes, found.content) == (7, built.content)


def test_adapters_that_stay_apart_are_the_recipes_wherever_they_were_when_the_artifact_was_built(
    tmp_path: Path,
) -> None:
    """A folder of adapters may move: an artifact is found by what it was made from."""
    home = store.Store(tmp_path)
    packed = Build("cd" + "0" * 62, "", Step("int8", "transform", "quantize"))
    after = Build("ef" + "0" * 62, packed.id, Step("int4", "transform", "quantize"))

    def quantized(out: Path) -> tuple[Model, dict[str, Json]]:
        return Model(make(out)[0].path, ("/then/adapter",)), {"seconds": 1.5, "tier0": []}

    for build, fill in ((BUILD, make), (packed, quantized), (after, quantized)):
        home.build(build, fill)
    now = Model("/now/base", ("/now/adapter",))
    assert home.model(packed.id, now).adapters == home.model(after.id, now).adapters == now.adapters
    assert home.model(BUILD.id, now).adapters == (), "merged"


@pytest.mark.fault(11, "the hash does not match: it is set aside and built again, with notice")
def test_a_flipped_bit_sets_the_artifact_aside_with_notice(tmp_path: Path) -> None:
    warnings: list[str] = []
    home = store.Store(tmp_path, warnings.append)
    built = home.build(BUILD, make)
    Path(built.path, "model", "model.safetensors").write_bytes(b"weightz")
    assert home.find(BUILD) is None
    assert "does not match its hash" in warnings[0]
    assert home.build(BUILD, make).content == built.content


@pytest.mark.fault(4, "what was half built is freed")
def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    home = store.Store(tmp_path)

    def fail(out: Path) -> tuple[Model, dict[str, Json]]:
        out.mkdir()
        (out / "half").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        home.build(BUILD, fail)
    assert home.find(BUILD) is None
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []


@pytest.mark.fault(10, "the next build of the artifact removes it")
def test_the_temporary_folder_of_a_dead_builder_is_removed(tmp_path: Path) -> None:
    home = store.Store(tmp_path)
    orphan = home.folder(BUILD.id).with_name(BUILD.id + ".tmp.1")
    orphan.mkdir(parents=True)
    with home.locked(BUILD):
        home.build(BUILD, make)
    assert not orphan.exists()


def test_a_compile_cache_is_used_by_who_filled_it_and_by_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.claim(tmp_path / "model.compiled")
    (folder / "steps").mkdir()
    assert store.claim(folder) == folder
    monkeypatch.setattr(store, "ROOT", -2)
    monkeypatch.setattr(os, "getuid", lambda: -1)
    with pytest.raises(BadInput, match="another user") as refused:
        store.claim(folder)
    assert refused.value.hint


def test_one_cache_takes_in_another(tmp_path: Path) -> None:
    for name, text in (("old/a/1", "old"), ("old/b/2", "stays"), ("new/a/1", "new"), ("new/c/d/3", "new")):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    store.absorb(tmp_path / "new", tmp_path / "old")
    found = {str(f.relative_to(tmp_path)): f.read_text() for f in tmp_path.rglob("*") if f.is_file()}
    assert found == {"old/a/1": "new", "old/b/2": "stays", "old/c/d/3": "new"} and not (tmp_path / "new").exists()


@pytest.mark.parametrize("line", ['{"format": 2, "probe": "speed", "variant": "x"}', "not json", "[]", '{"format": 1}'])
@pytest.mark.fault(39, "refused with the line and the version, exit 2")
def test_another_format_or_a_broken_line_is_never_misread(tmp_path: Path, line: str) -> None:
    path = tmp_path / "measurements.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BadInput, match=r"measurements.jsonl:1"):
        store.read(path)


def test_a_line_that_lacks_a_field_is_named_with_its_number_and_the_field(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    store.append(path, Measurement("speed", "merged", values={"block": 0, "requests": []}))
    store.append(path, Measurement("speed", "merged", values={"block": 1}))
    with pytest.raises(BadInput, match=r"measurements.jsonl:2: speed.requests is missing") as refused:
        store.read(path)
    assert refused.value.hint


def test_lines_of_a_probe_that_is_not_known_are_left_out_with_notice(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    for probe in ("retry", "humidity", "retry", "humidity"):
        store.append(path, Measurement(probe, "merged"))
    warnings: list[str] = []
    assert [m.probe for m in store.read(path, warnings.append)] == ["retry", "retry"]
    (warning,) = warnings
    assert "'humidity'" in warning and "2 lines" in warning and "line 2" in warning


def test_what_is_written_is_what_was_given(tmp_path: Path) -> None:
    """The file keeps keys that no record has, and their order."""
    path = tmp_path / "measurements.jsonl"
    values: Json = {"requests": [], "colour": "red", "block": 2}
    store.append(path, Measurement("speed", "merged", "chat", 1, values, "2026-01-01"))
    assert json.loads(path.read_text()) == {
        "format": 1,
        **{"probe": "speed", "variant": "merged", "workload": "chat", "launch": 1},
        **{"values": values, "at": "2026-01-01"},
    }
    assert list(json.loads(path.read_text())["values"]) == list(values)


@pytest.mark.fault(7, "what is added later, by `load --out` or `import` too, is a line of its own")
def test_what_is_added_after_a_torn_line_is_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    for torn in (b'{"format": 1, "pro', b'{"format": 1}\n{"form', b"\xe2\x82"):
        path.write_bytes(torn)
        store.append(path, Measurement("retry", "merged"))
        assert json.loads(path.read_bytes().splitlines()[-1])["probe"] == "retry"
        assert path.read_bytes().count(b"\n") == torn.count(b"\n") + 1


def test_a_file_is_written_whole_and_leaves_no_temporary(tmp_path: Path) -> None:
    store.write(tmp_path / "decision.json", json.dumps({"a": 1}))
    assert [f.name for f in tmp_path.iterdir()] == ["decision.json"]


@pytest.mark.fault(5, "found before anything starts, exit 4")
def test_a_results_folder_that_cannot_be_written_is_an_environment_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MissingEnvironment, match="cannot write"):
        store.Store(tmp_path / "file").check_writable()
