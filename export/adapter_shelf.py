"""The adapters that a runner has at hand: which folders it takes, and which of them is in use.

A runner takes packaged adapters (`adapter_package.py`) of the very base that its artifact was made from, and swaps them
between texts: `activate(name)` begins a new text, because what the cache holds was computed with another model.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from dwindle.adapter_card import AdapterCard
from dwindle.errors import RecipeError, UnsupportedModel

__all__ = ["AdapterShelf"]

T = TypeVar("T")


class AdapterShelf(Generic[T]):
    """Adapters by name, in whatever form a runner needs them."""

    def __init__(self, artefact: Path, base_sha256: str, kind: str) -> None:
        """`kind` is `ExportOptions.adapter_inputs` of the artifact."""
        self._artefact, self.base_sha256, self.kind = artefact, base_sha256, kind
        self._held: dict[str, T] = {}
        self.active: str | None = None

    @property
    def names(self) -> Sequence[str]:
        """Return the names that may be activated."""
        return list(self._held)

    def file_of(self, folder: Path, file: str) -> Path:
        """Return the runtime's file of a packaged adapter that fits this artifact.

        Raises RecipeError for an artifact that is not ready for adapters or an adapter of another base,
        UnsupportedModel for a folder that is no packaged adapter of this runtime.
        """
        self.card_of(folder)
        if not (folder / file).is_file():
            raise UnsupportedModel(f"{folder} holds no {file}. Run: dwindle adapters package {folder} --for "
                                   f"{self._artefact} -o OUT")  # fmt: skip
        return folder / file

    def card_of(self, folder: Path) -> AdapterCard:
        """Return the card of an adapter that fits this artifact; raises as `file_of` does."""
        if self.kind == "none":
            raise RecipeError(f"{self._artefact} is not ready for adapters. Export the model again with --adapter, or "
                              "for ONNX and Core AI with --set adapter_inputs=lora.")  # fmt: skip
        card = AdapterCard.read(folder)
        if card.base_sha256 != self.base_sha256:
            raise RecipeError(
                f"{folder}: trained on {card.base_name} ({card.base_sha256[:12]}), {self._artefact} was made from "
                f"{self.base_sha256[:12]}. An adapter fits the very codes it was trained on."
            )
        return card

    def add(self, name: str, held: T) -> str:
        """Keep an adapter under its name, in place of an earlier one of that name; return the name."""
        self._held[name] = held
        return name

    def pick(self, name: str | None) -> T | None:
        """Return the adapter of that name, None for the base. Raises RecipeError for a name that is not known."""
        if name is not None and name not in self._held:
            near = difflib.get_close_matches(name, self._held, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            known = f"It has {', '.join(self._held)}." if self._held else "It has none."
            raise RecipeError(f"{self._artefact}: no adapter is named {name!r}{hint}. {known}")
        self.active = name
        return None if name is None else self._held[name]
