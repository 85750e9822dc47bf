"""An adapter: what changes a base, and the card that says which base, for what, and how well.

On disk a plain PEFT folder (adapter_config.json, adapter_model.safetensors) with one file more, adapter_card.json; see
`dwindle.adapter_card`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dwindle.adapter_card import (
    CARD_FILE,
    CONFIG_FILE,
    SCHEMA,
    WEIGHTS_FILE,
    AdapterCard,
    require_adapter_place,
    require_whole,
    weights_sha256,
)
from dwindle.adapters.attach import attach, fill
from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.storage import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from peft import LoraConfig

    from dwindle.bundle import ModelBundle

__all__ = ["Adapter"]


@dataclass(frozen=True)
class Adapter:
    """PEFT's configuration, the weights under PEFT's names, and the card."""

    config: LoraConfig
    tensors: Mapping[str, Tensor]
    card: AdapterCard

    @property
    def sha256(self) -> str:
        """Return the hash of the weights."""
        return weights_sha256(self.tensors)

    @property
    def bytes(self) -> int:
        """Return the bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def on(self, base: ModelBundle) -> ModelBundle:
        """Return `base` with this adapter on it; raise RecipeError for another base than it was trained on."""
        found = base.content_sha256
        if found != self.card.base_sha256:
            raise RecipeError(
                f"adapter {self.card.task!r}: trained on {self.card.base_name} ({self.card.base_sha256[:12]}), this "
                f"base is {found[:12]}. An adapter fits the very codes it was trained on: take it, or train anew."
            )
        adapted = attach(base, self.config)
        fill(adapted.model, dict(self.tensors))
        return adapted

    def save(self, folder: Path | str) -> None:
        """Write the folder; the old state or the new one, never half.

        Raises OutputError for a place that holds something else than an adapter.
        """
        from safetensors.torch import save_file

        require_adapter_place(Path(folder))
        with atomic_folder(Path(folder)) as partial:
            self.config.save_pretrained(str(partial))
            _order_targets(partial / CONFIG_FILE)
            save_file({n: t.contiguous() for n, t in self.tensors.items()}, partial / WEIGHTS_FILE,
                      metadata={"format": "pt"})  # fmt: skip
            write_json(partial / CARD_FILE, {"schema": SCHEMA, **asdict(self.card), "sha256": self.sha256})

    @classmethod
    def load(cls, folder: Path | str) -> Adapter:
        """Return the adapter of a folder. Raises UnsupportedModel for a folder that is none, or damaged."""
        from peft import LoraConfig
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        card = AdapterCard.read(folder)
        try:
            config = LoraConfig.from_pretrained(str(folder))
            made = cls(config, load_file(folder / WEIGHTS_FILE), card)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UnsupportedModel(f"{folder}: the adapter cannot be read ({error}). Restore it.") from error
        require_whole(folder, made.tensors)
        return made


def _order_targets(path: Path) -> None:
    """Put the targets in order: PEFT writes a set, in another order every time, and equal adapters must hash alike."""
    config = read_json(path)
    if isinstance(config["target_modules"], list):
        write_json(path, {**config, "target_modules": sorted(config["target_modules"])})
