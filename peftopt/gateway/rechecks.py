"""Does each version that answers users still answer as itself? Asks it at intervals, beside the users."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from peftopt.gateway.asking import Asker, Full
from peftopt.gateway.itself import Check

if TYPE_CHECKING:
    from peftopt.gateway.lives import Lives


class Rechecks:
    """The checks of one gateway. Prompts are asked one at a time, and only while `asker` has room beside the users.

    One wrong round may be chance, so another follows at once. After the second the version is doubted: this is
    reported, and with `refuse` it answers no users until it answers as itself again.
    """

    def __init__(self, lives: Lives, asker: Asker, refuse: bool = False) -> None:
        self.lives, self.asker, self.refuse = lives, asker, refuse

    async def round(self) -> None:
        """Ask every version that answers users, one after the other."""
        routes = self.lives.table.routes.values()
        answering = [version.served for route in routes for _, version, weight in route.arms() if weight]
        for name in answering:
            if name in self.lives.table.served() and name not in self.lives.failures:
                await self.check(name)

    async def check(self, name: str) -> None:
        """Ask one version, a second time if it does not answer as itself, and act on the result."""
        check = await self._asked(name)
        if check and _is_another(check):
            check = await self._asked(name)
        if check is None or check.verdict == "unclear":
            return
        if check.verdict == "own":
            self.lives.trust(name)
        elif self.refuse:
            self.lives.refuse(name, check.why)
        else:
            self.lives.doubt(name, check.why)

    async def _asked(self, name: str) -> Check | None:
        return await self.lives.loader.one_by_one(name, lambda: self._place(name))

    @contextlib.asynccontextmanager
    async def _place(self, name: str) -> AsyncIterator[None]:
        """A place beside the users, as soon as there is one."""
        async with contextlib.AsyncExitStack() as stack:
            taken = False
            while not taken:
                await self.asker.room()
                with contextlib.suppress(Full):  # a user was quicker
                    await stack.enter_async_context(self.asker.place(name))
                    taken = True
            yield


def _is_another(check: Check) -> bool:
    return check.verdict in ("stale", "wrong")
