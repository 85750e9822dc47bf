"""From scores to a keep plan: along every axis the best-scored stay, ties to the lower index.

The method's scores come from the full model, once for all axes (single-shot importance: Minitron found that scoring
again between cuts ends at the same loss). Which layers stay is decided first; units and groups are chosen in those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.errors import RecipeError
from dwindle.prune.budget import Counts, best_first, fitted
from dwindle.prune.keep_plan import KeepPlan, LayerKeep, require_float, weights_sha256
from dwindle.prune.method import axis_scores, method_name
from dwindle.prune.scores import AxisScores
from dwindle.prune.shape import Shape, shape_refusals
from dwindle.prune.vocabulary import plan_vocabulary
from dwindle.prune.vocabulary_counts import Corpora
from dwindle.prune.vocabulary_plan import VocabularyPlan
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.prune.learned_plan import LearnedPlan
    from dwindle.prune.options import PruneOptions
    from dwindle.train import TrainLine

__all__ = ["plan", "plan_by_masks", "plan_from_scores"]


def plan(
    bundle: ModelBundle,
    options: PruneOptions,
    calibration: TokenSet | None = None,
    train: TokenSet | None = None,
    *,
    corpora: Corpora | None = None,
) -> KeepPlan:
    """Return what to keep of a model. `train` is the text that the masks of method=soft_top_k learn on.

    Tokens are counted in `corpora`, without them in both sets.

    Raises RecipeError for a quantized model, missing data, options that remove nothing, or a shape that transformers
    would refuse; DoesNotFit for a budget out of reach.
    """
    if options.method != "soft_top_k":
        return _one_shot_plan(bundle, options, calibration, train, corpora)
    if options.masks.weight_rate is not None:
        raise RecipeError(
            f"prune: masks: weight_rate={options.masks.weight_rate:g} trains weights that a plan cannot hold. Leave it "
            "out, or run the whole step."
        )
    return plan_by_masks(bundle, options, calibration, train, corpora=corpora).plan


def plan_by_masks(
    bundle: ModelBundle,
    options: PruneOptions,
    calibration: TokenSet | None,
    train: TokenSet | None,
    *,
    corpora: Corpora | None = None,
    folder: Path | None = None,
    on_step: Callable[[TrainLine], None] | None = None,
) -> LearnedPlan:
    """Return what trained masks keep, with the model it is cut out of; see `learned_plan`."""
    from dwindle.prune.learned_plan import learned_plan

    counted = _one_shot_plan(bundle, options, calibration, train, corpora)
    return learned_plan(bundle, counted, options.masks, train, folder=folder, on_step=on_step)


def _one_shot_plan(
    bundle: ModelBundle,
    options: PruneOptions,
    calibration: TokenSet | None,
    train: TokenSet | None,
    corpora: Corpora | None,
) -> KeepPlan:
    require_float(bundle)
    counts = _counts(bundle, options)
    unscored = options.vocabulary is not None and not options.budgeted and _cuts_nothing_else(bundle, counts)
    if not unscored:
        _require_data(options, calibration)
    _refuse_empty_cuts(bundle, options, counts)
    vocabulary = _planned_vocabulary(bundle, options, corpora, calibration, train)
    scores = AxisScores() if unscored else axis_scores(bundle, options, calibration, counts)
    method = "token counts" if unscored else method_name(bundle, options, counts)
    return plan_from_scores(bundle, options, scores, calibration, vocabulary=vocabulary, method=method)


def _planned_vocabulary(
    bundle: ModelBundle, options: PruneOptions, corpora: Corpora | None, *sets: TokenSet | None
) -> VocabularyPlan | None:
    """Return the tokens to keep by the corpora, or else by the sets that are there; None where all stay."""
    if options.vocabulary is None:
        return None
    counted = [tokens for tokens in sets if tokens is not None] if corpora is None else corpora
    if not counted:
        raise RecipeError("prune: which tokens of the vocabulary stay is decided by counting them in text. Give "
                          "calibration or training data.")  # fmt: skip
    return plan_vocabulary(bundle, counted, options.vocabulary)


def _cuts_nothing_else(bundle: ModelBundle, counts: Counts) -> bool:
    return counts == Counts.of(Shape.of(bundle.anatomy))


def plan_from_scores(
    bundle: ModelBundle,
    options: PruneOptions,
    scores: AxisScores,
    calibration: TokenSet | None = None,
    *,
    vocabulary: VocabularyPlan | None = None,
    method: str | None = None,
) -> KeepPlan:
    """Return the plan that keeps the best by given scores (learned masks, for instance), as many as the options say.

    Given the tokens that stay, a budget counts what the others save before anything else is cut for it.
    A rotated width is scored here, from the calibration text: by the variance along the axes that stay. `method` says
    where the scores come from, if not from the options' method.
    """
    require_float(bundle)
    shape = Shape.of(bundle.anatomy)
    counts = _counts(bundle, options)
    rotated = _turns(bundle, options, counts, calibration, scores.layers)
    if options.budgeted:
        short = shape if vocabulary is None else replace(shape, vocab=len(vocabulary.tokens))
        counts = fitted(short, counts, scores, options, bundle.storage_dtype.itemsize, rotated)
    layers = range(shape.layers) if scores.layers is None else _best(scores.layers, counts.layers)
    kept = []
    for layer in layers:
        units = _choice(scores.ffn[layer], counts.units(shape, layer)) if scores.ffn else None
        groups = _choice(scores.groups[layer], counts.groups) if scores.groups else None
        kept.append(LayerKeep(layer, units, groups, _share(scores.ffn, layer, units),
                              _share(scores.groups, layer, groups),
                              **_chosen_experts(shape, scores, layer, counts)))  # fmt: skip
    channels, width_score = None, 1.0
    if rotated and calibration is not None:
        width_score = _rotated_share(bundle, calibration, counts.width, layers)
    elif scores.channels is not None:
        channels = _choice(scores.channels, counts.width)
        width_score = _share([scores.channels], 0, channels)
    made = KeepPlan(
        method=method or options.method or "scores",
        model_sha256=weights_sha256(bundle),
        shape=shape,
        layers=tuple(kept),
        width=counts.width,
        channels=channels,
        rotated=rotated,
        width_score=width_score,
        layer_scores=() if scores.layers is None else tuple(scores.layers.tolist()),
        vocabulary=vocabulary,
    )
    refusals = shape_refusals(made.after, bundle.model.config)
    if refusals:
        raise RecipeError(f"prune: {'; '.join(refusals)}.")
    return made


def _chosen_experts(shape: Shape, scores: AxisScores, layer: int, counts: Counts) -> dict[str, Any]:
    """Return what a layer's `LayerKeep` says of its experts; nothing without any."""
    if not shape.has_experts(layer) or not scores.experts:
        return {}
    kept = _choice(scores.experts[layer], counts.experts)
    found: dict[str, Any] = {"experts": kept, "experts_score": _share(scores.experts, layer, kept)}
    if counts.expert_width < shape.expert_width:
        rows = scores.expert_units[layer] if kept is None else scores.expert_units[layer][list(kept)]
        units = torch.tensor([_best(row, counts.expert_width) for row in rows])
        whole = float(rows.sum())
        found["expert_units"] = tuple(map(tuple, units.tolist()))
        found["expert_units_score"] = float(rows.gather(1, units).sum()) / whole if whole else 1.0
    return found


