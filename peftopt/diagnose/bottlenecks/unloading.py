"""Memory kept after an unload: loads and unloads adapters on a server of the diagnosis, until the result is known or
time is over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peftopt.diagnose.measuring.cells import Launch
from peftopt.diagnose.measuring.company import Names
from peftopt.diagnose.measuring.passing import Pass
from peftopt.diagnose.records import Bottleneck, Row
from peftopt.diagnose.rows import costs
from peftopt.diagnose.rows.parts import alone
from peftopt.diagnose.setting import Setting, abilities
from peftopt.diagnose.unloading import cycles
from peftopt.engines._server import Server
from peftopt.errors import PeftoptError
from peftopt.loadtest import arrivals
from peftopt.loadtest.protocols import Prompt, Target
from peftopt.models.adapter import highest_rank, open_adapter

NAME: Bottleneck = "unloading"
PART = "memory at rest"
PROMPTS = 8


@dataclass(frozen=True)
class Launched:
    """A server of the diagnosis, for cycles."""

    target: Target
    server: Server

    def processes(self) -> list[int]:
        """Its process ids."""
        return list(self.server.processes())


async def rows(diagnosed: Pass) -> list[Row]:
    """Run cycles, and judge the memory that is kept."""
    setting, names, servers = diagnosed.setting, diagnosed.names, diagnosed.servers
    if not diagnosed.abilities.loads:
        return [costs.not_asked(NAME, PART, f"{setting.engine} loads no adapters while it runs")]
    launch = alone(setting, names) if names.adapter else Launch()
    folders = fitting(setting, names, launch)
    if not folders:
        return [costs.not_asked(NAME, PART, f"{setting.engine} can load none of these adapters")]
    await servers.up([launch])
    target = servers.client(launch).target
    started = servers.servers.get(launch)
    server = Launched(target, started) if started else cycles.Elsewhere(target)

    def show(done: int, how: str) -> None:
        if done in cycles.SHOWN:
            diagnosed.tell(f"{NAME}: {done} cycles, {how}")

    try:
        found = await cycles.measure(server, folders, asked(diagnosed), diagnosed.left_s, show)
    except PeftoptError as error:
        return [costs.not_asked(NAME, PART, error.message)]
    return list(found)


def fitting(setting: Setting, names: Names, launch: Launch) -> list[Path]:
    """The adapters that this server can load and unload, of different ranks if there are some."""
    if not names.adapter:
        virtual = names.prompts if abilities(setting.engine).virtual else ()
        return [Path(names.folders[name]) for name in virtual]
    folders = [Path(folder) for folder in dict.fromkeys(names.folders[name] for name in names.all)]
    ranks = {folder: highest_rank(open_adapter(folder).config) for folder in folders}
    return [folder for folder in folders if not launch.rank or ranks[folder] <= launch.rank]


def asked(diagnosed: Pass) -> list[Prompt]:
    """The first of the user's prompts, or made-up ones."""
    messages = diagnosed.servers.messages(PROMPTS)
    if messages:
        return [Prompt(messages=tuple(each)) for each in messages]
    texts = [arrivals.made_up(diagnosed.setting.prompt_tokens, number) for number in range(PROMPTS)]
    return [Prompt(({"role": "user", "content": text},), text) for text in texts]
