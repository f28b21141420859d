"""What may lie in a model's or an adapter's folder: files of its own. A link to elsewhere would carry what it leads to
into everything that is made from the folder."""

from __future__ import annotations

import stat
from collections.abc import Collection
from pathlib import Path

from peftopt import store
from peftopt.errors import BadInput

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".xml", ".h5", ".msgpack", ".onnx")
"""Endings of files with weights, which are read as tensors and never copied as they are."""


def check_link(file: Path, folder: Path) -> None:
    """A link may lead to the blobs of the hub's own cache layout, and nowhere else outside the folder."""
    target, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in target.parents and blobs not in target.parents:
        raise BadInput(f"{file} is a link to {target}, outside its folder", "copy the file itself")


def check_files(folder: Path, but: Collection[str] = ()) -> None:
    """Raises BadInput for a link that leads out of the folder, and for a pipe, socket or device, which never ends.

    `but`: endings of files that may be links to elsewhere.
    """
    for file in folder.rglob("*"):
        if file.is_symlink() and file.suffix not in but:
            check_link(file, folder)
        if file.exists():
            store.check_file(file)


def keep_private(out: Path, source: Path) -> None:
    """Narrow the modes of a new folder's weights to those of the model that it was made of: who may not read that, may
    not read these either. The owner may always write. An adapter's mode says nothing: safetensors writes every file for
    its owner alone."""
    mode = 0o666
    for file in source.iterdir():
        if file.suffix in WEIGHTS and file.is_file():
            mode &= file.stat().st_mode | 0o600
    for file in out.rglob("*"):
        if file.suffix in WEIGHTS and file.is_file():
            file.chmod(stat.S_IMODE(file.stat().st_mode) & mode)
