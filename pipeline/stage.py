"""One end of a recipe's line: a stored model, what was measured of it, and the adapters that were trained on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dwindle.adapters import Adapter
from dwindle.bundle import ModelBundle
from dwindle.report import Measurement

__all__ = ["RECOVERY", "Stage", "StoredAdapter"]

RECOVERY = "recovery"
"""Name of the recovery adapter's folder, and so of the adapter in every runtime."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's folder, and the hash of what is in it."""

    path: Path
    sha256: str


@dataclass
class Stage:
    """A stored model, what was measured of it, and the bundle once someone needs it."""

    path: Path | None
    sha256: str
    measurement: Measurement
    variant: str | None = None
    bundle: ModelBundle | None = None
    adapters: dict[str, StoredAdapter] = field(default_factory=dict)
    """What was trained on it, by name, in the order of the recipe."""

    def loaded(self, torch_device: str) -> ModelBundle:
        """Return the bundle, read from its folder at first use."""
        if self.bundle is None:
            assert self.path is not None
            self.bundle = ModelBundle.load(self.path, torch_device=torch_device)
        return self.bundle

    @property
    def recovery(self) -> StoredAdapter | None:
        """Return the adapter that makes good what quantization lost, if one was trained."""
        return self.adapters.get(RECOVERY)

    def recovered(self, torch_device: str) -> ModelBundle:
        """Return the bundle as the run means it to be used: with its recovery adapter on it."""
        base = self.loaded(torch_device)
        return base if self.recovery is None else Adapter.load(self.recovery.path).on(base)