def _counts(bundle: ModelBundle, options: PruneOptions) -> Counts:
    shape = Shape.of(bundle.anatomy)
    return Counts(
        ffn=options.rounded(options.ffn_keep, shape.ffn_width),
        groups=options.counted(options.heads_keep, shape.kv_heads),
        width=options.rounded(options.width_keep, shape.width),
        layers=options.counted(options.layers_keep, shape.layers),
        shared=options.rounded(options.ffn_keep, shape.shared_width),
        experts=max(shape.top_k, options.counted(options.experts_keep, shape.experts)) if shape.experts else 0,
        expert_width=options.rounded(options.expert_width_keep, shape.expert_width),
    )


def _require_data(options: PruneOptions, calibration: TokenSet | None) -> None:
    if calibration is not None:
        return
    needing = []
    if options.method not in ("magnitude", "soft_top_k"):
        needing.append(f"method={options.method or 'activation'!r}")
    if options.layers_keep < 1:
        needing.append(f"layers_keep={options.layers_keep}")
    if options.rotate:
        needing.append("rotate")
    if options.budgeted:
        needing.append("a budget")
    if needing:
        raise RecipeError(
            f"prune: {', '.join(needing)} needs calibration data. Give some, or cut units, heads or width by "
            "method='magnitude'."
        )


