"""The shape of the trade-off table: the limits of each technique, and the reader of each limit. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from peftopt.recipe.reader import Reader
from peftopt.recipe.sections import Limit
from peftopt.recipe.values import or_off, quantity, share, words

_TOKENS = or_off(quantity({"": 1, "tokens": 1}, 1, 1e9, "a number such as 2048 tokens, or off"))

_CRITICAL = share(0.0001, 0.99)  # no sample shows a rate of 0

_SAME_MODEL: Mapping[str, Reader[Limit]] = {
    "gain": share(0, 0.99),
    "parity": share(0, 1),
    "lost": share(0, 1),
    "critical_errors": _CRITICAL,
}
"""The rule of merge and bake, which give the same model without the adapter's cost."""

RULES: Mapping[str, Mapping[str, Reader[Limit]]] = {
    "variant": {"critical_errors": _CRITICAL},
    "merge": _SAME_MODEL,
    "bake": _SAME_MODEL,
    "quantize": {
        "critical_errors": _CRITICAL,
        "not_slower": share(0, 1),
        "smaller": share(0, 0.99),
        "gain": words({"speed": "speed", "memory": "memory"}),
    },
    "compile": {"gain": share(0, 0.99), "parity": share(0, 1), "critical_errors": _CRITICAL},
    "speculate": {"gain": share(0, 0.99), "parity": share(0, 1), "critical_errors": _CRITICAL},
    "prefix": {"gain": share(0, 0.99), "parity": share(0, 1), "critical_errors": _CRITICAL},
    "pack": {"gain": share(0, 0.99)},
    "truncate": {"over": _TOKENS, "gain": share(0, 0.99), "lost": share(0, 1)},
    "shorten": {"by": words({"max_new_tokens": 1.0, "off": None}), "gain": share(0, 0.99), "cut": share(0, 1)},
}
"""The shape of the trade-off table: technique -> the parts of its rule -> the reader of each limit."""

MEMORY = ("quantize", "gain")
"""The purpose of a quantizer, "speed" or "memory": no rule itself, it switches the rules on speed and size."""
