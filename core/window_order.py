"""Which windows a step of training reads, where that depends on how training goes.

Without one of these the order is a pure function of seed and step (`data_order`). One of these has a state, which
stands in every checkpoint, so that a resumed run reads what an undisturbed one would have read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["WindowOrder"]


class WindowOrder(Protocol):
    """Chooses windows step by step."""

    def windows(self, batch_size: int, step: int) -> Tensor:
        """Return the indices [batch_size] of the windows of `step` (0-based); called once for each step, in order."""
        ...

    def due(self, step: int) -> bool:
        """Return whether `update` is to be called after so many steps."""
        ...

    def update(self, model: nn.Module, step: int) -> None:
        """Look at the model, which is in evaluation mode; under `torchrun` in every process, with the same result."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        ...
