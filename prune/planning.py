"""From scores to a keep plan: along every axis the best-scored stay, ties to the lower index.

The method's scores come from the full model, once for all axes (single-shot importance: Minitron found that scoring
again between cuts ends at the same loss). Which layers stay is decided first; units and groups are chosen in those.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from dwindle.errors import RecipeError
from dwindle.prune.budget import Counts, fitted
from dwindle.prune.keep_plan import KeepPlan, LayerKeep, require_float, weights_sha256
from dwindle.prune.scores import AxisScores, activation_axis_scores, magnitude_axis_scores
from dwindle.prune.shape import Shape, shape_refusals
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.prune.options import PruneOptions

__all__ = ["axis_scores", "plan", "plan_from_scores"]


def plan(bundle: ModelBundle, options: PruneOptions, calibration: TokenSet | None = None) -> KeepPlan:
    """Return what to keep of a model.

    Raises RecipeError for a quantized model, missing calibration data, options that remove nothing, or a shape that
    transformers would refuse; DoesNotFit for a budget out of reach.
    """
    require_float(bundle)
    _require_data(options, calibration)
    counts = _counts(bundle, options)
    _refuse_empty_cuts(bundle, options, counts)
    return plan_from_scores(bundle, options, axis_scores(bundle, options, calibration, counts), calibration)


def axis_scores(
    bundle: ModelBundle, options: PruneOptions, calibration: TokenSet | None, counts: Counts | None = None
) -> AxisScores:
    """Return the options' scores of units, groups, channels, and of layers where some have to go."""
    from dwindle.prune.depth_scores import block_influence, leave_one_out
    from dwindle.prune.gradient_scores import gradient_axis_scores

    counts = _counts(bundle, options) if counts is None else counts
    if options.method == "magnitude" or calibration is None:
        found = magnitude_axis_scores(bundle)
    elif options.method == "activation":
        found = activation_axis_scores(bundle, calibration)
    else:
        found = gradient_axis_scores(bundle, calibration, options.method)
    layers = None
    if calibration is not None and (counts.layers < bundle.anatomy.layers or _searches(options)):
        score = block_influence if options.depth_method == "block_influence" else leave_one_out
        layers = score(bundle, calibration)
    return AxisScores(found.ffn, found.groups, found.channels, layers)


def plan_from_scores(
    bundle: ModelBundle, options: PruneOptions, scores: AxisScores, calibration: TokenSet | None = None
) -> KeepPlan:
    """Return the plan that keeps the best by given scores (learned masks, for instance), as many as the options say.

    A rotated width is scored here, from the calibration text: by the variance along the axes that stay.
    """
    require_float(bundle)
    shape = Shape.of(bundle.anatomy)
    counts = _counts(bundle, options)
    rotated = _turns(bundle, options, counts, calibration)
    if _searches(options):
        counts = fitted(shape, counts, scores, options, bundle.storage_dtype.itemsize, rotated)
    layers = range(shape.layers) if scores.layers is None else _best(scores.layers, counts.layers)
    kept = []
    for layer in layers:
        units = _choice(scores.ffn[layer], counts.ffn) if scores.ffn else None
        groups = _choice(scores.groups[layer], counts.groups) if scores.groups else None
        kept.append(LayerKeep(layer, units, groups, _share(scores.ffn, layer, units),
                              _share(scores.groups, layer, groups)))  # fmt: skip
    channels, width_score = None, 1.0
    if rotated and calibration is not None:
        width_score = _rotated_share(bundle, calibration, counts.width, layers)
    elif scores.channels is not None:
        channels = _choice(scores.channels, counts.width)
        width_score = _share([scores.channels], 0, channels)
    made = KeepPlan(
        method=options.method,
        model_sha256=weights_sha256(bundle),
        shape=shape,
        layers=tuple(kept),
        width=counts.width,
        channels=channels,
        rotated=rotated,
        width_score=width_score,
        layer_scores=() if scores.layers is None else tuple(scores.layers.tolist()),
    )
    refusals = shape_refusals(made.after, bundle.model.config)
    if refusals:
        raise RecipeError(f"prune: {'; '.join(refusals)}.")
    return made


