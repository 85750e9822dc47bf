"""dwindle: make a language model small and fast enough for a phone, with proof.

`import dwindle` is light: it loads neither torch nor transformers. It only arranges that
`transformers.AutoModelForCausalLM.from_pretrained` understands dwindle's packed checkpoints (see `registration`).
The names below are loaded when they are first used; the steps live in `dwindle.prune`, `dwindle.distill`,
`dwindle.quantize`, `dwindle.export`, `dwindle.devices` and, tying them together, `dwindle.pipeline`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dwindle import registration

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle as ModelBundle
    from dwindle.errors import DataError as DataError
    from dwindle.errors import DoesNotFit as DoesNotFit
    from dwindle.errors import DwindleError as DwindleError
    from dwindle.errors import GateFailed as GateFailed
    from dwindle.errors import MissingExtra as MissingExtra
    from dwindle.errors import OutputError as OutputError
    from dwindle.errors import RecipeError as RecipeError
    from dwindle.errors import UnsupportedModel as UnsupportedModel
    from dwindle.measure import Meter as Meter
    from dwindle.report import Report as Report
    from dwindle.report import StepRecord as StepRecord
    from dwindle.token_set import TokenSet as TokenSet

__version__ = "0.1.0"

_HOMES = {
    "DataError": "errors",
    "DoesNotFit": "errors",
    "DwindleError": "errors",
    "GateFailed": "errors",
    "Meter": "measure",
    "MissingExtra": "errors",
    "ModelBundle": "bundle",
    "OutputError": "errors",
    "RecipeError": "errors",
    "Report": "report",
    "StepRecord": "report",
    "TokenSet": "token_set",
    "UnsupportedModel": "errors",
}
__all__ = [*_HOMES, "__version__"]

registration.install()


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dwindle' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dwindle.{_HOMES[name]}"), name)
