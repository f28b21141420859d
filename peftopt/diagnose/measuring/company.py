"""The adapters of a diagnosis: the user's, and more that are made if a question needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftopt.diagnose.measuring import making
from peftopt.diagnose.setting import Setting, abilities
from peftopt.errors import BadInput, PeftoptError
from peftopt.jobs import TransformJob
from peftopt.models.adapter import check_mergeable, highest_rank, open_adapter
from peftopt.models.baked import is_baked
from peftopt.records import Model

LIVE = 8
"""Adapters beside each other, where their number is asked about."""

PADDED = 8
"""How many times the adapter's rank the padded one has."""

MOST_RANK = 256
"""No rank is padded beyond."""

VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")
"""PEFT types that put virtual tokens before a prompt."""


@dataclass(frozen=True)
class Names:
    """Served names. `adapter`: the examined one, "" if there are only `prompts`, which put virtual tokens before a
    prompt. `others` are beside it, the user's first, then copies of it. `other_rank`: itself with the rank
    `padded_rank` in place of `rank`, "" if it cannot have another; `cut`: the adapter itself is padded, and
    `other_rank` has its zeros cut off. `folders`: the folder of each."""

    adapter: str = ""
    others: tuple[str, ...] = ()
    other_rank: str = ""
    rank: int = 0
    padded_rank: int = 0
    cut: bool = False
    prompts: tuple[str, ...] = ()
    folders: Mapping[str, str] = field(default_factory=dict)

    @property
    def live(self) -> tuple[str, ...]:
        """The adapter and those beside it, all of one kind."""
        return (self.adapter, *self.others)

    @property
    def all(self) -> tuple[str, ...]:
        """Every name but `prompts`."""
        return tuple(filter(None, (*self.live, self.other_rank)))


def kind_of(folder: str) -> str:
    """An adapter's PEFT type; "BAKED" for a baked prompt. Raises BadInput for what is neither."""
    return "BAKED" if is_baked(folder) else open_adapter(Path(folder)).kind


def gathered(setting: Setting, made: Path, note: Callable[[str], None]) -> Names:
    """The user's adapters and the missing ones, made below the folder `made`. Raises BadInput for a broken adapter.

    On a server that runs already only the user's adapters are loaded.
    """
    folders = {name: str(Path(folder).resolve()) for name, folder in setting.adapters.items()}
    prompts = tuple(name for name, folder in folders.items() if kind_of(folder) in VIRTUAL)
    layers = [name for name, folder in folders.items() if kind_of(folder) not in (*VIRTUAL, "BAKED")]
    if not layers:
        return Names(prompts=prompts, folders=folders)
    first, others = layers[0], layers[1:]
    plain = Names(first, tuple(others), prompts=prompts, folders=folders)
    can = abilities(setting.engine)
    if not (can.starts and can.apart):
        return plain
    copies = [f"{first}-copy-{number}" for number in range(1, LIVE - len(others))]
    if copies:
        note(f"{len(others) + 1} of {LIVE} adapters are given: the others are copies of {first}, which cost as much")
    folders |= {name: folders[first] for name in copies}
    return _ranked(replace(plain, others=(*others, *copies), folders=folders), made, note)


def _ranked(names: Names, made: Path, note: Callable[[str], None]) -> Names:
    """With the adapter in another rank."""
    folder = Path(names.folders[names.adapter])
    used, rank = making.used_rank(folder)
    padded = rank if 0 < used < rank else min(PADDED * rank, MOST_RANK)
    other = used if 0 < used < rank else padded
    if other == rank:
        note(f"the rank of {names.adapter} is not padded: {'it is not plain LoRA' if not rank else 'it is high'}")
        return replace(names, rank=rank or highest_rank(open_adapter(folder).config))
    name = f"{names.adapter}-rank-{other}"
    try:
        written = making.of_rank(folder, other, made / name)
    except BadInput as error:
        note(f"the rank of {names.adapter} is not padded: {error.message}")
        return replace(names, rank=rank)
    return replace(
        names,
        other_rank=name,
        rank=min(rank, other),
        padded_rank=padded,
        cut=other < rank,
        folders={**names.folders, name: str(written)},
    )


def merged(setting: Setting, names: Names, made: Path, note: Callable[[str], None]) -> str:
    """The folder of the base merged with the adapter, certified block by block; "" where it cannot be merged."""
    from peftopt.runner import single

    if not names.adapter or not abilities(setting.engine).starts:
        return ""
    out = made / "merged"
    model = Model(setting.base, (names.folders[names.adapter],))
    try:
        check_mergeable(open_adapter(Path(names.folders[names.adapter])))
        single.transform(TransformJob(plugin="merge", params={"certify": "blocks"}, model=model, out=str(out)))
    except PeftoptError as error:
        note(f"what merging gains is not measured: {error.message}")
        return ""
    return str(out)
