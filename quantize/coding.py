"""From a plan to the codes of a model in memory: the method's walk, then what learns across blocks, then the tables.

    awq        scales the norms first (an equal model), then goes on as gptq
    learned    starts from lnq or gptq, and learns how the weights round together: of each block within the walk, or
               of all blocks after it
    qat        starts from lnq or gptq and trains the weights
    any        with tune_steps, palettes and scales follow the unquantized model last

`streaming` does the layer-by-layer methods for checkpoints that are larger than memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.decoder_blocks import InMemoryBlocks
from dwindle.quantize.awq import equalize
from dwindle.quantize.calibration import forward_walk
from dwindle.quantize.coded_walk import coded_walk
from dwindle.quantize.layer_plan import LayerPlan
from dwindle.quantize.learned import Descent, learn_jointly
from dwindle.quantize.methods import Walk, layer_coder, layerwise_method, walk_of
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.own_text import own_text
from dwindle.quantize.qat import quantization_aware_training
from dwindle.quantize.tune import tune_tables
from dwindle.resources import require_memory
from dwindle.token_set import TokenSet
from dwindle.weights import QuantizedWeight

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["Coded", "code_model"]


_OWN_WINDOWS = 3
"""Windows of the model's own text for each calibration window, where no number is given."""
_PASSES = 16
"""Passes of qat over the calibration windows, where there is no training text."""


@dataclass(frozen=True)
class Coded:
    """The codes of a model, and the float tensors that changed with them."""

    weights: dict[str, QuantizedWeight]
    """By module name, in the plan's order."""
    floats: dict[str, Tensor]
    """Norms and biases by parameter name, where the method changed them; the codes belong to these."""
    details: dict[str, Any]
    """What the phases said of themselves, for the report."""
    base: ModelBundle
    """The float model that the codes are of: the one given, or an equal one with other scales (awq)."""


def code_model(
    bundle: ModelBundle,
    plan: LayerPlan,
    options: QuantizeOptions,
    calibration: TokenSet | None = None,
    train: TokenSet | None = None,
    folder: Path | None = None,
) -> Coded:
    """Return the codes of every layer of the plan. `folder` is where qat logs and checkpoints."""
    method = options.method_used(calibration is not None)
    walk = walk_of(options, layerwise_method(options, method), calibration is not None)
    _require_memory(bundle, plan, walk, calibration)
    told: dict[str, Any] = {"method": method}
    base = bundle
    if method == "awq":
        assert calibration is not None
        base, told["equalized"] = _equalized(bundle, plan, calibration.ids)
    weights = _layer_by_layer(base, plan, options, layerwise_method(options, method), calibration)
    if method == "learned" and options.scope == "model":
        assert calibration is not None
        weights |= _learned(base, plan, weights, calibration.ids, options, told)
    if method == "qat":
        weights = _trained(base, plan, weights, options, calibration, train, folder)
    floats = _changed(bundle, base)
    if options.tune_steps:
        assert calibration is not None
        tuned = tune_tables(base, weights, calibration, options)
        weights, floats = tuned.weights, floats | tuned.norms
        told["tuned"] = {"first_kl": tuned.first_kl, "last_kl": tuned.last_kl, "steps": tuned.steps}
    return Coded({layer.name: weights[layer.name] for layer in plan.layers}, floats, told, base)


def _require_memory(bundle: ModelBundle, plan: LayerPlan, walk: Walk, calibration: TokenSet | None) -> None:
    """Raise DoesNotFit if what every method holds at once has no room: a byte a code, and what its walk carries."""
    if bundle.model.device.type != "cpu":
        return
    shapes = {name: bundle.model.get_submodule(name).weight.shape for name in plan.formats}
    parts = {"codes": sum(shape.numel() for shape in shapes.values())}
    if walk.direction != "none" and calibration is not None:
        parts["hidden states of the calibration windows"] = 2 * 4 * calibration.ids.numel() * bundle.anatomy.width
        parts["the widest second moments"] = 4 * max((shape[-1] ** 2 for shape in shapes.values()), default=0)
    require_memory(f"quantize: {len(shapes)} layers", parts, "Take fewer windows (data.calibration_windows), give the "
                   "model as a folder, which is coded block by block, or take more memory.")  # fmt: skip


