"""The quantize step: plan, code every layer once, put the packed modules in, record what each layer cost."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.clock import StepClock
from dwindle.quantize.bit_plan import BitPlan
from dwindle.quantize.coding import Coded, code_model
from dwindle.quantize.layer_plan import LayerFormat, LayerPlan, plan_layers
from dwindle.quantize.layer_record import layer_record, squares
from dwindle.quantize.methods import require_calibration, require_effect
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.planning import plan as make_plan
from dwindle.report import StepRecord
from dwindle.weights import QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dwindle.bundle import ModelBundle
    from dwindle.token_set import TokenSet

__all__ = ["run"]

_log = logging.getLogger("dwindle")


def run(
    bundle: ModelBundle,
    options: QuantizeOptions,
    calibration: TokenSet | None = None,
    *,
    train: TokenSet | None = None,
    plan: BitPlan | None = None,
    folder: Path | None = None,
) -> tuple[ModelBundle, StepRecord]:
    """Return the packed bundle and its record (sizes only; a `Meter` fills in quality).

    `plan` is applied as it is; without one it is made (`planning`). `train` is the text of method=qat (the
    calibration text if None), whose log and checkpoints go to `folder`. `details["layers"]` has per module: name, kind,
    bits, group_size, bytes, bits_per_weight and relative_mse = |W - W'|^2 / |W|^2 (awq: W as it scaled it);
    `details["plan"]` is the plan as JSON. Raises RecipeError, before any work, for a quantized bundle, for layers that
    the format does not fit, for a method without its text, and for options that the method does not look at.
    """
    if calibration is not None:
        calibration.require("calibration")
    method = options.method_used(calibration is not None)
    require_calibration(options, method, calibration is not None)
    require_effect(options, method)
    with StepClock() as clock:
        base = plan_layers(bundle, options)
        chosen = make_plan(bundle, options, calibration) if plan is None else plan
        formats = chosen.layer_plan(base)
        for note in formats.notes:
            _log.info("quantize: %s", note)
        coded = code_model(bundle, formats, options, calibration, train, folder)
        layers = [_recorded(coded.base, layer, coded.weights[layer.name]) for layer in formats.layers]
        read = (calibration, train if options.method == "qat" else None)
        inputs = {str(s.role): s.sha256 for s in read if s is not None}
        model = _packed_model(bundle.model, coded, formats)
        quantized = bundle.derive(model, "quantize", asdict(options), inputs).stored_dtype_rounded()
        sizes = bundle.size(), quantized.size()
    details = {"scheme": options.scheme, "bits": options.bits, "uses_calibration": calibration is not None,
               **coded.details, "notes": list(formats.notes), "plan": chosen.to_json(), "layers": layers}  # fmt: skip
    return quantized, StepRecord("quantize", *sizes, seconds=clock.seconds, peak_rss_bytes=clock.peak_rss_bytes,
                                 details=details, skipped=formats.skipped)  # fmt: skip


def _recorded(bundle: ModelBundle, layer: LayerFormat, weight: QuantizedWeight) -> dict[str, Any]:
    dense = bundle.model.get_submodule(layer.name).weight.detach()
    return layer_record(layer, weight, *squares(dense, weight))


def _packed_model(model: PreTrainedModel, coded: Coded, plan: LayerPlan) -> PreTrainedModel:
    """Return a copy of the model with packed modules; float weights that are replaced are never copied."""
    from dwindle.quantized_model import apply_quantized_weights

    replaced = [model.get_submodule(name).weight for name in coded.weights]
    packed = copy.deepcopy(model, memo={id(weight): weight for weight in replaced})
    _put(packed, coded.floats)
    apply_quantized_weights(packed, coded.weights, plan.tied)
    return packed


def _put(model: PreTrainedModel, floats: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in floats.items():
            parameters[name].copy_(tensor)
