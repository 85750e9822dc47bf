"""The rows of the pruning tables: which ways to choose and cut FFN units, and how many tokens each may train on.

`half`: half of the units of every layer, nothing trained, and the same again after 300 steps of distillation.
`third`: 34 % of the units and 600 steps, which a row spends on distillation alone or partly on masks.
Add rows at will: what the results file has is not done again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["BATCHES", "CALIBRATION_WINDOWS", "EVALUATION_TOKENS", "RATES", "ROWS", "SHARES", "STEPS", "Batch", "Row",
           "kept_units"]  # fmt: skip

Table = Literal["half", "third"]
SHARES: dict[Table, float] = {"half": 0.5, "third": 0.34}
STEPS: dict[Table, int] = {"half": 300, "third": 600}
"""Steps of a row in all: masks and distillation together."""
CALIBRATION_WINDOWS = 64
EVALUATION_TOKENS = 16_384
RATES = {"stories260K": 1e-3, "babyllama-105": 1e-3, "pycode-6m": 3e-4}
"""Peak rate of the weights."""


@dataclass(frozen=True)
class Batch:
    """One training step's windows, masks and distillation alike."""

    windows: int
    tokens: int
    """Tokens that a window predicts."""


BATCHES = {"stories260K": Batch(4, 256), "babyllama-105": Batch(4, 128), "pycode-6m": Batch(2, 128)}


@dataclass(frozen=True)
class Row:
    """One way to cut."""

    name: str
    """Label in the table."""
    table: Table
    options: dict[str, Any] = field(default_factory=dict)
    """What `PruneOptions` gets beside the share; without any, the row is a peer's."""
    peer_method: str | None = None
    """Method of `peers/torch_pruning_ffn.py`."""
    mask_steps: int = 0
    """Steps of the budget that masks take."""
    weights_learn: bool = False
    """The weights learn along with the masks, at the rate they are distilled at."""


def kept_units(table: Table, units: int) -> int:
    """Return how many of a layer's units stay in a table.

    >>> kept_units("half", 172), kept_units("third", 172)
    (86, 58)
    """
    return round(SHARES[table] * units)


ROWS = (
    Row("dwindle: activation, compensated", "half", {"method": "activation"}),
    Row("dwindle: taylor, compensated", "half", {"method": "taylor"}),
    Row("dwindle: fisher, compensated (default)", "half", {"method": "fisher"}),
    Row("dwindle: magnitude, compensated", "half", {"method": "magnitude"}),
    Row("magnitude", "half", {"method": "magnitude", "compensate": False}),
    Row("activation (Minitron)", "half", {"method": "activation", "compensate": False}),
    Row("Torch-Pruning: group Taylor", "half", peer_method="taylor"),
    Row("Torch-Pruning: group magnitude", "half", peer_method="magnitude"),
    Row("activation (Minitron)", "third", {"method": "activation", "compensate": False}),
    Row("dwindle: activation, compensated", "third", {"method": "activation"}),
    Row("dwindle: soft_top_k, compensated", "third", {"method": "soft_top_k"}, mask_steps=200),
    Row("dwindle: soft_top_k, weights learn along", "third", {"method": "soft_top_k"}, mask_steps=300,
        weights_learn=True),
)  # fmt: skip
