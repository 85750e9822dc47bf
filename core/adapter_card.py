"""What is known about an adapter: which base it changes, for what, how well, and under which licence.

One file of an adapter's folder, adapter_card.json, beside PEFT's own two:

    {"schema": 1, "base_name": ..., "base_sha256": ..., "task": "recovery", "started_from": null | sha256,
     "metrics": {...}, "licence": ..., "options": {...}, "data": {...}, "dwindle": ..., "sha256": ...}

`base_sha256` is that of the base's config, codes and tokenizer (`ModelBundle.content_sha256`): an adapter was trained
against one rounding of the weights, and against another it is noise. `sha256` is that of the adapter's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dwindle
from dwindle.errors import UnsupportedModel
from dwindle.storage import read_json, require_place
from dwindle.typed_json import require_types

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CARD_FILE", "CONFIG_FILE", "SCHEMA", "WEIGHTS_FILE", "AdapterCard", "require_adapter_place",
           "require_whole", "weights_sha256"]  # fmt: skip

CARD_FILE = "adapter_card.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
SCHEMA = 1


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
            raw = dict(read_json(path))
            if raw.pop("schema") != SCHEMA:
                raise ValueError(f"a schema other than {SCHEMA}")
            raw.pop("sha256", None)
            card = cls(**raw)
            require_types(card)
            return card
        except FileNotFoundError as error:
            raise UnsupportedModel(f"{folder}: no {CARD_FILE}; it is no adapter folder of dwindle.") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UnsupportedModel(f"{path} cannot be read ({error}). Restore it.") from error


def require_adapter_place(folder: Path) -> None:
    """Raise OutputError unless `folder` is absent, empty, or holds an earlier adapter."""
    require_place(folder, CARD_FILE, "an adapter")


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return one hash over an adapter's weights, names, types and shapes included."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_whole(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedModel unless the weights of a folder are those that its card was written for."""
    try:
        written = dict(read_json(folder / CARD_FILE)).get("sha256")
    except (OSError, ValueError, TypeError) as error:
        raise UnsupportedModel(f"{folder / CARD_FILE} cannot be read ({error}). Restore it.") from error
    if written != weights_sha256(tensors):
        raise UnsupportedModel(f"{folder}: {WEIGHTS_FILE} is not what its card was written for. Restore it.")
