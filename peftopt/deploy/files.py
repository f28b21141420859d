"""The files of each target, from their templates. Pure but for the templates, which come with the package."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftopt.deploy.deployed import Deployed, Exported, File

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
PERIOD_S = 10
"""Seconds between two questions whether a container is ready or alive."""
UID = 10001
"""The user in the image: not root."""


def gunicorn(what: Deployed) -> Exported:
    """A configuration by which gunicorn starts the workers, and beside them the supervisor."""
    files = (_file("gunicorn.conf.py", what),)
    use = "pip install gunicorn uvicorn-worker; gunicorn -c gunicorn.conf.py"
    note = "peftopt serve --workers does the same without gunicorn, and spreads a burst of connections better"
    return Exported(files, use, (note, *_cut(what)))


def systemd(what: Deployed) -> Exported:
    """A unit."""
    use = "cp peftopt.service /etc/systemd/system/; systemctl daemon-reload; systemctl enable --now peftopt"
    return Exported((_file("peftopt.service", what),), use, _cut(what))


def compose(what: Deployed) -> Exported:
    """A Compose file and the Dockerfile of its image."""
    files = (_file("compose.yaml", what), _file("Dockerfile", what))
    use = f"docker build -t {what.image} -f Dockerfile CLONE; docker compose up -d"
    return Exported(files, use, _cut(what))


def k8s(what: Deployed) -> Exported:
    """A Deployment, a Service and a claim for the models, and the Dockerfile of the image."""
    files = (_file("peftopt.yaml", what), _file("Dockerfile", what))
    use = f"docker build -t {what.image} -f Dockerfile CLONE; kubectl apply -f peftopt.yaml"
    return Exported(files, use, _cut(what))


TARGETS: Mapping[str, Callable[[Deployed], Exported]] = {
    "gunicorn": gunicorn,
    "systemd": systemd,
    "compose": compose,
    "k8s": k8s,
}


def _cut(what: Deployed) -> tuple[str, ...]:
    return (what.times.cut,) if what.times.cut else ()


def _file(name: str, what: Deployed) -> File:
    values: dict[str, Any] = {
        "what": what,
        "times": what.times,
        "period_s": PERIOD_S,
        "tries": math.ceil(what.times.start.seconds / PERIOD_S),
        "uid": UID,
    }
    return File(name, _templates().get_template(f"{name}.j2").render(values))


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"json": json.dumps, "shell": shlex.join, "unit": unit_word, "comment": _comment}
    return found


def unit_word(word: str) -> str:
    """A word of ExecStart= that systemd takes as it is: % and $ stand for something there (systemd.service(5))."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    plain = escaped and not any(c.isspace() or c in "\"';\\" for c in word)
    return escaped if plain else f'"{escaped}"'


def _comment(text: str) -> str:
    """Words that end no comment."""
    return " ".join(text.split())
