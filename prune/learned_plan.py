"""From learned masks to a keep plan: which FFN units and KV groups stay is trained, all else is decided as ever.

How many units and groups stay, which layers and which channels of the hidden width, is decided by one-shot scores (of
activations, or of weights where there is no calibration text): k of n has to be known before the first step, and a
layer or a channel is not the input of one linear. The masks are trained in the whole model, on every axis of theirs
that loses something, and their units take the place of the scores' in that plan.

With `masks.weight_rate` the plan belongs to the copy whose weights learned along: it is cut out of that copy, and
nothing is refitted afterwards, since the weights have already learned to do without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.anatomy import require_dense
from dwindle.errors import RecipeError
from dwindle.prune.keep_plan import KeepPlan, LayerKeep, weights_sha256
from dwindle.prune.masked_model import MaskAxis
from dwindle.prune.masks import LearnedMasks, train_masks
from dwindle.report import Skipped
from dwindle.token_set import TokenSet
from dwindle.train import TrainLine

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.prune.mask_options import MaskOptions

__all__ = ["LearnedPlan", "learned_plan"]

_MASKED = "masks weigh FFN units and KV groups"


@dataclass(frozen=True)
class LearnedPlan:
    """A plan, the model it is to be cut out of, and what the training said."""

    plan: KeepPlan
    bundle: ModelBundle
    """The given bundle, or with `weight_rate` one around the copy with trained weights."""
    details: dict[str, Any]
    """Losses, steps and tokens of the run, for the step's record."""
    skipped: tuple[Skipped, ...]
    """Axes that the masks did not choose on."""


def learned_plan(
    bundle: ModelBundle,
    counted: KeepPlan,
    options: MaskOptions,
    train: TokenSet | None,
    *,
    folder: Path | None = None,
    on_step: Callable[[TrainLine], None] | None = None,
) -> LearnedPlan:
    """Return the plan `counted` with the units and groups that masks trained on `train` keep.

    With a `folder` the training logs and checkpoints there and goes on from where it stopped. Raises RecipeError for
    missing training text or a plan that no mask chooses on, UnsupportedModel for experts, and what `train_masks` does.
    """
    if train is None:
        raise RecipeError("prune: method='soft_top_k' trains masks, which needs training data. Give some.")
    require_dense(bundle.anatomy, "prune by method='soft_top_k'")
    keep: dict[MaskAxis, float] = {}
    if counted.after.ffn_width < counted.shape.ffn_width:
        keep["ffn"] = counted.after.ffn_width / counted.shape.ffn_width
    if counted.after.kv_heads < counted.shape.kv_heads:
        keep["kv_groups"] = counted.after.kv_heads / counted.shape.kv_heads
    if not keep:
        raise RecipeError(
            "prune: method='soft_top_k' chooses FFN units and KV groups, and none are cut here. For width alone use "
            "method='activation'; layers are chosen by depth_method."
        )
    masks = train_masks(bundle, keep, train, options, folder=folder, on_step=on_step)
    cut_out_of = bundle if masks.model is None else replace(bundle, model=masks.model)
    layers = tuple(_chosen(layer, masks) for layer in counted.layers)
    made = replace(counted, method="soft_top_k", layers=layers)
    if masks.model is not None:
        made = replace(made, model_sha256=weights_sha256(cut_out_of))
    run = masks.training
    details = {
        "steps": run.steps, "tokens": run.tokens, "first_loss": run.first_loss, "last_loss": run.last_loss,
        "history": [{"step": line.step, "loss": line.loss, **line.parts} for line in run.history],
    }  # fmt: skip
    return LearnedPlan(made, cut_out_of, details, _not_chosen(counted))


def _chosen(keep: LayerKeep, masks: LearnedMasks) -> LayerKeep:
    """Return the layer's choice with the units and groups that the masks keep."""
    changes: dict[str, Any] = {}
    for axis, indices, score in (("ffn", "ffn_units", "ffn_score"), ("kv_groups", "kv_groups", "kv_score")):
        if axis in masks.units:
            units, mass = masks.units[axis][keep.layer], masks.scores[axis][keep.layer]  # type: ignore[index]
            changes |= {indices: tuple(units.tolist()), score: float(mass[units].sum() / mass.sum())}
    return replace(keep, **changes)


def _not_chosen(plan: KeepPlan) -> tuple[Skipped, ...]:
    found = []
    if plan.width < plan.shape.width:
        how = "the variance along its principal axes" if plan.rotated else "one-shot scores"
        found.append(Skipped("learned masks of the hidden width", f"{_MASKED}; it was chosen by {how}"))
    if len(plan.layers) < plan.shape.layers:
        found.append(Skipped("learned masks of layers", f"{_MASKED}; layers were chosen by depth_method"))
    return tuple(found)
