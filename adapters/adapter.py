"""An adapter: what changes a base, and the card that says which base, for what, and how well.

On disk a plain PEFT folder (adapter_config.json, adapter_model.safetensors) with one file more, adapter_card.json:

    {"schema": 1, "base": {"name": ..., "sha256": ...}, "task": "recovery", "started_from": null | sha256,
     "metrics": {...}, "licence": ..., "options": {...}, "data": {...}, "dwindle": ..., "sha256": ...}

`sha256` of the base is that of its config, codes and tokenizer (`ModelBundle.content_sha256`): an adapter was trained
against one rounding of the weights, and against another it is noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dwindle
from dwindle.adapters.attach import attach, fill
from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.storage import atomic_folder, write_json

if TYPE_CHECKING:
    from peft import LoraConfig

    from dwindle.bundle import ModelBundle

__all__ = ["CARD_FILE", "Adapter", "AdapterCard"]

CARD_FILE = "adapter_card.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_SCHEMA = 1


@dataclass(frozen=True)
class AdapterCard:
    """What is known about an adapter."""

    base_name: str
    base_sha256: str
    task: str
    """`recovery`, or the task's own name."""
    started_from: str | None = None
    """sha256 of the adapter it was initialised from."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    licence: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    """sha256 of what it was trained on, by name."""
    dwindle: str = dwindle.__version__

    @classmethod
    def read(cls, folder: Path) -> AdapterCard:
        """Return the card of a folder; raise UnsupportedModel if there is none, or it is damaged."""
        path = folder / CARD_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("schema") != _SCHEMA:
                raise ValueError(f"a schema other than {_SCHEMA}")
            raw.pop("sha256", None)
            return cls(**raw)
        except FileNotFoundError as error:
            raise UnsupportedModel(f"{folder}: no {CARD_FILE}; it is no adapter folder of dwindle.") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UnsupportedModel(f"{path} cannot be read ({error}). Restore it.") from error


@dataclass(frozen=True)
class Adapter:
    """PEFT's configuration, the weights under PEFT's names, and the card."""

    config: LoraConfig
    tensors: Mapping[str, Tensor]
    card: AdapterCard

    @property
    def sha256(self) -> str:
        """Return the hash of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

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
        """Write the folder; the old state or the new one, never half."""
        from safetensors.torch import save_file

        with atomic_folder(Path(folder)) as partial:
            self.config.save_pretrained(str(partial))
            save_file({n: t.contiguous() for n, t in self.tensors.items()}, partial / WEIGHTS_FILE,
                      metadata={"format": "pt"})  # fmt: skip
            write_json(partial / CARD_FILE, {"schema": _SCHEMA, **asdict(self.card), "sha256": self.sha256})

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
        written = json.loads((folder / CARD_FILE).read_text(encoding="utf-8")).get("sha256")
        if written != made.sha256:
            raise UnsupportedModel(f"{folder}: {WEIGHTS_FILE} is not what its card was written for. Restore it.")
        return made
