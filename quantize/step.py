"""The quantize step: plan, code every layer once, put the packed modules in, record what each layer cost."""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dwindle.clock import StepClock
from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.layer_plan import LayerFormat, LayerPlan, plan_layers
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.palettize import palettize
from dwindle.report import StepRecord
from dwindle.weights import QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dwindle.bundle import ModelBundle
    from dwindle.token_set import TokenSet

__all__ = ["run"]

_log = logging.getLogger("dwindle")


def run(
    bundle: ModelBundle, options: QuantizeOptions, calibration: TokenSet | None = None
) -> tuple[ModelBundle, StepRecord]:
    """Return the packed bundle and its record (sizes only; a `Meter` fills in quality).

    The weights alone decide the codes; `calibration`, if given, is only held to its role. `details["layers"]` has
    per module: name, kind, bits, group_size, bytes, bits_per_weight and relative_mse = |W - W'|^2 / |W|^2. Raises
    RecipeError, before any work, for a quantized bundle and for layers the format does not fit.
    """
    if calibration is not None:
        calibration.require("calibration")
    with StepClock() as clock:
        plan = plan_layers(bundle, options)
        weights: dict[str, QuantizedWeight] = {}
        layers: list[dict[str, Any]] = []
        for number, layer in enumerate(plan.layers, start=1):
            dense = bundle.model.get_submodule(layer.name).weight.detach().to("cpu")
            weights[layer.name] = _coded(dense, layer, options)
            layers.append(_layer_record(layer, dense, weights[layer.name]))
            _log.info("quantize %d/%d %s", number, len(plan.layers), layer.name)
        model = _packed_model(bundle.model, weights, plan)
        quantized = bundle.derive(model, "quantize", asdict(options), {}).stored_dtype_rounded()
        sizes = bundle.size(), quantized.size()
    details = {"scheme": options.scheme, "bits": options.bits, "uses_calibration": False, "layers": layers}
    return quantized, StepRecord("quantize", *sizes, seconds=clock.seconds, peak_rss_bytes=clock.peak_rss_bytes,
                                 details=details, skipped=plan.skipped)  # fmt: skip


def _coded(dense: Tensor, layer: LayerFormat, options: QuantizeOptions) -> QuantizedWeight:
    if layer.scheme == "palettize":
        return palettize(dense, layer.bits, layer.group_size, options.histogram_bins)
    return round_to_nearest(dense, layer.bits, layer.group_size, layer.symmetric)


def _layer_record(layer: LayerFormat, dense: Tensor, weight: QuantizedWeight) -> dict[str, Any]:
    power = float(dense.square().sum())
    error = float((weight.dequantize() - dense).square().sum())
    return {
        "name": layer.name,
        "kind": weight.kind,
        "bits": layer.bits,
        "group_size": layer.group_size,
        "shape": list(weight.shape),
        "bytes": weight.stored_bits // 8,
        "bits_per_weight": weight.stored_bits / dense.numel(),
        "relative_mse": error / power if power else 0.0,
    }


def _packed_model(model: PreTrainedModel, weights: dict[str, QuantizedWeight], plan: LayerPlan) -> PreTrainedModel:
    """Return a copy of the model with packed modules; float weights that are replaced are never copied."""
    from dwindle.quantized_model import apply_quantized_weights

    replaced = [model.get_submodule(name).weight for name in weights]
    packed = copy.deepcopy(model, memo={id(weight): weight for weight in replaced})
    apply_quantized_weights(packed, weights, plan.tied)
    return packed
