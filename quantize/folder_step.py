"""The quantize step on a checkpoint folder, for models that do not fit into memory as floats.

The same plan, the same codes and the same files as `step.run` followed by `save`; see `streaming`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dwindle.clock import StepClock
from dwindle.errors import RecipeError
from dwindle.model_source import find_folder
from dwindle.quantize.bit_plan import BitPlan
from dwindle.quantize.layer_plan import ModelShapes, plan_layers
from dwindle.quantize.methods import layer_coder, layerwise_method, require_calibration, require_effect, walk_of
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.planning import ModelToPlan
from dwindle.quantize.planning import plan as make_plan
from dwindle.quantize.streaming import quantize_checkpoint
from dwindle.report import Measurement, StepRecord
from dwindle.streamed_blocks import StreamedBlocks
from dwindle.weight_source import WeightSource
from dwindle.weights import spec_bits

if TYPE_CHECKING:
    from dwindle.token_set import TokenSet

__all__ = ["needs_whole_model", "plan_folder", "run_folder"]

_WHOLE_MODEL = ("awq", "qat")


def plan_folder(
    folder: str | Path, options: QuantizeOptions, calibration: TokenSet | None = None,
    device: torch.device | str = "cpu",
) -> BitPlan:  # fmt: skip
    """Return the plan for a checkpoint folder; its weights are read one linear or one block at a time."""
    return make_plan(_ready(WeightSource(find_folder(folder)[0]), device), options, calibration)


def run_folder(
    folder: str | Path, output: str | Path, options: QuantizeOptions, calibration: TokenSet | None = None, *,
    plan: BitPlan | None = None, device: torch.device | str = "cpu",
) -> StepRecord:  # fmt: skip
    """Write the quantized checkpoint to `output` and return the record (sizes only).

    Raises RecipeError, before any work, for methods that need the whole model in memory (awq, learned with
    scope=model, qat, tuning), and what `step.run` raises.
    """
    if calibration is not None:
        calibration.require("calibration")
    method = options.method_used(calibration is not None)
    require_calibration(options, method, calibration is not None)
    require_effect(options, method)
    _require_layerwise(options)
    basic = layerwise_method(options, method)
    with StepClock() as clock:
        source = WeightSource(find_folder(folder)[0])
        ready = _ready(source, device)
        base = plan_layers(ModelShapes.stored(source), options)
        chosen = make_plan(ready, options, calibration) if plan is None else plan
        formats = chosen.layer_plan(base)
        inputs = {} if calibration is None else {"calibration": calibration.sha256}
        layers = quantize_checkpoint(
            folder, Path(output), formats, layer_coder(options, basic), walk_of(options, basic, bool(inputs)),
            None if calibration is None else calibration.ids, options=asdict(options), inputs=inputs, seed=options.seed,
            device=device,
        )  # fmt: skip
    shapes = ModelShapes.stored(source).shapes
    specs = {layer.name: layer.spec(shapes[layer.name]) for layer in formats.layers}
    details = {"scheme": options.scheme, "bits": options.bits, "method": method, "uses_calibration": bool(inputs),
               "notes": list(formats.notes), "plan": chosen.to_json(), "layers": layers}  # fmt: skip
    return StepRecord("quantize", _size(source, {}), _size(source, specs), seconds=clock.seconds,
                      peak_rss_bytes=clock.peak_rss_bytes, details=details, skipped=formats.skipped)  # fmt: skip


def _ready(source: WeightSource, device: torch.device | str) -> ModelToPlan:
    sizes = [(name, math.prod(source.shape(name))) for name in source.names]
    return ModelToPlan(ModelShapes.stored(source), lambda name: source.read(f"{name}.weight").float().to(device), sizes,
                       StreamedBlocks(source, device))  # fmt: skip


def needs_whole_model(options: QuantizeOptions) -> list[str]:
    """Return the options that cannot be worked on block by block.

    >>> needs_whole_model(QuantizeOptions(method="learned")), needs_whole_model(QuantizeOptions(method="lnq"))
    (['method=learned with scope=model'], [])
    """
    wrong = [f"method={options.method}"] if options.method in _WHOLE_MODEL else []
    wrong += ["method=learned with scope=model"] if (options.method, options.scope) == ("learned", "model") else []
    return wrong + ([f"tune_steps={options.tune_steps}"] if options.tune_steps else [])


def _require_layerwise(options: QuantizeOptions) -> None:
    if wrong := needs_whole_model(options):
        raise RecipeError(
            f"quantize: {' and '.join(wrong)} needs the whole model in memory, and this one is worked on block by "
            "block. Choose kmeans, lnq, rtn, hqq, gptq, or learned with scope=block; or load it with ModelBundle and "
            "call quantize.run."
        )


def _size(source: WeightSource, specs: Mapping[str, Mapping[str, Any]]) -> Measurement:
    """Return the size as `ModelBundle.size` counts it, with the modules in `specs` packed."""
    width = torch.finfo(source.storage_dtype).bits
    bits: dict[str, tuple[int, int]] = {}
    for name in source.names:
        count, module = math.prod(source.shape(name)), name.removesuffix(".weight")
        bits[module] = (count, spec_bits(specs[module]) if module in specs else count * width)
    anatomy = source.anatomy
    parameters, stored = (sum(column) for column in zip(*bits.values(), strict=True))

    def per_weight(names: set[str]) -> float:
        chosen = [bits[name] for name in names if name in bits]
        return sum(b for _, b in chosen) / sum(n for n, _ in chosen)

    return Measurement(
        parameters=parameters, bytes=-(-stored // 8), bits_per_weight=stored / parameters,
        bits_per_weight_linear=per_weight(set(anatomy.linear_names())),
        bits_per_weight_embedding=per_weight({anatomy.embedding, anatomy.head}),
    )  # fmt: skip
