"""Folders of models and adapters: what they hold is what they are, and nothing from elsewhere comes along."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from helpers.command_line import command, errors

from peftopt import identity, store
from peftopt.errors import BadInput
from peftopt.gateway import copies

SECRET = "the secret of another file"


def hub_cache(model: Path, home: Path) -> Path:
    """The model as the hub's cache keeps it: a snapshot that is all links to blobs."""
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_named_by_what_its_links_lead_to(tiny_base: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tiny_base, tmp_path / "models--a--b")
    assert identity.of_folder(snapshot) == identity.of_folder(tiny_base)
    assert store.size(snapshot) == store.size(tiny_base) > 0
    blob = (snapshot / "config.json").resolve()
    blob.write_text(blob.read_text() + " ")
    assert identity.of_folder(snapshot) != identity.of_folder(tiny_base)


@pytest.mark.parametrize("where", ["adapter", "base"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "additional_chat_templates/tool.jinja"])
@pytest.mark.fault(28, "refused; nothing of what it leads to is written")
def test_nothing_that_a_link_leads_to_lands_in_a_merged_model(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, where: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"base": tmp_path / "base", "adapter": tmp_path / "adapter"}
    shutil.copytree(tiny_base, folders["base"])
    shutil.copytree(tiny_lora, folders["adapter"])
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    link = folders[where] / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    out = tmp_path / "out"
    assert command("merge", "--base", folders["base"], "--adapter", folders["adapter"], "--out", out) == 2
    assert "is a link to" in errors(capsys)
    assert not out.exists()
    written = [file for file in tmp_path.rglob("*") if file.is_file() and file not in (secret, link)]
    assert not [file for file in written if SECRET in file.read_text(errors="replace")]


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copytree(tiny_lora, tmp_path / "adapter")
    pipe = tmp_path / ("adapter" if name.startswith("adapter") else "base") / name
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    models = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    assert command("merge", *models, "--out", tmp_path / "out") == 2
    assert name in errors(capsys)


def test_a_failed_merge_leaves_what_the_user_keeps_beside_it(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    mine = tmp_path / "weak.failed" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    models = ("--base", tiny_base, "--adapter", f"{tiny_lora}=0.003")
    assert command("merge", *models, "--out", tmp_path / "weak") == 1
    assert mine.read_text() == "mine" and (tmp_path / "weak.failed.2" / "parity.json").exists()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_who_may_not_read_the_base_may_not_read_the_merged_model(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, mode: int
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").chmod(mode)
    out = tmp_path / "out"
    assert command("merge", "--base", tmp_path / "base", "--adapter", tiny_lora, "--out", out) == 0
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == mode & 0o644 | 0o600


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_weights_of_mode_0600_stay_so_through_every_verb_and_in_the_gateways_copy(
    mode: int, tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").chmod(mode)
    words = ("--base", tmp_path / "base", "--adapter", tiny_lora, "--certify", "blocks")
    assert command("merge", *words, "--out", tmp_path / "merged") == 0
    assert command("quantize", "--model", tmp_path / "merged", "--method", "int8", "--out", tmp_path / "int8") == 0
    taken = copies.take(copies.of_model(tmp_path / "int8"), tmp_path / "state")
    for folder in (tmp_path / "merged", tmp_path / "int8", tmp_path / "state" / taken):
        modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.glob("*.safetensors")}
        assert modes == {0o600} or (mode != 0o600 and modes == {mode}), folder


def test_a_compile_cache_that_others_may_write_to_is_not_loaded(tmp_path: Path) -> None:
    everybodys = tmp_path / "everybodys"
    (everybodys / "mine").mkdir(parents=True)
    link = tmp_path / "base.compiled"
    link.symlink_to(everybodys / "mine")
    assert store.claim(link) == link
    everybodys.chmod(0o777)
    with pytest.raises(BadInput, match="every user may write"):
        store.claim(link)
    everybodys.chmod(0o1777)
    assert store.claim(link) == link, "where nobody may rename what is another's, as in /tmp"
    (everybodys / "mine").chmod(0o1777)
    with pytest.raises(BadInput, match="every user may write"):
        store.claim(link)