def _trained(
    bundle: ModelBundle, plan: LayerPlan, start: Mapping[str, QuantizedWeight], options: QuantizeOptions,
    calibration: TokenSet | None, train: TokenSet | None, folder: Path | None,
) -> dict[str, QuantizedWeight]:  # fmt: skip
    """Return the codes of quantization-aware training: on the training text once, or on the calibration often."""
    assert calibration is not None
    if train is None and options.tokens is None:
        options = replace(options, tokens=_PASSES * calibration.tokens)
    return quantization_aware_training(bundle, plan, train or calibration, options, folder, start)


def _layer_by_layer(
    bundle: ModelBundle, plan: LayerPlan, options: QuantizeOptions, method: str, calibration: TokenSet | None
) -> dict[str, QuantizedWeight]:
    coder = layer_coder(options, method)
    walk = walk_of(options, method, calibration is not None)
    weights: dict[str, QuantizedWeight] = {}
    if walk.direction != "none":
        assert calibration is not None
        coded = coded_walk(InMemoryBlocks(bundle), plan.formats, coder, walk, calibration.ids, options.seed)
        weights = {layer.name: weight for layer, _, weight in coded}
    for layer in plan.layers:
        if layer.name not in weights:
            weights[layer.name] = coder(layer, _dense(bundle, layer.name), None)
    return weights


def _learned(
    bundle: ModelBundle, plan: LayerPlan, start: Mapping[str, QuantizedWeight], ids: Tensor, options: QuantizeOptions,
    told: dict[str, Any],
) -> dict[str, QuantizedWeight]:  # fmt: skip
    linears = set(bundle.anatomy.linear_names())
    own = {layer.name: start[layer.name] for layer in plan.layers if layer.name in linears}
    text = _with_own_text(bundle, ids, options)
    learned = learn_jointly(InMemoryBlocks(bundle), own, text, Descent.of(options, "adamw"))
    told["learned"] = {"first_kl": learned.first_loss, "last_kl": learned.last_loss, "windows": len(text)}
    return learned.weights


def _with_own_text(bundle: ModelBundle, ids: Tensor, options: QuantizeOptions) -> Tensor:
    """Return the calibration windows mixed with those the model writes; what is held back is drawn from both."""
    ids = ids.to("cpu", torch.long)
    windows = _OWN_WINDOWS * len(ids) if options.own_windows is None else options.own_windows
    both = torch.cat([ids, own_text(bundle, ids, windows, options.seed)]) if windows else ids
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(options.seed))]


def _equalized(bundle: ModelBundle, plan: LayerPlan, ids: Tensor) -> tuple[ModelBundle, dict[str, float]]:
    """Return an equal model with scaled inputs, and the share of its error that each scaled linear lost."""
    model = copy.deepcopy(bundle.model)
    parameters, gains = dict(model.named_parameters()), {}
    with torch.no_grad():
        for block in forward_walk(InMemoryBlocks(bundle), ids):
            path = bundle.anatomy.layer_path(block.layer) + "."
            own = {name: value.detach() for name, value in parameters.items() if name.startswith(path)}
            found = equalize(own, bundle.anatomy, block.layer, block.statistics, plan.formats)
            for name, tensor in found.tensors.items():
                parameters[name].copy_(tensor)
            gains.update(found.gains)
    return replace(bundle, model=model), gains


def _changed(bundle: ModelBundle, base: ModelBundle) -> dict[str, Tensor]:
    """Return the parameters with one axis (norms, biases) in which `base` differs from the bundle it was made from."""
    if base is bundle:
        return {}
    before = dict(bundle.model.named_parameters())
    return {
        name: value.detach()
        for name, value in base.model.named_parameters()
        if value.dim() == 1 and not torch.equal(value, before[name])
    }


def _dense(bundle: ModelBundle, name: str) -> Tensor:
    weight = bundle.model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()
