"""Propose tokens that followed the last ones before, or a draft model's; the model verifies several in a step."""

from __future__ import annotations

from collections.abc import Callable

from peftopt import plugins
from peftopt.engines._speculation import Speculation as Params
from peftopt.policies import Messages, Request

PLUGIN = plugins.policy(Params, technique="speculate")


def apply(request: Request, params: Params, count: Callable[[Messages], int]) -> Request:
    """The request as it is: what is changed is how the engine answers it, which is opened with these parameters."""
    return request
