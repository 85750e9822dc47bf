r"""Learned masks: which units stay is trained, with the distillation loss, instead of read off the activations.

    minimise over scores    KL(model || model with masks)      exactly k units stay in every layer (`soft_top_k`)

Apple's on-device model was cut out of a larger one so: FFN units only, masks by Soft-Top-K instead of L0 relaxations,
trained on 188 billion tokens (arXiv 2407.21075). The number of kept units is exact at every step, so no multiplier has
to pull the sparsity to its target, as with the hard-concrete masks of Sheared LLaMA (arXiv 2310.06694). Scores see each
other through the loss: of two units that do the same, one goes, where one-shot scores keep both or none.

What surrounds the operator is a choice, as Apple has published nothing of it:

- *Start*: the ranks of one-shot activation scores, as quantiles of the normal distribution. Activations are so
  heavy-tailed that their values would give all but a few units of a layer about the same score.
- *Warm-up of the sparsity* over the first fifth (the share that Sheared LLaMA takes): k falls linearly to its target.
- *Temperature* falls geometrically, from well above the spread of the scores. A unit at 1 has no gradient: one that is
  wrongly kept can only be dropped while nothing is saturated. It ends so low that the masks are near 0 and 1, because
  fractions are a freedom that the cut does not have. stories260K, half of the units, 100 steps of 1,024 tokens,
  nats/token of the hard choice: 0.3 -> 0.02 gives 3.66, 1 -> 0.02 3.25, 2 -> 0.02 3.14, 4 -> 0.02 2.99; 4 -> 0.1 at
  twice the rate 3.29 (one-shot activation scores 3.78, magnitude 4.15). The defaults are the best of 13 tries on that
  text, and other texts may like others.
- *Hard at the end*: the k units of the highest scores stay, and nothing of the soft masks is left in the weights.

With `weight_rate` the weights of a copy learn along with the masks, as Apple's do.

Memory over the model: the activations of a batch, a score with its gradient and two moments per unit; with
`weight_rate` the copy, and a gradient and two moments per weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.anatomy import require_dense
from dwindle.divergence import forward_kl
from dwindle.errors import DataError, RecipeError
from dwindle.prune.keep_plan import require_float
from dwindle.prune.mask_options import MaskOptions, MaskSchedule
from dwindle.prune.masked_model import AxisMasks, MaskAxis, MaskedModel, axis_units
from dwindle.prune.scores import activation_axis_scores
from dwindle.token_set import TokenSet
from dwindle.tokenization import require_tokenizer
from dwindle.train import TrainLine, TrainResult, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dwindle.bundle import ModelBundle

__all__ = ["LearnedMasks", "UnmaskedTeacher", "learn_masks", "train_masks"]

START_WINDOWS = 128
"""Windows that the one-shot scores of the start are taken from."""


@dataclass(frozen=True)
class LearnedMasks:
    """What stays, how sure that is, and the model whose weights learned along."""

    units: Mapping[MaskAxis, list[Tensor]]
    """By axis and layer: indices of the kept units, ascending."""
    scores: Mapping[MaskAxis, list[Tensor]]
    """By axis and layer: the last soft masks in float64; the kept units have the highest. Their share of the sum says
    how much was left to decide: 1 for nothing."""
    model: PreTrainedModel | None
    """The copy with trained weights, not cut yet; None if the weights were left alone."""
    training: TrainResult
    """Losses and tokens of the run."""


class UnmaskedTeacher:
    """The objective of the training loop: mean KL(unmasked || masked) over all B * T positions."""

    def __init__(self, bundle: ModelBundle, step: int = 0) -> None:
        self._bundle, self._step = bundle, step

    def at(self, step: int, steps: int) -> UnmaskedTeacher:
        """Return the objective of optimizer step `step` (0-based): that of its masks."""
        return UnmaskedTeacher(self._bundle, step)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss in nats per token; every position of `batch` [B, T] is predicted from."""
        masked: Any = model
        masked.step = self._step
        with torch.no_grad():
            wanted = _logits(self._bundle.model, batch)
        return forward_kl(_logits(model, batch), wanted), {}


def _logits(model: Any, ids: Tensor) -> Tensor:
    # The mask of ones: nothing is padded, so attention may take its causal fast path (see core.measure).
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.flatten(0, 1)


