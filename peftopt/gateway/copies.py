"""Copies of adapters and merged models. Each is in a folder named by the hash of its files, and is whole or not there,
also after a power cut."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from peftopt import identity, store
from peftopt.errors import BadInput, unwritable
from peftopt.models import baked
from peftopt.models.adapter import CONFIG, WEIGHTS
from peftopt.models.folders import check_link

MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".safetensors", ".gguf")
"""What is copied of a merged model: all that engines read, and no pickles and no code."""
PIECE_BYTES = 2**20


def of_adapter(folder: Path) -> list[Path]:
    """The files of an adapter, or of a baked prompt, that engines read."""
    names = (baked.CONFIG, baked.WEIGHTS) if baked.is_baked(folder) else (CONFIG, WEIGHTS)
    return [folder / name for name in names]


def of_model(folder: Path) -> list[Path]:
    """The files of a model that engines read. Raises BadInput for a link to elsewhere."""
    files = sorted(file for file in folder.iterdir() if file.suffix in MODEL_FILES and file.is_file())
    for file in files:
        check_link(file, folder)
    return files


def take(files: Sequence[Path], into: Path) -> str:
    """Copy files into a folder below `into` that is named by their hash, and return it. A whole copy stays; a damaged
    one is replaced. Raises MissingEnvironment if the disk refuses."""
    temporary = into / f".{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        id_ = identity.of_value([[file.name, _copied(file, temporary / file.name)] for file in files])
        home = into / id_
        if not whole(home):
            shutil.rmtree(home, ignore_errors=True)
            store.move(temporary, home)
    except OSError as error:
        raise unwritable(into, error, "name another --state") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return id_


def whole(folder: Path) -> bool:
    """Whether a copy matches the hash in its name."""
    try:
        # In the order of `take`: an adapter's files are in it too, as their names are sorted.
        files = sorted(file for file in folder.iterdir() if file.is_file())
        return identity.of_value([[file.name, identity.of_file(file)] for file in files]) == folder.name
    except OSError:
        return False


def check(folder: Path) -> None:
    """Raises BadInput for a damaged copy."""
    if not whole(folder):
        raise BadInput("its copy is damaged: the files have another hash", "put the version again")


def _copied(file: Path, to: Path) -> str:
    """Copy a file; the SHA-256 (hex) of the bytes that were read."""
    digest = hashlib.sha256()
    with file.open("rb") as source, to.open("wb") as target:
        os.fchmod(target.fileno(), file.stat().st_mode & os.fstat(target.fileno()).st_mode | 0o600)  # private stays so
        while piece := source.read(PIECE_BYTES):
            digest.update(piece)
            target.write(piece)
    return digest.hexdigest()
