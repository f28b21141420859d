"""Artifacts that machines share in a folder or a bucket: what is taken is whole, whoever dies and whoever else writes.

Machines are processes with results folders of their own. The bucket is of moto's server, for which s3fs and moto are
needed: without them its tests are skipped."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command, errors
from helpers.nodes import BUILD, FILES, Found, Node, make, nodes
from helpers.untimed import write_recipe

from peftopt import store
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.records import Artifact
from peftopt.runner import lease, process, remote
from peftopt.runner.remote import Remote

PLACES = ("folder", "bucket")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server, and credentials in the environment that it takes."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    serving = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    serving.start()
    host, port = serving.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "id-of-nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-nobody")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield f"http://{host}:{port}"
    serving.stop()


@pytest.fixture
def bucket(server: str, request: pytest.FixtureRequest) -> str:
    """The URL of an empty bucket."""
    import boto3

    name = "b" + str(abs(hash(request.node.nodeid)))
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/shared"


@pytest.fixture(params=PLACES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for artifacts."""
    return str(request.getfixturevalue("bucket")) if request.param == "bucket" else str(tmp_path / "shared")


def says(found: Found, *words: str) -> bool:
    return any(all(word in line for word in words) for line in found.said)


# ---- machines ------------------------------------------------------------------------------------


@pytest.mark.fault(8, "machines that share a store build an artifact once: the others wait, and take it")
def test_of_machines_that_need_an_artifact_at_once_one_builds_it(url: str, tmp_path: Path) -> None:
    at_once, later = nodes(url, tmp_path, [[Node(name, builds_s=1) for name in "abc"], [Node("d"), Node("e")]])
    assert sum(found.built for found in at_once) == 1
    assert not any(found.built for found in later)
    assert len({found.content for found in (*at_once, *later)}) == 1
    assert all(says(found, "is being built by process") for found in at_once if not found.built)


@pytest.mark.fault(8, "two that build the same artifact for a store at once leave one that is whole")
def test_whoever_else_writes_an_artifact_what_others_take_is_one_of_them(url: str, tmp_path: Path) -> None:
    """Their leases are gone, and no two of them have built the same bytes."""
    writers = [Node(name, builds_s=0.3, leases=False) for name in "abcd"]
    at_once, [one], [other] = nodes(url, tmp_path, [writers, [Node("e")], [Node("f")]])
    built = {found.content for found in at_once if found.built}
    assert len(built) > 1
    assert one.content == other.content and one.content in built
    assert not (one.built or other.built or says(one, "damaged") or says(other, "damaged"))


@pytest.mark.fault(1, "what a killed writer left in a store is never taken for an artifact: the next builds it there")
@pytest.mark.fault(9, "the lease of a machine that has died is taken over when it has been silent, with notice")
def test_a_writer_that_is_killed_anywhere_leaves_nothing_that_is_taken_for_whole(url: str, tmp_path: Path) -> None:
    [[whole]] = nodes(url, tmp_path, [[Node("whole")]])
    assert whole.operations > FILES + 2
    points = range(1, whole.operations + 1)
    asked: list[list[Node]] = []
    for at in points:
        names = (f"dead{at}", f"next{at}", f"last{at}", f"dead{at}")
        asked += [[Node(name, place=f"-{at}", stale_s=0.3)] for name in names]
        asked[-4] = [Node(f"dead{at}", dies_at=at, place=f"-{at}")]
    found = [found for [found] in nodes(url, tmp_path, asked)]
    for at, dead, following, last, again in zip(points, *(found[n::4] for n in range(4)), strict=True):
        assert dead.content == "", f"operation {at}: it was not killed"
        assert not any(says(each, "damaged") for each in (following, last, again)), f"operation {at}"
        assert not last.built and last.content == following.content, f"operation {at}"
        assert not again.built, f"operation {at}: it builds what it has, or what it could take"
    assert any(says(each, "taken over") for each in found)
    assert {each.built for each in found[1::4]} == {True, False}, "it was killed before it had put it there, and after"


