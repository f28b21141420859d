"""Keep the keys and values of what prompts begin with, and start later prompts that begin so from there."""

from __future__ import annotations

from collections.abc import Callable

from peftopt import plugins
from peftopt.engines._prefix import Reuse as Params
from peftopt.policies import Messages, Request

PLUGIN = plugins.policy(Params, technique="prefix")


def apply(request: Request, params: Params, count: Callable[[Messages], int]) -> Request:
    """The request as it is: what is changed is how the engine answers it, which is opened with these parameters."""
    return request
