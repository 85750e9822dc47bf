"""What the report says of one quantized layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dwindle.quantize.layer_plan import LayerFormat
from dwindle.weights import QuantizedWeight

__all__ = ["layer_record", "squares"]


def squares(dense: Tensor, weight: QuantizedWeight) -> tuple[float, float]:
    """Return |W|^2 and |W - W'|^2 of a float weight and its codes."""
    error = weight.dequantize().to(dense.device).sub_(dense)
    return float(dense.flatten().dot(dense.flatten())), float(error.flatten().dot(error.flatten()))


def layer_record(layer: LayerFormat, weight: QuantizedWeight, power: float, error: float) -> dict[str, Any]:
    """Return name, kind, bits, group_size, shape, bytes, bits_per_weight and relative_mse = error / power."""
    outputs, inputs = weight.shape
    return {
        "name": layer.name,
        "kind": weight.kind,
        "bits": layer.bits,
        "group_size": layer.group_size,
        "shape": [outputs, inputs],
        "bytes": weight.stored_bits // 8,
        "bits_per_weight": weight.stored_bits / (outputs * inputs),
        "relative_mse": error / power if power else 0.0,
    }
