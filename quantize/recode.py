"""A changed weight in the very format that it had: same kind, bits, group and tables, new codes.

No calibration text is read: palettes by exact k-means, integers by the nearest codes at the best clipping. Codes that
were found with a text (lnq, gptq, qat) are not found again this way; quantizing the float model anew does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.palettize import palettize
from dwindle.weights import QuantizedWeight

__all__ = ["recoded"]


def recoded(weight: Tensor, spec: Mapping[str, Any]) -> QuantizedWeight:
    """Return a float weight [O, I] in the format of `spec` (`QuantizedWeight.spec()`)."""
    if spec["kind"] == "palettized":
        return palettize(weight, spec["bits"], spec["group_size"], row_scales=bool(spec["row_scales"]))
    return round_to_nearest(weight, spec["bits"], spec["group_size"], spec["symmetric"],
                            balanced=spec.get("balanced", False))  # fmt: skip
