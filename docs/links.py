"""A hook of MkDocs: a link out of docs/ names the file of the repository, since the site has no such page."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page, with the path of the file in place of a link out of docs/."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def named(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2].partition("#")[0]))
        return match[0] if path.startswith("docs/") else f"{match[1]} (`{path}`)"

    return LINK.sub(named, markdown)