def _refuse_empty_cuts(bundle: ModelBundle, options: PruneOptions, counts: Counts) -> None:
    """Raise RecipeError if no cut is named, or rounding takes one back: nothing that was asked for is left out."""
    shape = Shape.of(bundle.anatomy)
    rows = [("ffn_keep", shape.ffn_width, counts.ffn), ("heads_keep", shape.kv_heads, counts.groups),
            ("width_keep", shape.width, counts.width), ("layers_keep", shape.layers, counts.layers),
            ("experts_keep", shape.experts, counts.experts), ("ffn_keep", shape.shared_width, counts.shared),
            ("expert_width_keep", shape.expert_width, counts.expert_width)]  # fmt: skip
    asked = [name for name in dict.fromkeys(name for name, *_ in rows) if getattr(options, name) < 1]
    absent = [name for name in asked if not any(size for axis, size, _ in rows if axis == name)]
    if absent:
        kind = "whose FFN units are those of its experts (expert_width_keep)" if shape.experts else "without experts"
        raise RecipeError(f"prune: {', '.join(absent)} cuts nothing in this {shape.model_type} model, {kind}. Leave it "
                          "out.")  # fmt: skip
    if not asked and not options.budgeted and options.vocabulary is None:
        raise RecipeError("prune: nothing to cut is named. Give a share below 1, as in ffn_keep=0.5, or a budget.")
    whole = [(axis, size) for axis, size, left in rows if axis in asked and left == size > 0]
    empty = [f"{axis}={getattr(options, axis)} of {size:,}" for axis, size in whole]
    if empty:
        floor = f", experts at least the {shape.top_k} a token passes" if shape.experts else ""
        raise RecipeError(
            f"prune: {', '.join(empty)}, rounded (FFN and width to multiples of {options.multiple}{floor}), removes "
            "nothing. Lower the share or multiple."
        )


def _best(scores: Tensor, count: int) -> list[int]:
    return sorted(best_first(scores)[:count])


def _choice(scores: Tensor, count: int) -> tuple[int, ...] | None:
    return None if count == len(scores) else tuple(_best(scores, count))


def _share(scores: list[Tensor], index: int, kept: tuple[int, ...] | None) -> float:
    if kept is None or not scores[index].any():
        return 1.0
    return float(scores[index][list(kept)].sum() / scores[index].sum())


def _turns(
    bundle: ModelBundle, options: PruneOptions, counts: Counts, calibration: TokenSet | None, layers: Tensor | None
) -> bool:
    """Return whether the width is turned; raise RecipeError where the options insist on what cannot be done."""
    from dwindle.prune.rotation import turning_refusal

    shape = Shape.of(bundle.anatomy)
    if options.rotate is False or counts.width == shape.width:
        return False
    if calibration is None:
        if options.rotate:
            raise RecipeError("prune: rotate needs calibration data. Give some.")
        return False
    refusal = turning_refusal(
        bundle.anatomy, counts.shape(shape, rotated=True, order=None if layers is None else best_first(layers))
    )
    if refusal and options.rotate:
        raise RecipeError(f"prune: {refusal}. Leave rotate out: channels are chosen instead.")
    return refusal is None


def _rotated_share(bundle: ModelBundle, calibration: TokenSet, width: int, layers: Iterable[int]) -> float:
    from dwindle.prune.rotation import principal_axes

    variances = principal_axes(bundle, calibration, layers)[1]
    return float(variances[:width].sum() / variances.sum())
