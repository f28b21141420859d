"""The files by which others start the gateway: gunicorn, systemd, Compose, Kubernetes. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from peftopt.deploy.deployed import Deployed, Exported, File
from peftopt.deploy.rendering import rendered

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
    tries = math.ceil(what.times.start.seconds / PERIOD_S)
    return File(name, rendered(name, what=what, times=what.times, period_s=PERIOD_S, tries=tries, uid=UID))
