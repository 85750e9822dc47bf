"""The prune step: plan, refit what reads the cut, cut, round to the stored type, record."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from dwindle.clock import StepClock
from dwindle.errors import RecipeError
from dwindle.prune.keep_plan import KeepPlan, require_float
from dwindle.prune.options import PruneOptions
from dwindle.prune.planning import plan
from dwindle.prune.smaller_config import written_as
from dwindle.prune.surgery import apply
from dwindle.report import Skipped, StepRecord
from dwindle.storage import hash_json
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dwindle.bundle import ModelBundle

__all__ = ["run"]


def run(
    bundle: ModelBundle,
    options: PruneOptions,
    calibration: TokenSet | None = None,
    *,
    keep_plan: KeepPlan | None = None,
) -> tuple[ModelBundle, StepRecord]:
    """Return a smaller bundle and its record (sizes only; a `Meter` fills in quality).

    `keep_plan` applies a plan made earlier, instead of one made from the options and the calibration data; the data
    still serve to compensate for the cut and to turn the width.
    """
    with StepClock() as clock:
        chosen = plan(bundle, options, calibration) if keep_plan is None else keep_plan
        chosen.require(bundle)
        inputs = {"plan": hash_json(chosen.to_json())}
        if calibration is not None:
            inputs["calibration"] = calibration.sha256
        model, refitted, skipped = _cut(bundle, options, chosen, calibration)
        pruned = bundle.derive(model, "prune", asdict(options), inputs).stored_dtype_rounded()
        record_sizes = bundle.size(), pruned.size()
    return pruned, StepRecord("prune", *record_sizes, seconds=clock.seconds, peak_rss_bytes=clock.peak_rss_bytes,
                              skipped=skipped, details=_details(chosen, refitted))  # fmt: skip


def _cut(
    bundle: ModelBundle, options: PruneOptions, chosen: KeepPlan, calibration: TokenSet | None
) -> tuple[PreTrainedModel, int, tuple[Skipped, ...]]:
    """Return (the smaller model, how many of its linears were refitted, what was asked for and not done)."""
    from dwindle.prune.compensation import refitted_readers
    from dwindle.prune.rotation import principal_axes, turning_refusal

    require_float(bundle)
    readers: dict[str, Tensor] = {}
    axes, skipped = None, list[Skipped]()
    if not chosen.rotated and chosen.width < chosen.shape.width and options.rotate is None:
        refusal = turning_refusal(bundle.anatomy, replace(chosen.after, tied=False))
        skipped.append(Skipped("rotation of the width", refusal or "the plan chooses channels"))
    if chosen.rotated:
        refusal = turning_refusal(bundle.anatomy, chosen.after)
        if refusal:
            raise RecipeError(f"prune: {refusal}. Make the plan without rotate.")
        if calibration is None:
            raise RecipeError("prune: the plan turns the hidden width, which needs calibration data. Give some.")
        axes = principal_axes(bundle, calibration, [keep.layer for keep in chosen.layers])[0]
    loses = any(keep.ffn_units is not None or keep.kv_groups is not None for keep in chosen.layers)
    if options.compensate and loses:
        if calibration is None:
            why = "no calibration data; with some, down and o would be refitted to what stays"
            skipped.append(Skipped("compensation", why))
        else:
            readers = refitted_readers(bundle, chosen, calibration, options.damping)
    return apply(bundle, chosen, readers=readers, axes=axes), len(readers), tuple(skipped)


def _details(chosen: KeepPlan, refitted: int) -> dict[str, Any]:
    before, after = chosen.shape, chosen.after
    return {
        "method": chosen.method,
        "layers": [before.layers, after.layers],
        "width": [before.width, after.width],
        "ffn_width": [before.ffn_width, after.ffn_width],
        "kv_heads": [before.kv_heads, after.kv_heads],
        "rotated": chosen.rotated,
        "architecture": [before.model_type, written_as(after)],
        "refitted_linears": refitted,
        "removed": 1 - after.parameters / before.parameters,
        "kept_score": list(chosen.kept_score),
        "plan": chosen.to_json(),
    }