def _searches(options: PruneOptions) -> bool:
    return options.parameters is not None or options.bytes is not None


def _counts(bundle: ModelBundle, options: PruneOptions) -> Counts:
    shape = Shape.of(bundle.anatomy)
    return Counts(
        ffn=options.rounded(options.ffn_keep, shape.ffn_width),
        groups=options.counted(options.heads_keep, shape.kv_heads),
        width=options.rounded(options.width_keep, shape.width),
        layers=options.counted(options.layers_keep, shape.layers),
    )


def _require_data(options: PruneOptions, calibration: TokenSet | None) -> None:
    if calibration is not None:
        return
    needing = []
    if options.method != "magnitude":
        needing.append(f"method={options.method!r}")
    if options.layers_keep < 1:
        needing.append(f"layers_keep={options.layers_keep}")
    if options.rotate:
        needing.append("rotate")
    if _searches(options):
        needing.append("a budget")
    if needing:
        raise RecipeError(
            f"prune: {', '.join(needing)} needs calibration data. Give some, or cut units, heads or width by "
            "method='magnitude'."
        )


def _refuse_empty_cuts(bundle: ModelBundle, options: PruneOptions, counts: Counts) -> None:
    """Raise RecipeError if no cut is named, or rounding takes one back: nothing that was asked for is left out."""
    shape = Shape.of(bundle.anatomy)
    sizes = {"ffn_keep": (shape.ffn_width, counts.ffn), "heads_keep": (shape.kv_heads, counts.groups),
             "width_keep": (shape.width, counts.width), "layers_keep": (shape.layers, counts.layers)}  # fmt: skip
    asked = [name for name in sizes if getattr(options, name) < 1]
    if not asked and not _searches(options):
        raise RecipeError("prune: nothing to cut is named. Give a share below 1, as in ffn_keep=0.5, or a budget.")
    empty = [f"{name}={getattr(options, name)} of {sizes[name][0]:,}" for name in asked if len(set(sizes[name])) == 1]
    if empty:
        raise RecipeError(
            f"prune: {', '.join(empty)}, rounded (FFN and width to multiples of {options.multiple}), removes nothing. "
            "Lower the share or multiple."
        )


def _best(scores: Tensor, count: int) -> list[int]:
    found: list[int] = scores.argsort(descending=True, stable=True)[:count].sort().values.tolist()
    return found


def _choice(scores: Tensor, count: int) -> tuple[int, ...] | None:
    return None if count == len(scores) else tuple(_best(scores, count))


def _share(scores: list[Tensor], index: int, kept: tuple[int, ...] | None) -> float:
    if kept is None or not scores[index].any():
        return 1.0
    return float(scores[index][list(kept)].sum() / scores[index].sum())


def _turns(bundle: ModelBundle, options: PruneOptions, counts: Counts, calibration: TokenSet | None) -> bool:
    """Return whether the width is turned; raise RecipeError where the options insist on what cannot be done."""
    from dwindle.prune.rotation import turning_refusal

    shape = Shape.of(bundle.anatomy)
    if options.rotate is False or counts.width == shape.width:
        return False
    if calibration is None:
        if options.rotate:
            raise RecipeError("prune: rotate needs calibration data. Give some.")
        return False
    refusal = turning_refusal(bundle.anatomy, counts.shape(shape, rotated=True))
    if refusal and options.rotate:
        raise RecipeError(f"prune: {refusal}. Leave rotate out: channels are chosen instead.")
    return refusal is None


def _rotated_share(bundle: ModelBundle, calibration: TokenSet, width: int, layers: Iterable[int]) -> float:
    from dwindle.prune.rotation import principal_axes

    variances = principal_axes(bundle, calibration, layers)[1]
    return float(variances[:width].sum() / variances.sum())
