"""YAML text -> nodes with their lines, without the parts of YAML that a recipe does not allow. Pure."""

from __future__ import annotations

import yaml
from yaml.reader import ReaderError

MAX_CHARACTERS = 2**20
"""Cap on a document's text. This and the two below are far above any real recipe, and far below what takes long."""

MAX_NODES = 2_000
"""Cap on a document's values, but for one that lists many models."""

MAX_DEPTH = 20
"""Cap on how deep a document's values are nested."""

Problem = tuple[int, str, str]
"""A mistake: its line, what is wrong, and a hint."""


class Unreadable(Exception):
    """A text that is not one YAML document, or uses YAML that a recipe does not allow; `problem` says where and why."""

    def __init__(self, line: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.problem: Problem = (line, message, hint)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without tags and aliases, and with a cap on depth and size."""

    depth = 0
    nodes = 0
    most = MAX_NODES

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        self.depth += 1
        self.nodes += 1
        refused = {
            "an anchor or an alias: write the value out": getattr(event, "anchor", None),
            "a YAML tag: remove it": getattr(event, "tag", None),
            f"nested more than {MAX_DEPTH} levels deep": self.depth > MAX_DEPTH,
            f"more than {self.most} values": self.nodes > self.most,
        }
        for message, is_there in refused.items():
            if is_there:
                raise Unreadable(event.start_mark.line + 1, message)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def compose(text: str, most: int = MAX_NODES) -> yaml.Node:
    """The root node of the one document in `text`, which may have so many values at `most`. Raises Unreadable."""
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(0, f"more than {MAX_CHARACTERS:,} characters", "check that it is the right file")
    loader = None
    try:
        loader = _Loader(text)
        loader.most = most
        root = loader.get_single_node()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(line, "a character that cannot be printed", "save it as UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        if any(written.lstrip(" ").startswith("\t") for written in text.splitlines()[line : line + 1]):
            raise Unreadable(line + 1, "indented with a tab", "YAML is indented with spaces") from error
        begun = error.context_mark.line if error.context_mark else line
        where = f"{error.context} that begins in line {begun + 1}: " if error.context and begun < line else ""
        raise Unreadable(line + 1, f"not YAML: {where}{error.problem}") from error
    except (ValueError, OverflowError) as error:  # an escape that is no character, such as "\UFFFFFFFF"
        raise Unreadable(loader.get_mark().line + 1 if loader else 0, f"not YAML: {error}") from error
    if root is None:
        raise Unreadable(1, "the file is empty", "docs/recipes.md shows what a recipe holds")
    return root
