"""The adapters that an export carries beside its base: PEFT folders, read, and held to the base they were trained on.

All reasons why they cannot be carried come at once: a folder that is none or is damaged, an adapter of another base (by
the hash of config, codes and tokenizer), modules that the base does not have, shapes that differ there, two adapters of
one name. An adapter's name is that of its folder; an app asks for it by that name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dwindle.adapter_card import AdapterCard
from dwindle.anatomy import Anatomy
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError, UnsupportedModel, offenders
from dwindle.low_rank import LowRank
from dwindle.peft_folder import read_adapter

__all__ = ["CarriedAdapter", "carried_adapters", "read_adapters"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_RESERVED = ("base", "decode", "main", "none", "prefill")
"""Names that mean the base, or a function of it."""


@dataclass(frozen=True)
class CarriedAdapter:
    """One adapter of a base, by the name an app asks for."""

    name: str
    folder: Path
    card: AdapterCard
    changes: Mapping[str, LowRank]
    """The change of each linear, by the module's name."""

    @property
    def rank(self) -> int:
        """Return the largest rank of its changes."""
        return max(len(change.a) for change in self.changes.values())

    @property
    def kind(self) -> Literal["lora", "dora"]:
        """Return what its inputs have to carry."""
        return "dora" if self.scales_rows else "lora"

    @property
    def scales_rows(self) -> bool:
        """Return whether it sets the lengths of rows as well (DoRA)."""
        return any(change.magnitude is not None for change in self.changes.values())


def carried_adapters(bundle: ModelBundle, folders: Sequence[Path]) -> tuple[CarriedAdapter, ...]:
    """Return the adapters of these folders. Raises RecipeError with every reason why one does not fit this base."""
    return read_adapters(folders, bundle.content_sha256, bundle.anatomy) if folders else ()


def read_adapters(folders: Sequence[Path], sha256: str, anatomy: Anatomy) -> tuple[CarriedAdapter, ...]:
    """Return the adapters of these folders for the base of that hash; raises as `carried_adapters` does."""
    found, problems = [], []
    shapes = _shapes(anatomy)
    for folder in map(Path, folders):
        try:
            adapter = CarriedAdapter(folder.resolve().name, folder, AdapterCard.read(folder), read_adapter(folder))
        except UnsupportedModel as error:
            problems.append(str(error))
            continue
        found.append(adapter)
        problems += [f"{folder}: {problem}" for problem in _problems(adapter, sha256, shapes)]
    counts = Counter(re.sub(r"\W", "_", adapter.name) for adapter in found)
    twice = [f"{name} ({count} times)" for name, count in counts.items() if count > 1]
    if twice:
        problems.append(f"adapters are told apart by the names of their folders, and these are given more than once: "
                        f"{offenders(twice)}. Rename a folder.")  # fmt: skip
    if problems:
        raise RecipeError(f"export: {len(problems)} problems with adapters: {' '.join(problems)}")
    return tuple(found)


def _shapes(anatomy: Anatomy) -> dict[str, tuple[int, int]]:
    """Return (O, I) of each linear that an adapter may change."""
    return {name: anatomy.linear_shape(layer, part) for layer in range(anatomy.layers)
            for part, name in anatomy.parts(layer).items()}  # fmt: skip


def _problems(adapter: CarriedAdapter, sha256: str, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    problems, card = [], adapter.card
    if card.base_sha256 != sha256:
        problems.append(f"trained on {card.base_name} ({card.base_sha256[:12]}), this base is {sha256[:12]}. An "
                        "adapter fits the very codes it was trained on.")  # fmt: skip
    unknown = [name for name in adapter.changes if name not in shapes]
    if unknown:
        problems.append(
            f"{len(unknown)} of its modules are no linears of a layer of this base: {offenders(unknown, 6)}."
        )
    wrong = [
        f"{name} ({len(change.b)} x {change.a.shape[1]}, needed {' x '.join(map(str, shapes[name]))})"
        for name, change in adapter.changes.items()
        if name in shapes and (len(change.b), change.a.shape[1]) != shapes[name]
    ]
    if wrong:
        problems.append(
            f"{len(wrong)} of its changes have another shape than the base's linear: {offenders(wrong, 6)}."
        )
    if not _NAME.fullmatch(adapter.name) or adapter.name in _RESERVED:
        problems.append(f"an adapter cannot be named {adapter.name!r}: letters, digits, '_', '-' and '.', a letter "
                        f"first, and none of {', '.join(_RESERVED)}. Rename the folder.")  # fmt: skip
    return problems
