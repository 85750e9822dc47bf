"""The prune step: plan, refit what reads the cut, cut, the vocabulary last, round to the stored type, record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.clock import StepClock
from dwindle.errors import RecipeError
from dwindle.prune.keep_plan import KeepPlan, require_float
from dwindle.prune.options import PruneOptions
from dwindle.prune.planning import plan, plan_by_masks
from dwindle.prune.shape import Shape
from dwindle.prune.smaller_config import written_as
from dwindle.prune.surgery import apply
from dwindle.prune.vocabulary_counts import Corpora
from dwindle.prune.vocabulary_surgery import with_plan_tokens
from dwindle.report import Skipped, StepRecord
from dwindle.resources import require_memory
from dwindle.storage import hash_json
from dwindle.token_set import TokenSet
from dwindle.train_log import TrainLine

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dwindle.bundle import ModelBundle

__all__ = ["cut_details", "prepared", "recorded_options", "run"]


def run(
    bundle: ModelBundle,
    options: PruneOptions,
    calibration: TokenSet | None = None,
    *,
    keep_plan: KeepPlan | None = None,
    train: TokenSet | None = None,
    corpora: Corpora | None = None,
    folder: Path | None = None,
    on_step: Callable[[TrainLine], None] | None = None,
) -> tuple[ModelBundle, StepRecord]:
    """Return a smaller bundle and its record (sizes only; a `Meter` fills in quality).

    `keep_plan` applies a plan made earlier, instead of one made from the options and the calibration data; the data
    still serve to compensate for the cut and to turn the width. `train` is the text that the masks of
    method=soft_top_k learn on; with a `folder` their training logs and checkpoints there and goes on from where it
    stopped. Tokens of the vocabulary are counted in `corpora`, without them in `calibration` and `train`.
    """
    with StepClock() as clock:
        source, learned, untold = bundle, dict[str, Any](), tuple[Skipped, ...]()
        if keep_plan is None and options.method == "soft_top_k":
            found = plan_by_masks(bundle, options, calibration, train, corpora=corpora, folder=folder, on_step=on_step)
            chosen, source, learned, untold = found.plan, found.bundle, found.details, found.skipped
        else:
            chosen = plan(bundle, options, calibration, train, corpora=corpora) if keep_plan is None else keep_plan
        chosen.require(source)
        inputs = {"plan": hash_json(chosen.to_json())}
        if calibration is not None:
            inputs["calibration"] = calibration.sha256
        if learned and train is not None:
            inputs["train"] = train.sha256
        model, refitted, skipped = _cut(source, options, chosen, calibration, trained=source is not bundle)
        pruned = bundle.derive(model, "prune", recorded_options(options), inputs)
        if chosen.vocabulary is not None:
            pruned = with_plan_tokens(pruned, chosen.vocabulary)
        pruned.stored_dtype_rounded()
        record_sizes = bundle.size(), pruned.size()
    return pruned, StepRecord("prune", *record_sizes, seconds=clock.seconds, peak_rss_bytes=clock.peak_rss_bytes,
                              skipped=skipped + untold, details=cut_details(chosen, refitted) | learned)  # fmt: skip


def recorded_options(options: PruneOptions) -> dict[str, Any]:
    """Return the options for the lineage, as JSON types; those of masks only where there are masks."""
    found = asdict(options)
    masks = found.pop("masks")
    if options.method == "soft_top_k":
        found["masks"] = {key: list(value) if isinstance(value, tuple) else value for key, value in masks.items()}
    return found


def _cut(
    bundle: ModelBundle, options: PruneOptions, chosen: KeepPlan, calibration: TokenSet | None, trained: bool
) -> tuple[PreTrainedModel, int, tuple[Skipped, ...]]:
    """Return (the smaller model, how many of its linears were refitted, what was asked for and not done).

    `trained` weights have learned to do without what is cut: a refit would bring it back.
    """
    from dwindle.prune.compensation import refitted_readers

    if bundle.model.device.type == "cpu":
        size = chosen.parameters_after * next(bundle.model.parameters()).element_size()
        parts = {"the smaller model beside the whole": size}
        require_memory(f"prune: {chosen.parameters_after:,} parameters stay", parts, "Cut more, give the model as a "
                       "folder, which is cut layer by layer, or take more memory.")  # fmt: skip
    axes, refits, skipped = prepared(bundle, options, chosen, calibration, trained)
    readers: dict[str, Tensor] = {}
    if refits and calibration is not None:
        readers = refitted_readers(bundle, chosen, calibration, options.damping)
    return apply(bundle, chosen, readers=readers, axes=axes), len(readers), skipped


def prepared(
    bundle: ModelBundle, options: PruneOptions, chosen: KeepPlan, calibration: TokenSet | None, trained: bool = False
) -> tuple[Tensor | None, bool, tuple[Skipped, ...]]:
    """Return (the axes to turn the width onto, whether what reads the cut is refitted, what is not done and why).

    Raises RecipeError for a turned plan that this model cannot have, or without calibration data.
    """
    from dwindle.prune.rotation import principal_axes, turning_refusal

    require_float(bundle)
    axes, refits, skipped = None, False, list[Skipped]()
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
    loses = any(
        indices is not None for keep in chosen.layers for indices in (keep.ffn_units, keep.kv_groups, keep.expert_units)
    )
    if options.compensate and chosen.after.experts < chosen.shape.experts:
        skipped.append(Skipped("compensation of dropped experts", "their tokens pass others, and no linear read them"))
    if options.compensate and loses:
        if trained:
            skipped.append(Skipped("compensation", "the weights learned along with the masks, to do without what goes"))
        elif calibration is None:
            why = "no calibration data; with some, down and o would be refitted to what stays"
            skipped.append(Skipped("compensation", why))
        else:
            refits = True
    return axes, refits, tuple(skipped)


def cut_details(chosen: KeepPlan, refitted: int) -> dict[str, Any]:
    """Return what the record of a cut says beside sizes: shapes, scores and the plan itself."""
    before, after, tokens = chosen.shape, chosen.after, chosen.vocabulary
    return {
        "method": chosen.method,
        "layers": [before.layers, after.layers],
        "width": [before.width, after.width],
        "ffn_width": [before.ffn_width, after.ffn_width],
        "kv_heads": [before.kv_heads, after.kv_heads],
        **(_expert_details(before, after) if before.experts else {}),
        "rotated": chosen.rotated,
        "vocabulary": [before.vocab, after.vocab],
        "vocabulary_coverage": None if tokens is None else tokens.coverage,
        "architecture": [before.model_type, written_as(after)],
        "refitted_linears": refitted,
        "removed": 1 - after.parameters / before.parameters,
        "kept_score": list(chosen.kept_score),
        "plan": chosen.to_json(),
    }


def _expert_details(before: Shape, after: Shape) -> dict[str, list[int]]:
    names = ("experts", "expert_width", "shared_width")
    return {name: [getattr(before, name), getattr(after, name)] for name in names}
