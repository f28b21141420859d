"""GET of a server that is watched, once, without a connection that stays."""

from __future__ import annotations

import asyncio
import os

from peftopt.errors import MissingEnvironment
from peftopt.loadtest.http import Http, Lost, Unreachable, Whole

LONGEST_S = 30.0


def get(url: str, path: str, key: str, hint: str) -> Whole:
    """The answer to a GET, with a bearer `key` unless that is "". Raises MissingEnvironment with the hint where none
    comes within LONGEST_S."""

    async def asked() -> Whole:
        http = Http(url, {"Authorization": f"Bearer {key}"} if key else {}, LONGEST_S, os.environ)
        try:
            return await http.get(path)
        finally:
            await http.close()

    try:
        return asyncio.run(asked())
    except TimeoutError as error:
        raise MissingEnvironment(f"{url} did not answer within {LONGEST_S:.0f} s", hint) from error
    except (Unreachable, Lost) as error:
        raise MissingEnvironment(f"{url} does not answer: {error}", hint) from error
