r"""First-order scores: how much the loss on the calibration text would change if a unit, group or channel were masked.

With m_j = 1 a mask on unit j and L_b the summed next-token cross-entropy of window b (nats), g[b, j] = dL_b / dm_j is
the sum over tokens of activation times gradient. Setting m_j to zero changes L_b by -g[b, j] to first order, and

- `taylor` (Molchanov et al. 2017, arXiv 1611.06440, section 2.2):  score_j = sum over windows of |g[b, j]|
- `fisher` (Theis et al. 2018, arXiv 1801.05787, section 2): the diagonal of the empirical Fisher information of the
  masks, the second-order change of the loss at a minimum:          score_j = 1/2 sum over windows of g[b, j]^2

The masks are the only leaves of the backward pass, one row per window, so that no activation's gradient is stored and
no weight needs one. Memory: the activations of one batch with their graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dwindle.experts import mixture_module
from dwindle.prune.calibration_pass import batches, check_calibration, decode, watching
from dwindle.prune.mixture import masked_mixtures, mixtures_of
from dwindle.prune.mixture_scores import per_layer
from dwindle.prune.scores import AxisScores
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["gradient_axis_scores", "window_losses"]

_SLICE_TOKENS = 256
"""Positions whose logits are held at a time: 160 MB of them for the largest vocabularies."""


def gradient_axis_scores(bundle: ModelBundle, calibration: TokenSet, method: Literal["taylor", "fisher"]) -> AxisScores:
    """Return the Taylor or Fisher scores of units, groups and channels, from one forward and backward pass.

    Raises DataError for a set of another role or tokenizer, or windows longer than the model's context.
    """
    check_calibration(bundle, calibration)
    anatomy, mixtures = bundle.anatomy, mixtures_of(bundle)
    totals: dict[str, Tensor] = {}
    for ids in batches(bundle, calibration):
        masks = _masks(bundle, len(ids))
        mixed = {i: (masks[f"experts {i}"][:, 0], masks[f"expert units {i}"][:, 0]) for i in mixtures}
        with torch.enable_grad(), watching(bundle, _watchers(bundle, masks)), masked_mixtures(bundle, mixtures, mixed):
            hidden = decode(bundle, ids) * masks["channels"]
            loss = window_losses(bundle, hidden, ids).sum()
        for name, found in zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True):
            slope = found.squeeze(1).double().cpu()
            sizes = slope.abs().sum(0) if method == "taylor" else slope.square().sum(0) / 2
            totals[name] = totals.get(name, torch.zeros(1)) + sizes
    layers = range(anatomy.layers)
    return AxisScores(
        ffn=[totals.get(f"ffn {layer}", torch.zeros(0).double()) for layer in layers],
        groups=[totals[f"groups {layer}"].flatten() for layer in layers],
        channels=totals["channels"],
        experts=per_layer(anatomy.layers, {layer: totals[f"experts {layer}"] for layer in mixtures}),
        expert_units=per_layer(anatomy.layers, {layer: totals[f"expert units {layer}"] for layer in mixtures}),
    )


def window_losses(bundle: ModelBundle, hidden: Tensor, ids: Tensor) -> Tensor:
    """Return the summed next-token cross-entropy [B] of windows, in nats, from the last hidden states [B, T, D]."""
    head, cap = bundle.model.get_output_embeddings(), bundle.anatomy.traits.logit_softcap
    states, wanted = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    losses = []
    for part, targets in zip(torch.split(states, _SLICE_TOKENS), torch.split(wanted, _SLICE_TOKENS), strict=True):
        logits = head(part).float()
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses).view(len(ids), -1).sum(1)


def _masks(bundle: ModelBundle, windows: int) -> dict[str, Tensor]:
    """Return masks of ones, a row per window: [B, 1, F] and [B, 1, K, 1] per layer, and [B, 1, D] for all of them.

    Layers with experts have [B, 1, E] and [B, 1, E, F] as well.
    """
    anatomy = bundle.anatomy
    sizes: dict[str, tuple[int, ...]] = {"channels": (anatomy.width,)}
    for layer in range(anatomy.layers):
        if anatomy.ffn_width[layer]:
            sizes[f"ffn {layer}"] = (anatomy.ffn_width[layer],)
        sizes[f"groups {layer}"] = (anatomy.kv_heads, 1)
        experts = anatomy.experts_of(layer)
        if experts is not None:
            sizes[f"experts {layer}"] = (experts.count,)
            sizes[f"expert units {layer}"] = (experts.count, experts.width)
    place = bundle.model.device
    return {name: torch.ones(windows, 1, *size, device=place, requires_grad=True) for name, size in sizes.items()}


def _watchers(bundle: ModelBundle, masks: dict[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    anatomy = bundle.anatomy
    watchers: dict[str, Callable[[Tensor], Tensor]] = {}

    def multiplied(mask: Tensor) -> Callable[[Tensor], Tensor]:
        # A shared expert has the tokens of all windows in one.
        return lambda given: (given.reshape(len(mask), -1, given.shape[-1]) * mask).view_as(given)

    def by_group(mask: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda given: (given.reshape(*given.shape[:-1], anatomy.kv_heads, -1) * mask).flatten(-2)

    for layer in range(anatomy.layers):
        parts = anatomy.parts(layer)
        watchers[parts["o"]] = by_group(masks[f"groups {layer}"])
        if "down" in parts:
            watchers[parts["down"]] = multiplied(masks[f"ffn {layer}"])
        mixed = anatomy.experts_of(layer) is not None
        for part in ("qkv", "q", "k", "v", *(() if mixed else ("gate_up", "gate", "up"))):
            if part in parts:
                watchers[parts[part]] = multiplied(masks["channels"])
        if mixed:  # router, experts and shared expert all read what their block is given
            watchers[mixture_module(bundle.model, anatomy, layer)] = multiplied(masks["channels"])
    return watchers
