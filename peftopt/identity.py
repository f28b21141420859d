"""Stable hashes of values, files and folders: a thing is named by what it holds, never by what it is called."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from peftopt.records import Json


def of_value(value: Json) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def of_folder(folder: Path, ignore: frozenset[str] = frozenset()) -> str:
    """SHA-256 (hex) over the folder's files: their relative names and their bytes. Of a link to a file, as the hub's
    cache is full of, the bytes it leads to; links to folders are not followed."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in ignore)
    return of_value([[f.relative_to(folder).as_posix(), of_file(f)] for f in files])