def learn_masks(
    bundle: ModelBundle,
    keep: float,
    tokens: TokenSet,
    options: MaskOptions | None = None,
    *,
    start: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return per layer the ascending indices of the FFN units to keep; see `train_masks`.

    Raises RecipeError also for `weight_rate`: the weights that learn along are only in what `train_masks` returns.
    """
    if options is not None and options.weight_rate is not None:
        raise RecipeError(
            f"prune: masks: weight_rate={options.weight_rate:g} trains weights that a list of units cannot hold. "
            "Leave it out, or take model and units from train_masks."
        )
    given: dict[MaskAxis, Sequence[Tensor]] = {} if start is None else {"ffn": start}
    return train_masks(bundle, {"ffn": keep}, tokens, options, start=given).units["ffn"]


def train_masks(
    bundle: ModelBundle,
    keep: Mapping[MaskAxis, float],
    tokens: TokenSet,
    options: MaskOptions | None = None,
    *,
    start: Mapping[MaskAxis, Sequence[Tensor]] | None = None,
    folder: Path | None = None,
    on_step: Callable[[TrainLine], None] | None = None,
) -> LearnedMasks:
    """Return masks that keep the given share of every layer's units along each axis, rounded to whole units.

    `tokens` are training or calibration windows. `start` are one-shot scores by axis and layer, of which the ranks
    count; activation scores where there are none. With a `folder` the run logs and checkpoints there and goes on from
    where it stopped. The bundle's model is left as it is.

    Raises RecipeError for a quantized model, shares that remove nothing or everything, or scores of another shape, and
    DataError for evaluation text, tokens of another tokenizer or windows longer than the context, UnsupportedModel for
    a model with experts.
    """
    options = MaskOptions() if options is None else options
    require_float(bundle)
    require_dense(bundle.anatomy, "prune by trained masks")
    anatomy = bundle.anatomy
    kept = _kept_units(bundle, keep)
    windows = _training_windows(bundle, tokens)
    first = _start_scores(bundle, windows, kept, start or {})
    training = options.training
    steps = training.total_steps(*windows.ids.shape)
    unit = options.learning_rate / training.learning_rate
    axes = {
        axis: AxisMasks(
            first[axis].to(bundle.model.device), MaskSchedule(axis_units(anatomy, axis), count, steps, options), unit
        )
        for axis, count in kept.items()
    }
    copied = options.weight_rate is not None
    model: Any = copy.deepcopy(bundle.model).requires_grad_(True) if copied else bundle.model
    masked = MaskedModel(model, anatomy, axes, trained=copied).to(bundle.model.device)
    identity = {"teacher": bundle.content_sha256, "kept": kept, **options.schedules}
    result = train(masked, UnmaskedTeacher(bundle), windows, training,
                   folder=folder, on_step=on_step, identity=identity)  # fmt: skip
    with torch.no_grad():
        scores = {axis: list(masks.soft(steps).double().cpu().unbind()) for axis, masks in axes.items()}
    units = {axis: list(masks.kept().unbind()) for axis, masks in axes.items()}
    return LearnedMasks(units, scores, model.eval() if copied else None, result)


def _kept_units(bundle: ModelBundle, keep: Mapping[MaskAxis, float]) -> dict[MaskAxis, int]:
    """Return how many units of a layer stay by axis."""
    sizes = {axis: axis_units(bundle.anatomy, axis) for axis in keep}
    kept = {axis: round(share * sizes[axis]) for axis, share in keep.items()}
    wrong = [f"{axis}={keep[axis]!r} of {sizes[axis]:,}" for axis in keep if not 0 < kept[axis] < sizes[axis]]
    if wrong or not kept:
        raise RecipeError(
            f"prune: masks: {', '.join(wrong) or 'no axis'} leaves nothing to choose. Needed is a share that, rounded "
            "to whole units, keeps at least one and not all."
        )
    return kept


def _training_windows(bundle: ModelBundle, tokens: TokenSet) -> TokenSet:
    """Return the windows with the role the loop asks for, without the token that a full training window ends in."""
    context, window = bundle.anatomy.context, tokens.ids.shape[1]
    if tokens.role == "evaluation":
        raise DataError(
            f"{tokens.source}: masks are trained on this text, and its role is 'evaluation'. Build a training or "
            "calibration set; what is measured on must not be trained on."
        )
    require_tokenizer(tokens, bundle.tokenizer)
    if window > context + 1:
        raise DataError(
            f"{tokens.source}: windows of {window:,} tokens, but the model's context is {context:,}. "
            f"Build the set with context={context}."
        )
    return replace(tokens, role="train", ids=tokens.ids[:, :context])


def _start_scores(
    bundle: ModelBundle, windows: TokenSet, kept: Mapping[MaskAxis, int], given: Mapping[MaskAxis, Sequence[Tensor]]
) -> dict[MaskAxis, Tensor]:
    """Return float32 [L, n] by axis: ranks of one-shot scores as normal quantiles."""
    found = dict(given)
    if set(kept) - set(given):
        sample = replace(windows, role="calibration", ids=windows.ids[:START_WINDOWS])
        measured = activation_axis_scores(bundle, sample)
        found = {"ffn": measured.ffn, "kv_groups": measured.groups, **given}
    layers, wrong = bundle.anatomy.layers, []
    for axis in kept:
        n = axis_units(bundle.anatomy, axis)
        if len(found[axis]) != layers or any(scores.shape != (n,) for scores in found[axis]):
            shapes = ", ".join(str(tuple(scores.shape)) for scores in found[axis])
            wrong.append(f"{axis} of shapes {shapes} (needed: {layers} of ({n},))")
    if wrong:
        raise RecipeError(f"prune: masks: scores to start from, {'; '.join(wrong)}. Score this model.")
    return {axis: torch.stack([_quantiles(scores) for scores in found[axis]]) for axis in kept}


def _quantiles(scores: Tensor) -> Tensor:
    """Return each score's rank as a quantile of the normal distribution; of equal scores, the lower index the higher.

    >>> [round(x, 3) for x in _quantiles(torch.tensor([9.0, 0.1, 900.0])).tolist()]
    [0.0, -0.967, 0.967]
    """
    order = scores.detach().cpu().argsort(descending=True, stable=True)
    above = torch.empty(len(order), dtype=torch.float64)
    above[order] = torch.arange(len(order), dtype=torch.float64)
    quantiles: Tensor = torch.special.ndtri(1 - (above + 0.5) / len(order))
    return quantiles.float()
