"""Fold a low-rank adapter into a float base, exactly.

    LoRA (Hu 2021, arXiv 2106.09685)     W' = W + s B A                    s = alpha / r, rsLoRA alpha / sqrt(r)
    DoRA (Liu 2024, arXiv 2402.09353)    W' = m * (W + s B A) / |W + s B A|     |.| the length of each row

The merged model's logits equal those of base plus adapter (within rounding), so an adapter trained anywhere can be
folded in before a model is pruned, quantized or exported. It is stored in float32, whatever the base was stored in:
float16 would round it once more (`exact=False` does).

A quantized base is refused: its codes cannot take a change without being rounded again, which is another model than the
one the adapter was trained on. Who wants that hands in `recode`, and the linears that change are rounded again, each to
the format that it had.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.adapter_card import CARD_FILE, AdapterCard
from dwindle.anatomy import require_dense
from dwindle.bundle import ModelBundle
from dwindle.clock import StepClock
from dwindle.errors import RecipeError, UnsupportedModel, offenders
from dwindle.low_rank import LowRank
from dwindle.peft_folder import read_adapter
from dwindle.quantized_model import QuantizedLinear
from dwindle.report import Skipped, StepRecord
from dwindle.storage import hash_folder
from dwindle.weights import QuantizedWeight

__all__ = ["merge", "merged_weight"]


def merged_weight(weight: Tensor, change: LowRank) -> Tensor:
    """Return W' [O, I] in float32, computed in float64.

    >>> merged_weight(torch.zeros(1, 2), LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), 0.5))
    tensor([[1.5000, 3.0000]])
    """
    a, b = change.a.to(weight.device, torch.float64), change.b.to(weight.device, torch.float64)
    merged = weight.double() + change.scale * (b @ a)
    if change.magnitude is not None:
        merged = merged * (change.magnitude.to(merged).flatten() / merged.norm(dim=1))[:, None]
    return merged.float()


Recode = Callable[[Tensor, Mapping[str, Any]], QuantizedWeight]
"""(weight [O, I], spec) -> the weight in that format."""


def merge(
    bundle: ModelBundle, adapter: Path | str, *, exact: bool = True, recode: Recode | None = None
) -> tuple[ModelBundle, StepRecord]:
    """Return a model with the adapter folded in; the given bundle is unchanged.

    Raises RecipeError for a quantized base without `recode`, and for an adapter whose card names another base;
    UnsupportedModel for a model with experts, or a folder that is no low-rank adapter or that names modules or shapes
    the model does not have.
    """
    adapter = Path(adapter)
    require_dense(bundle.anatomy, "merge")
    if bundle.quantized and recode is None:
        raise RecipeError(
            "merge: the base is quantized; an adapter cannot be folded into codes without rounding them again, which "
            "loses a part of what it was trained for. Keep the adapter beside its base (dwindle export --adapter), or "
            "say that the changed linears shall be rounded again (dwindle adapters merge --requantize)."
        )
    changes = read_adapter(adapter)
    _require_base(bundle, adapter, changes)
    with StepClock() as clock:
        model = copy.deepcopy(bundle.model)
        rounded = []
        with torch.no_grad():
            for name, change in changes.items():
                module: Any = model.get_submodule(name)
                weight = merged_weight(module.weight, change)
                if isinstance(module, QuantizedLinear) and recode is not None:
                    module.fill(recode(weight, module.spec))
                    rounded.append(name)
                else:
                    module.weight.copy_(weight)
        source = replace(bundle, storage_dtype=torch.float32) if exact and not bundle.quantized else bundle
        options = {"modules": len(changes), "rounded_again": len(rounded)}
        merged = source.derive(model, "merge", options, {"adapter": hash_folder(adapter)})
        merged.stored_dtype_rounded()
    skipped: tuple[Skipped, ...] = ()
    if rounded:
        skipped = (Skipped("an exact merge", f"{len(rounded)} quantized linears were rounded again to their formats"),)
    return merged, StepRecord("merge", bundle.size(), merged.size(), seconds=clock.seconds, skipped=skipped,
                              peak_rss_bytes=clock.peak_rss_bytes, details={"modules": sorted(changes)})  # fmt: skip


def _require_base(bundle: ModelBundle, adapter: Path, changes: Mapping[str, LowRank]) -> None:
    """Raise unless every change has its linear in this model, and the card, if there is one, names this base."""
    linears: dict[str, tuple[int, int]] = {
        name: (module.out_features, module.in_features)
        for name, module in bundle.model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
    }
    if bundle.anatomy.tied and bundle.anatomy.head in changes:
        raise UnsupportedModel(
            f"{adapter}: it changes {bundle.anatomy.head}, whose weight is the embedding's, so that a merged one would "
            "change what the model reads as well. Take an adapter without it, or untie the model first."
        )
    wrong = [
        f"{name} ({c.b.shape[0]}x{c.a.shape[1]})"
        for name, c in changes.items()
        if linears.get(name) != (c.b.shape[0], c.a.shape[1])
    ]
    if wrong:
        raise UnsupportedModel(
            f"{adapter}: {len(wrong)} of {len(changes)} modules are not in this model, or have another shape there: "
            f"{offenders(wrong)}. The adapter belongs to another base."
        )
    if (adapter / CARD_FILE).is_file():
        card, found = AdapterCard.read(adapter), bundle.content_sha256
        if card.base_sha256 != found:
            raise RecipeError(
                f"merge: {adapter} was trained on {card.base_name} ({card.base_sha256[:12]}), this base is "
                f"{found[:12]}. An adapter fits the very weights it was trained on."
            )
