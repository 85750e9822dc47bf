r"""How much each whole layer matters.

- `block_influence` (Men et al. 2024, ShortGPT, arXiv 2403.03853, section 2.2): how far a layer turns the residual
  stream, from one forward pass:

      score_l = 1 - mean over tokens of cos(input of layer l, output of layer l)

- `leave_one_out`: the nats per token that the model loses without the layer, as in Minitron's perplexity criterion
  (arXiv 2407.14679, section 2.2); one pass per layer and one for the whole model. It may be negative: a layer that
  the model does better without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.anatomy import module
from dwindle.prune.calibration_pass import batches, check_calibration, decode, layer_input, skipping
from dwindle.prune.gradient_scores import window_losses
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["block_influence", "leave_one_out"]


@torch.inference_mode()
def block_influence(bundle: ModelBundle, calibration: TokenSet) -> Tensor:
    """Return the float64 scores [layers].

    Raises DataError for a set of another role or tokenizer, or windows longer than the model's context.
    """
    check_calibration(bundle, calibration)
    anatomy = bundle.anatomy
    totals = torch.zeros(anatomy.layers, dtype=torch.float64)

    def adder(layer: int) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = layer_input(args, kwargs), output[0] if isinstance(output, tuple) else output
            totals[layer] += (1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)).sum().cpu()

        return add

    handles = [
        module(bundle.model, anatomy.layer_path(layer)).register_forward_hook(adder(layer), with_kwargs=True)
        for layer in range(anatomy.layers)
    ]
    try:
        for ids in batches(bundle, calibration):
            decode(bundle, ids)
    finally:
        for handle in handles:
            handle.remove()
    return totals / calibration.tokens


@torch.inference_mode()
def leave_one_out(bundle: ModelBundle, calibration: TokenSet) -> Tensor:
    """Return the float64 scores [layers]: nats per token without the layer minus those with all."""
    check_calibration(bundle, calibration)
    whole = _nats_per_token(bundle, calibration)
    found = []
    for layer in range(bundle.anatomy.layers):
        with skipping(bundle, [layer]):
            found.append(_nats_per_token(bundle, calibration) - whole)
    return torch.tensor(found, dtype=torch.float64)


def _nats_per_token(bundle: ModelBundle, calibration: TokenSet) -> float:
    total = sum(
        float(window_losses(bundle, decode(bundle, ids), ids).double().sum()) for ids in batches(bundle, calibration)
    )
    windows, tokens = calibration.ids.shape
    return total / (windows * (tokens - 1))