@pytest.mark.fault(1, "a machine that is killed while it takes an artifact takes it again")
def test_a_reader_that_is_killed_anywhere_takes_it_again(url: str, tmp_path: Path) -> None:
    [[first], [whole]] = nodes(url, tmp_path, [[Node("first")], [Node("whole")]])
    assert whole.operations > FILES
    points = range(1, whole.operations + 1)
    asked = [[Node(f"r{at}", dies_at=dies)] for at in points for dies in (at, 0)]
    found = [found for [found] in nodes(url, tmp_path, asked)]
    for at, dead, again in zip(points, found[::2], found[1::2], strict=True):
        assert dead.content == "", f"operation {at}: it was not killed"
        assert not again.built and again.content == first.content, f"operation {at}"
        assert not [each.name for each in (tmp_path / f"r{at}").rglob("*.tmp.*")], f"operation {at}"


# ---- damage --------------------------------------------------------------------------------------


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def place(tmp_path: Path, said: list[str]) -> Remote:
    """A folder that machines share."""
    return remote.opened(str(tmp_path / "shared"), said.append, said.append)


@pytest.fixture
def machine(tmp_path: Path, place: Remote, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Artifact]:
    """What the machine of a name has obtained."""
    monkeypatch.setattr(lease, "LOOK_S", 0.01)

    def obtained(name: str) -> Artifact:
        home = store.Store(tmp_path / name)
        with home.locked(BUILD):
            return place.obtain(home, BUILD, make, tmp_path, lambda reached: None)

    return obtained


def shared_files(tmp_path: Path) -> list[Path]:
    """The files of artifacts that machines share, the largest last."""
    files = [file for file in (tmp_path / "shared" / "files").rglob("*") if file.is_file()]
    return sorted(files, key=lambda file: (file.stat().st_size, file.name))


def listing(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "shared" / "artifacts").rglob("*.json")
    return found


def flip(tmp_path: Path) -> None:
    file = shared_files(tmp_path)[-1]
    file.write_bytes(b"X" + file.read_bytes()[1:])


def cut(tmp_path: Path) -> None:
    file = shared_files(tmp_path)[-1]
    file.write_bytes(file.read_bytes()[:-1])


def lose(tmp_path: Path) -> None:
    shared_files(tmp_path)[-1].unlink()


def tear(tmp_path: Path) -> None:
    listing(tmp_path).write_bytes(listing(tmp_path).read_bytes()[:-9])


