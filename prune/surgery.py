"""Cut a KeepPlan out of a model: gate and up lose rows (and biases), down loses columns; nothing else changes.

The function of the result is exactly that of the full model with the removed units' activations set to zero. It is a
stock transformers model with a smaller `intermediate_size`. Phi-3 stores gate and up as one matrix, gate first.

Memory: the full model plus the pruned one; the full FFN is never copied.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dwindle.anatomy import Part, module, set_module
from dwindle.prune.keep_plan import KeepPlan, require_float

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dwindle.anatomy import Anatomy
    from dwindle.bundle import ModelBundle

__all__ = ["apply"]

_FFN: tuple[Part, ...] = ("gate", "up", "gate_up", "down")


def apply(bundle: ModelBundle, plan: KeepPlan) -> PreTrainedModel:
    """Return a new, smaller model; the bundle's own is left as it is.

    Raises RecipeError for a quantized model or a plan made for another one.
    """
    require_float(bundle)
    anatomy = bundle.anatomy
    plan.require(anatomy)
    shared = {id(p): p for name in _ffn_names(anatomy) for p in module(bundle.model, name).parameters()}
    model: PreTrainedModel = copy.deepcopy(bundle.model, dict(shared))
    for layer, units in enumerate(plan.ffn_units):
        kept = torch.tensor(units)
        for part, name in anatomy.parts(layer).items():
            if part in _FFN:
                set_module(model, name, _cut(cast(nn.Linear, module(model, name)), part, kept, plan.ffn_width))
        mlp = module(model, anatomy.parts(layer)["down"].rpartition(".")[0])
        if hasattr(mlp, "intermediate_size"):
            setattr(mlp, "intermediate_size", plan.kept_width)  # noqa: B010  (modules declare no such attribute)
    model.config.intermediate_size = plan.kept_width
    return model


def _ffn_names(anatomy: Anatomy) -> list[str]:
    return [name for layer in range(anatomy.layers) for part, name in anatomy.parts(layer).items() if part in _FFN]


def _cut(linear: nn.Linear, part: Part, kept: Tensor, width: int) -> nn.Linear:
    """Return the linear with only the kept units: rows of gate and up, columns of down."""
    kept = kept.to(linear.weight.device)
    axis = 1 if part == "down" else 0
    if part == "gate_up":
        kept = torch.cat([kept, kept + width])
    weight = linear.weight.detach().index_select(axis, kept).clone()
    bias = linear.bias if linear.bias is None or axis == 1 else linear.bias.index_select(0, kept)
    cut = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    cut.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if bias is not None:
        cut.bias = nn.Parameter(bias.detach().clone(), requires_grad=linear.bias.requires_grad)
    return cut.train(linear.training)
