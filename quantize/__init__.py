"""Fewer bits per weight: palettes and integers, rounded once.

`run(bundle, QuantizeOptions(...))` returns a packed bundle and its record; `formats.check` tells beforehand whether a
runtime can carry what the options will make.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwindle.quantize.formats import RUNTIMES as RUNTIMES
    from dwindle.quantize.formats import check as check
    from dwindle.quantize.options import QuantizeOptions as QuantizeOptions
    from dwindle.quantize.step import run as run

_HOMES = {"RUNTIMES": "formats", "QuantizeOptions": "options", "check": "formats", "run": "step"}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dwindle.quantize' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dwindle.quantize.{_HOMES[name]}"), name)
