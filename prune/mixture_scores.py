r"""How much each expert of a mixture matters, and each unit of every expert.

- `activation`: an expert by what it adds to the residual stream, the router's weight times the norm of its output,
  averaged over all tokens of the calibration text (a token that does not pass it counts as zero):

      score_e = 1/N sum over tokens t that pass e of  w_e(t) |down_e a_e(t)|

  which is REAP's criterion (Lasby et al. 2025, arXiv 2510.13999) times the share of tokens routed to the expert. A
  unit of an expert as an FFN unit (`scores`), over the tokens that pass the expert.
- `magnitude`: the L2 norm of all weights of the expert, its row of the router among them, or of the unit.
- `taylor` and `fisher`: masks on the experts' outputs and on their units, see `gradient_scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.prune.mixture import Mixture, mixtures_of
from dwindle.prune.parameters import read_parameter

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["MixtureSums", "mixture_magnitudes", "per_layer"]


class MixtureSums:
    """Listens to what the mixtures of a model are given, and gives the activation scores."""

    def __init__(self, bundle: ModelBundle) -> None:
        self._mixtures = mixtures_of(bundle)
        self._layers = bundle.anatomy.layers
        self._tokens = dict.fromkeys(self._mixtures, 0)
        self._experts = {i: torch.zeros(m.experts.count).double() for i, m in self._mixtures.items()}
        self._squares = {i: _unit_zeros(mixture) for i, mixture in self._mixtures.items()}
        self.inputs = {mixture.module: self._adder(layer, mixture) for layer, mixture in self._mixtures.items()}
        """By module: what to call with its input [B, T, D]."""

    def _adder(self, layer: int, mixture: Mixture) -> Callable[[Tensor], None]:
        def add(given: Tensor) -> None:
            windows, tokens, width = given.shape
            for found in mixture.routed(given.reshape(-1, width)):
                norms = (found.activations @ mixture.weight(found.expert, "down").T).norm(dim=-1)
                self._experts[layer][found.expert] += (found.weights * norms).double().sum().cpu()
                sums = torch.zeros(windows, mixture.experts.width, dtype=torch.float64, device=given.device)
                sums.index_add_(0, found.rows // tokens, found.activations.abs().double())
                self._squares[layer][found.expert] += (sums / tokens).square().sum(0).cpu()
            self._tokens[layer] += windows * tokens

        return add

    def scores(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return per layer the scores of experts [E] and of their units [E, F]; empty ones where there are none."""
        experts = {layer: found / max(1, self._tokens[layer]) for layer, found in self._experts.items()}
        units = {layer: found.sqrt() for layer, found in self._squares.items()}
        return per_layer(self._layers, experts), per_layer(self._layers, units)


def mixture_magnitudes(bundle: ModelBundle) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return per layer the L2 norms of experts [E] and units [E, F], and the squares [D] that channels hold in all.

    The gate of a shared expert counts for the channels too; the expert itself is the layer's FFN.
    """
    anatomy = bundle.anatomy
    experts, units, channels = {}, {}, torch.zeros(anatomy.width, dtype=torch.float64)
    for layer, mixture in mixtures_of(bundle).items():
        router = mixture.router.double().square().cpu()
        channels += router.sum(0)
        if mixture.experts.shared:
            channels += read_parameter(bundle, f"{anatomy.shared_gate(layer)}.weight").double().square()[0].cpu()
        squares = _unit_zeros(mixture)
        for expert in range(mixture.experts.count):
            for part in ("gate", "up", "down"):
                found = mixture.weight(expert, part).double().square().cpu()
                squares[expert] += found.sum(0 if part == "down" else 1)
                channels += found.sum(1 if part == "down" else 0)
        experts[layer], units[layer] = (squares.sum(1) + router.sum(1)).sqrt(), squares.sqrt()
    layers = anatomy.layers
    return per_layer(layers, experts), per_layer(layers, units), channels


def per_layer(layers: int, found: Mapping[int, Tensor]) -> list[Tensor]:
    """Return one tensor per layer, empty ones for those that have none; an empty list if no layer has one."""
    return [found.get(layer, torch.zeros(0).double()) for layer in range(layers)] if found else []


def _unit_zeros(mixture: Mixture) -> Tensor:
    return torch.zeros(mixture.experts.count, mixture.experts.width, dtype=torch.float64)
