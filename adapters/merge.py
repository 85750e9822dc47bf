"""Fold a low-rank adapter into a float base, exactly.

    LoRA (Hu 2021, arXiv 2106.09685)     W' = W + s B A                    s = alpha / r, rsLoRA alpha / sqrt(r)
    DoRA (Liu 2024, arXiv 2402.09353)    W' = m * (W + s B A) / |W + s B A|     |.| the length of each row

The merged model's logits equal those of base plus adapter (within rounding), so an adapter trained anywhere can be
folded in before a model is pruned, quantized or exported. A quantized base is refused: its codes cannot take a
change without being rounded again, which is another model than the one the adapter was trained on.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from dwindle.anatomy import require_dense
from dwindle.bundle import ModelBundle
from dwindle.clock import StepClock
from dwindle.errors import RecipeError, UnsupportedModel, offenders
from dwindle.low_rank import LowRank
from dwindle.peft_folder import read_adapter
from dwindle.report import StepRecord
from dwindle.storage import hash_folder

__all__ = ["merge", "merged_weight"]


def merged_weight(weight: Tensor, change: LowRank) -> Tensor:
    """Return W' [O, I] in float32, computed in float64.

    >>> merged_weight(torch.zeros(1, 2), LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), 0.5))
    tensor([[1.5000, 3.0000]])
    """
    merged = weight.double() + change.scale * (change.b.double() @ change.a.double())
    if change.magnitude is not None:
        merged = merged * (change.magnitude.double().flatten() / merged.norm(dim=1))[:, None]
    return merged.float()


def merge(bundle: ModelBundle, adapter: Path | str) -> tuple[ModelBundle, StepRecord]:
    """Return a float model with the adapter folded in; the given bundle is unchanged.

    Raises RecipeError for a quantized base, UnsupportedModel for a model with experts, or a folder that is no low-rank
    adapter or that names modules or shapes the model does not have.
    """
    adapter = Path(adapter)
    require_dense(bundle.anatomy, "merge")
    if bundle.quantized:
        raise RecipeError(
            "merge: the base is quantized; an adapter cannot be folded into codes without rounding them again. "
            "Merge into the float model and quantize the result."
        )
    changes = read_adapter(adapter)
    linears = {name: m for name, m in bundle.model.named_modules() if isinstance(m, nn.Linear)}
    wrong = [
        f"{name} ({c.b.shape[0]}x{c.a.shape[1]})"
        for name, c in changes.items()
        if name not in linears or tuple(linears[name].weight.shape) != (c.b.shape[0], c.a.shape[1])
    ]
    if wrong:
        raise UnsupportedModel(
            f"{adapter}: {len(wrong)} of {len(changes)} modules are not in this model, or have another shape there: "
            f"{offenders(wrong)}. The adapter belongs to another base."
        )
    with StepClock() as clock:
        model = copy.deepcopy(bundle.model)
        with torch.no_grad():
            for name, change in changes.items():
                weight = model.get_submodule(name).weight
                weight.copy_(merged_weight(weight, change))
        merged = bundle.derive(model, "merge", {"modules": len(changes)}, {"adapter": hash_folder(adapter)})
        merged.stored_dtype_rounded()
    record = StepRecord("merge", bundle.size(), merged.size(), seconds=clock.seconds,
                        peak_rss_bytes=clock.peak_rss_bytes, details={"modules": sorted(changes)})  # fmt: skip
    return merged, record
