"""Export: a decoder written as ONNX and Core ML, executed, and held to the model that was measured.

`run(bundle, ExportOptions(...), folder)` returns artifacts; `require_parity` turns a miss into an error;
`open_artifact(folder)` executes what was exported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwindle.export.options import ExportOptions as ExportOptions
    from dwindle.export.parity import ParityLimits as ParityLimits
    from dwindle.export.parity import decode_parity as decode_parity
    from dwindle.export.parity import require_parity as require_parity
    from dwindle.export.step import open_artifact as open_artifact
    from dwindle.export.step import run as run

_HOMES = {
    "ExportOptions": "options",
    "ParityLimits": "parity",
    "decode_parity": "parity",
    "open_artifact": "step",
    "require_parity": "parity",
    "run": "step",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dwindle.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dwindle.export.{_HOMES[name]}"), name)
