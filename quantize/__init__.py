"""Fewer bits per weight: palettes and integers, rounded once.

`run(bundle, QuantizeOptions(...))` returns a packed bundle and its record; `plan` tells beforehand which bits every
layer will get, `formats.check` whether a runtime can carry what the options will make, and `run_folder` does it all for
a checkpoint that is larger than memory.

    what is asked     options, formats (what each runtime carries), layer_plan, device_target
    which bits        planning; sensitivity, window_gradients, joint_kl, allocation, bit_search, bit_plan, plan_table
    calibration       calibration, layer_statistics, output_matching, coded_walk
    palettes          kmeans, bins, palettize, lnq
    integers          integers (RTN), hqq, gptq, group_search, awq
    learning          learned, trainable, own_text; qat, fake_quantize, clipping; tune; stand_in, matching
    doing it          methods (who codes a layer), coding, step; folder_step, streaming; layer_record
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwindle.quantize.bit_plan import BitPlan as BitPlan
    from dwindle.quantize.folder_step import plan_folder as plan_folder
    from dwindle.quantize.folder_step import run_folder as run_folder
    from dwindle.quantize.formats import RUNTIMES as RUNTIMES
    from dwindle.quantize.formats import check as check
    from dwindle.quantize.formats import check_runtimes as check_runtimes
    from dwindle.quantize.options import QuantizeOptions as QuantizeOptions
    from dwindle.quantize.planning import plan as plan
    from dwindle.quantize.step import run as run

_HOMES = {
    "BitPlan": "bit_plan",
    "RUNTIMES": "formats",
    "QuantizeOptions": "options",
    "check": "formats",
    "check_runtimes": "formats",
    "plan": "planning",
    "plan_folder": "folder_step",
    "run": "step",
    "run_folder": "folder_step",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dwindle.quantize' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dwindle.quantize.{_HOMES[name]}"), name)
