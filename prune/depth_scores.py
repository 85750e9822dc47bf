r"""How much each whole layer matters.

- `block_influence` (Men et al. 2024, ShortGPT, arXiv 2403.03853, section 2.2): how far a layer turns the residual
  stream, from one forward pass:

      score_l = 1 - mean over tokens of cos(input of layer l, output of layer l)

- `leave_one_out`: the nats per token that the model loses without the layer, as in Minitron's perplexity criterion
  (arXiv 2407.14679, section 2.2); one pass per layer and one for the whole model. It may be negative: a layer that
  the model does better without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.prune.calibration_pass import batches, check_calibration, decode, skipping
from dwindle.prune.gradient_scores import window_losses
from dwindle.prune.scores import ActivationSums, AxisScores
from dwindle.prune.text_pass import run_pass
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["InfluenceSums", "activation_and_influence", "block_influence", "leave_one_out"]


def block_influence(bundle: ModelBundle, calibration: TokenSet) -> Tensor:
    """Return the float64 scores [layers].

    Raises DataError for a set of another role or tokenizer, or windows longer than the model's context.
    """
    check_calibration(bundle, calibration)
    sums = InfluenceSums(bundle.anatomy.layers)
    run_pass(bundle, calibration, {}, layers=sums.layers, purpose="scoring layers")
    return sums.scores()


def activation_and_influence(bundle: ModelBundle, calibration: TokenSet) -> AxisScores:
    """Return the activation scores and the block influence of one pass."""
    check_calibration(bundle, calibration)
    units, layers = ActivationSums(bundle), InfluenceSums(bundle.anatomy.layers)
    run_pass(bundle, calibration, units.inputs, layers=layers.layers, last=units.last, purpose="scoring")
    return replace(units.scores(), layers=layers.scores())


class InfluenceSums:
    """Listens to a pass of the calibration text and gives the influence of every layer."""

    def __init__(self, layers: int) -> None:
        self._totals = torch.zeros(layers, dtype=torch.float64)
        self._tokens = [0] * layers
        self.layers = {layer: self._adder(layer) for layer in range(layers)}
        """By layer: what to call with what it takes and gives."""

    def _adder(self, layer: int) -> Callable[[Tensor, Tensor], None]:
        def add(before: Tensor, after: Tensor) -> None:
            turns = 1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)
            self._totals[layer] += turns.sum().cpu()
            self._tokens[layer] += turns.numel()

        return add

    def scores(self) -> Tensor:
        """Return the mean over all tokens heard, float64 [layers]."""
        return self._totals / torch.tensor(self._tokens)


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
