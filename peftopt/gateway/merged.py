"""Whether a merged model is the live adapter merged: by its certificate, and by its answers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from peftopt import identity
from peftopt.canary.fingerprint import CLEAR, LEAST, Known, distance
from peftopt.errors import BROKEN
from peftopt.models.adapter import CONFIG, WEIGHTS
from peftopt.records import Json

CERTIFICATE = "parity.json"
KL_LIMIT = 4e-3
"""The KL divergence (nats a token) that a merge may have from its adapter, where its certificate did not measure the
adapter's own noise: twice that of a model of 135 million weights in bf16."""


@dataclass(frozen=True)
class Origin:
    """The origin of a merged model in its certificate: `base` is the hash of the base's config, `adapters` those of
    their weights' files; `kl_null`: the adapter's own noise in the output's dtype (nats a token), None if the
    certificate is not "full"."""

    base: str
    adapters: tuple[str, ...]
    passed: bool
    kl_null: float | None = None


def is_model(folder: Path) -> bool:
    """Whether a folder has a whole model, and not an adapter."""
    return (folder / "config.json").is_file() and not (folder / CONFIG).exists()


def origin(folder: Path) -> Origin | None:
    """The origin in the certificate of `peftopt merge`; None for a model without a readable one."""
    try:
        text = (folder / CERTIFICATE).read_text(encoding="utf-8")
        told = json.loads(text)
        values = {check["name"]: check["values"] for check in told["checks"]}.get("predictions", {})
        adapters = tuple(str(adapter["sha256"]) for adapter in told["adapters"])
        return Origin(str(told["base"]["config"]), adapters, bool(told["passed"]), _number(values.get("kl_null")))
    except (OSError, *BROKEN):
        return None


@dataclass(frozen=True)
class Compared:
    """A merged model compared with the live adapter by its certificate: `said`, the result in words, and whether it
    must answer as the adapter does, within `nats` of log-probability."""

    said: str
    must: bool
    nats: float

    def judged(self, known: Known, model: str, adapter: str, base: str) -> tuple[str, str]:
        """The result in words, and why the model is not the adapter; "" if it is, or need not be."""
        if not self.must:
            return self.said, ""
        if adapter not in known.prints:
            return self.said, f"{adapter} tells nothing to compare it with: --certify none puts it all the same"
        found = apart(known, model, adapter, base, self.nats)
        differs = f"{found.nats:.3f} nats from {adapter}, and {found.limit:.3f} are allowed"
        if found.nats > found.limit:
            return self.said, f"it does not answer as the adapter ({differs}; {self.said})"
        return f"{self.said}; it answers as that does ({differs})", ""


def against(found: Origin | None, base: Path | None, adapter: Path) -> Compared:
    """Compare the certificate with the adapter in that folder and with that base. A model merged from another adapter
    is a new version and need not answer as this one does."""
    kl = KL_LIMIT
    if found is None:
        return Compared(f"it has no {CERTIFICATE} that tells what it was merged from", True, tolerance(kl))
    if found.kl_null is not None:
        kl = 2 * found.kl_null + 1e-6  # as the merge was certified
    if identity.of_file(adapter / WEIGHTS) not in found.adapters:
        return Compared("its certificate names another adapter than the one that answers now", False, tolerance(kl))
    said = "its certificate names the adapter that answers now"
    if base and identity.of_file(base / "config.json") != found.base:
        said += ", but another base"
    elif base:
        said += " and its base"
    return Compared(said if found.passed else f"{said}, but the merge failed its own checks", True, tolerance(kl))


def tolerance(kl: float) -> float:
    """How far log-probabilities of the likeliest tokens may differ (nats) at a mean KL divergence. For two near
    distributions KL is half the mean square of that difference; at the worst position it is some times as large."""
    return max(LEAST, CLEAR * math.sqrt(2 * kl))


@dataclass(frozen=True)
class Apart:
    """How far a merged model is from the adapter, at the worst prompt: `nats` of log-probability, and the `limit`."""

    prompt: str
    nats: float
    limit: float


def apart(known: Known, merged: str, adapter: str, base: str, nats: float) -> Apart:
    """The prompt on which two of the known models differ most, as a share of the allowed difference. They may differ by
    `nats`, but at least by their noise, and at most by half of what the adapter changes of the base."""
    noise = max(known.margin(merged), known.margin(adapter))
    worst = Apart("", 0.0, max(nats, noise))
    for prompt, print_ in known.prints[merged].items():
        live = known.prints[adapter][prompt]
        limit = max(nats, noise)
        if base in known.prints:
            limit = max(noise, min(limit, distance(known.prints[base][prompt], live) / 2))
        found = Apart(prompt, distance(print_, live), limit)
        if found.nats / found.limit > worst.nats / worst.limit:
            worst = found
    return worst


def _number(value: Json) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
