"""Data to YAML that a person can read and change: expressions over several lines stay so. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from peftopt.records import JsonValue


class _Dumper(yaml.SafeDumper):
    """Without anchors, and with strings of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        """Repeat what occurs twice."""
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _string)


def as_yaml(head: Sequence[str], *documents: JsonValue) -> str:
    """A file of one or several documents, below lines of comment."""
    comment = "".join(f"# {' '.join(line.split())}\n" for line in head)
    parts = [yaml.dump(each, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118) for each in documents]
    return comment + "---\n".join(parts)
