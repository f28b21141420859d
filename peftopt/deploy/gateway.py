"""peftopt: a script that starts the gateway; and the options of `serve` that a run's decision gives. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from peftopt.deploy.deployed import Deployed, Exported
from peftopt.deploy.flags import Flag, Variable, grouped
from peftopt.deploy.scripts import Script
from peftopt.gateway.decided import NO_LIMITS, Decided
from peftopt.gateway.limits import DECISION


def options(decided: Decided, run: str, given: Sequence[str], engine: str) -> tuple[tuple[Flag, ...], tuple[Flag, ...]]:
    """The arguments of `serve` for a run as its folder is written, each with its reason, and those that are left.
    `given`: further options, of which `engine` is one where it is not "". They are taken as they are."""
    named = {word.partition("=")[0] for word in given}
    apart = f", with the adapter {decided.name} apart" if decided.model.adapters else ""
    flags = [Flag((run,), f"what it chose is served as {decided.name}{apart}, on {engine or decided.engine}")]
    left = []
    if "--variant" not in named:
        why = "what is served stays the same where the run is decided again"
        flags.append(Flag(("--variant", decided.origin.variant), why))
    if "--limits" not in named:
        limits = decided.limits if engine in ("", decided.engine) else None
        if limits:
            flags.append(Flag(("--limits", DECISION), str(limits)))
        else:
            left.append(Flag(("--limits",), f"the run tells none for this engine. To find some, {NO_LIMITS}"))
    return (*flags, *as_given(given)), tuple(left)


def as_given(words: Sequence[str]) -> tuple[Flag, ...]:
    """Options that a person has chosen."""
    return tuple(Flag(group, "as it was given to export") for group in grouped(words))


def exported(what: Deployed) -> Exported:
    """The script."""
    environment = Variable("PEFTOPT_ENVIRONMENTS", what.environments, "the engines that `peftopt env install` built")
    script = Script(
        "serve.sh",
        ("The gateway and its engine.", *what.decided),
        '"$PYTHON" -m peftopt.cli serve',
        what.flags,
        variables=(Variable("PYTHON", what.python, "the Python that has peftopt"),),
        environment=(environment,) if what.environments else (),
        left=what.left,
        folder=what.folder,
    )
    return Exported((script.file,), f"bash serve.sh; then ask http://{what.host}:{what.port}/v1", ())
