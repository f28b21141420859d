"""Stable hashes of values, files and folders: a thing is named by what it holds, never by what it is called."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from peftopt.errors import BadInput
from peftopt.records import Json

SHA256 = re.compile("[0-9a-f]{64}")

NOTES = Path(".cache", "huggingface", "download")
"""Where the hub's client keeps a note of each file that it has put into a folder of the user's."""


def of_value(value: Json) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def of_download(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes. Raises BadInput where the hub's client knows it by another: it is damaged."""
    is_, was = of_file(file), _downloaded(file)
    if was and is_ != was:
        raise BadInput(
            f"{file} is not what was downloaded: its SHA-256 is {is_[:12]}…, the hub's {was[:12]}…",
            f"it is damaged, or was changed: remove {file.resolve()} and download it again, or copy it elsewhere",
        )
    return is_


def _downloaded(file: Path) -> str:
    """The SHA-256 by which the hub's client knows a file, "" where it knows none: large files have one, in its cache as
    the name of what a link leads to, elsewhere in a note, which counts until the file is written to."""
    target = file.resolve()
    note = file.parent / NOTES / f"{file.name}.metadata"
    if target.parent.name == "blobs":
        known = target.name
    else:
        try:
            _, known, moment = note.read_text(encoding="utf-8").splitlines()[:3]
            if file.stat().st_mtime > float(moment) + 1:
                return ""
        except (OSError, ValueError):
            return ""
    return known if SHA256.fullmatch(known) else ""


def of_folder(folder: Path, ignore: frozenset[str] = frozenset()) -> str:
    """SHA-256 (hex) over the folder's files: their relative names and their bytes. Of a link to a file, as the hub's
    cache is full of, the bytes it leads to; links to folders are not followed. Raises as `of_download` does."""
    return of_value(of_files(folder, ignore))


def of_files(folder: Path, ignore: frozenset[str] = frozenset()) -> list[list[str]]:
    """The relative name and the SHA-256 (hex) of each file of a folder, from which `of_folder` is made."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in ignore)
    return [[f.relative_to(folder).as_posix(), of_download(f)] for f in files]