def rewrite(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(listing(tmp_path).read_bytes())
    change(values)
    listing(tmp_path).write_text(json.dumps(values))


def resize(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda values: values["manifest"].update(size_bytes=1))


def empty(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda values: values.update(files=[]))


@pytest.mark.parametrize("damage", [flip, cut, lose, tear, resize, empty])
@pytest.mark.fault(11, "an artifact of a store that machines share is named, not used, and built again for all")
def test_a_damaged_artifact_is_named_not_used_and_replaced(
    damage: Callable[[Path], None], tmp_path: Path, said: list[str], machine: Callable[[str], Artifact]
) -> None:
    first = machine("a")
    damage(tmp_path)
    said.clear()
    second = machine("b")
    assert not second.cached and second.content != first.content
    (told,) = [line for line in said if "is damaged" in line]
    assert BUILD.id[:12] in told and str(tmp_path / "shared") in told
    assert damage not in (flip, cut, lose) or ".safetensors" in told, "the file is named"
    said.clear()
    third = machine("c")
    assert third.cached and third.content == second.content
    assert not [line for line in said if "is damaged" in line]


def test_a_damaged_file_is_replaced_by_a_build_with_the_same_bytes(
    tmp_path: Path, said: list[str], machine: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the name and the size that it should have."""
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=1))
    first = machine("a")
    flip(tmp_path)
    second = machine("b")
    assert not second.cached and second.content == first.content
    said.clear()
    assert machine("c").cached and not [line for line in said if "is damaged" in line]


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "", ".", "a/../../b", "nul\0"])
def test_a_name_that_leads_elsewhere_is_never_written(
    name: str, tmp_path: Path, said: list[str], machine: Callable[[str], Artifact]
) -> None:
    """Its hashes are right: somebody has made it so."""
    machine("a")

    def renamed(values: dict[str, Any]) -> None:
        values["files"][0]["name"] = name
        manifest = values["manifest"]
        manifest["content"] = remote.identity.of_value([[file["name"], file["sha256"]] for file in values["files"]])
        manifest[store.SEAL] = store._seal(manifest)

    rewrite(tmp_path, renamed)
    assert not machine("b").cached
    assert any("lead elsewhere" in line for line in said)
    assert not (tmp_path / "outside").exists()


def test_another_artifacts_list_is_not_taken_for_this_ones(tmp_path: Path, machine: Callable[[str], Artifact]) -> None:
    machine("a")
    with pytest.raises(remote.Damaged):
        remote.read_shared(listing(tmp_path).read_bytes(), "cd" + "0" * 62)


# ---- what is kept --------------------------------------------------------------------------------


def test_what_lies_here_is_put_where_it_is_not_and_read_from_here(
    tmp_path: Path, machine: Callable[[str], Artifact]
) -> None:
    """As after a kill between a build and its way to the others, or where a folder is shared from today on."""
    home = store.Store(tmp_path / "a")
    home.build(BUILD, make)
    kept = machine("a")
    assert kept.cached and Path(kept.path).is_relative_to(tmp_path / "a")
    taken = machine("b")
    assert taken.cached and taken.content == kept.content and Path(taken.path).is_relative_to(tmp_path / "b")
    assert taken.facts == kept.facts


def test_who_may_not_read_the_base_may_not_read_what_others_made_of_it(
    tmp_path: Path, machine: Callable[[str], Artifact]
) -> None:
    machine("a")
    (tmp_path / "model.safetensors").touch(0o600)
    for file in Path(machine("b").path).rglob("*.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_that_only_its_owner_may_read_is_shared_so(
    tmp_path: Path, place: Remote, machine: Callable[[str], Artifact]
) -> None:
    def private(folder: Path) -> Any:
        model = make(folder)
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o600)
        return model

    home = store.Store(tmp_path / "a")
    home.build(BUILD, private)
    machine("a")
    assert {stat.S_IMODE(file.stat().st_mode) for file in shared_files(tmp_path)[1:]} == {0o600}


def test_an_artifact_that_has_changed_here_is_not_shared(
    tmp_path: Path, said: list[str], place: Remote, machine: Callable[[str], Artifact]
) -> None:
    home = store.Store(tmp_path / "a")
    built = home.build(BUILD, make)
    (Path(built.path) / store.MODEL / "config.json").write_text('{"changed": true}')
    place._put(built, lambda reached: None)
    assert any("changed" in line for line in said)
    assert not (tmp_path / "shared" / "artifacts").exists()


def test_a_place_that_stops_answering_stops_no_build(
    tmp_path: Path, said: list[str], machine: Callable[[str], Artifact]
) -> None:
    (tmp_path / "shared" / "artifacts").write_text("in the way")
    assert not machine("a").cached
    assert any("cannot read" in line and "built here" in line for line in said)


def test_who_waits_for_another_machine_stops_at_an_interrupt(
    tmp_path: Path, place: Remote, said: list[str], machine: Callable[[str], Artifact]
) -> None:
    place.objects.write(f"leases/{BUILD.id}.json", b'{"holder": "process 1 on elsewhere"}')
    process.interrupt()
    try:
        with pytest.raises(KeyboardInterrupt):
            machine("a")
    finally:
        process.calm()
    assert any("is being built by process 1 on elsewhere" in line for line in said)


def test_old_leftovers_of_killed_writers_are_removed_and_new_ones_stay(tmp_path: Path, place: Remote) -> None:
    aside = tmp_path / "shared" / "tmp"
    for name, days in (("old", 2), ("new", 0)):
        (aside / name).write_text("half")
        seconds = (aside / name).stat().st_mtime - days * 86400
        os.utime(aside / name, (seconds, seconds))
    remote.opened(str(tmp_path / "shared"), print, print)
    assert [file.name for file in aside.iterdir()] == ["new"]


# ---- what is refused -----------------------------------------------------------------------------


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(known, "registry", {})
    with pytest.raises(MissingEnvironment) as refused:
        remote.opened("s3://bucket/prefix", print, print)
    assert "peftopt[s3]" in refused.value.hint


@pytest.mark.parametrize(
    ("url", "word"),
    [("moon://bucket/prefix", "moon"), ("sftp://me:swordfish@host/place", "secret"), ("s3://", "bucket")],
)
def test_a_url_that_cannot_be_meant_is_bad_input(url: str, word: str) -> None:
    if url == "s3://":
        pytest.importorskip("s3fs")
    with pytest.raises(BadInput) as refused:
        remote.opened(url, print, print)
    assert word in refused.value.message and refused.value.hint and "swordfish" not in refused.value.message


def test_a_place_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / remote.MARK).write_text('{"format": 2}')
    with pytest.raises(BadInput, match="another peftopt"):
        remote.opened(str(tmp_path), print, print)


@pytest.mark.parametrize("trouble", ["bucket", "server", "credentials", "refused"])
def test_a_bucket_that_cannot_be_used_is_told_before_anything_is_built(
    trouble: str, bucket: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    url, word, hint = bucket, "", "credentials"
    with contextlib.ExitStack() as stack:
        if trouble == "bucket":
            url, word, hint = "s3://nowhere/shared", "not exist", "URL"
        if trouble == "server":
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            word, hint = "connect", "network"
        if trouble == "credentials":
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
            monkeypatch.setenv("HOME", str(tmp_path))
            word = "credentials"
        if trouble == "refused":
            requests.post(f"{server}/moto-api/reset-auth", data="0", timeout=30)
            stack.callback(requests.post, f"{server}/moto-api/reset-auth", data="inf", timeout=30)
        with pytest.raises(MissingEnvironment) as refused:
            remote.opened(url, print, print)
    s3fs.S3FileSystem.clear_instance_cache()
    assert url in refused.value.message and word in refused.value.message
    assert hint in refused.value.hint and "secret-of-nobody" not in refused.value.message


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, tiny_lora: Path) -> Path:
    return write_recipe(tmp_path, tiny_base, tiny_lora)


def built(results: Path) -> dict[str, Any]:
    """What a run says of the artifact that it used."""
    (run,) = (results / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "measurements.jsonl").read_text().splitlines()]
    (values,) = [each["values"] for each in lines if each["probe"] == "build" and each["values"]["id"]]
    return dict(values)


def test_what_one_run_has_built_another_machines_run_takes(url: str, recipe: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        code = command("run", recipe, "--results", tmp_path / name, "--artifacts", url, "--no-forecast", "--quiet")
        assert code in (0, 3), "its A/A arm may fail on a busy machine, which is not what is asked here"
    first, second = built(tmp_path / "a"), built(tmp_path / "b")
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["content"] == second["content"]


def test_a_run_that_may_not_share_ends_before_it_builds(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    options = ("--results", tmp_path / "results", "--artifacts", tmp_path / "file" / "shared")
    assert command("run", recipe, *options, "--quiet") == 4
    assert "cannot read" in errors(capsys)
    assert not (tmp_path / "results" / "artifacts").exists() and not (tmp_path / "results" / "runs").exists()
