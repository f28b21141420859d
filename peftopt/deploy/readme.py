"""The page beside all files of a run: what each is, by which decision, and how to use it. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from peftopt.deploy.chosen import Chosen, another
from peftopt.deploy.deployed import Exported, File
from peftopt.deploy.rendering import rendered

WHAT = {
    "peftopt": "the gateway and its engine, by hand",
    "vllm": "vLLM's own server, without the gateway",
    "sglang": "SGLang's server",
    "llamacpp": "llama.cpp's server",
    "gunicorn": "the gateway's workers by gunicorn",
    "systemd": "the gateway as a unit of systemd",
    "compose": "the gateway by Docker Compose",
    "k8s": "the gateway on Kubernetes",
    "monitoring": "what it is monitored by: alert rules and their tests, a dashboard, objectives",
}
"""What the files of each target start."""


@dataclass(frozen=True)
class Row:
    """A target's files as Markdown, what they start, and how; `notes` on it alone."""

    target: str
    files: str
    what: str
    use: str
    notes: tuple[str, ...]


def readme(chosen: Chosen, exports: Mapping[str, Exported], refusals: Mapping[str, str]) -> File:
    """The page. `exports` by target, each in a folder of its target's name; `refusals`: why a target has none."""
    having: dict[str, list[str]] = {}
    for target, exported in exports.items():
        for note in exported.notes:
            having.setdefault(note, []).append(target)
    shared = {note: targets for note, targets in having.items() if len(targets) > 1}
    rows = [_row(target, exported, shared) for target, exported in exports.items()]
    command = f"peftopt export {shlex.quote(chosen.folder)} --variant {chosen.decided.origin.variant}"
    whys: dict[str, list[str]] = {}
    for target, why in refusals.items():
        whys.setdefault(why, []).append(target)
    values = {"chosen": chosen, "another": another(chosen), "rows": rows, "command": command}
    return File("README.md", rendered("README.md", **values, shared=shared, whys=whys))


def _row(target: str, exported: Exported, shared: Collection[str]) -> Row:
    files = ", ".join(f"[{target}/{file.name}]({target}/{file.name})" for file in exported.files)
    notes = tuple(note for note in exported.notes if note not in shared)
    return Row(target, files, WHAT.get(target, target), exported.use, notes)
