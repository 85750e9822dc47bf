r"""The experts of one layer, computed here: which tokens pass which expert, with what weight and what activations.

    w = softmax(router x)          over all experts, or those that are `kept`; the top k of them are chosen
    y = sum over the chosen e of  w_e down_e (act(gate_e x) * up_e x)       w divided by its sum where it is normalized

transformers 4.57 and 5 compute this in different modules, and inside of them nothing can be listened to alike. The
block that holds router and experts can: what it is given is enough to compute the rest again. That costs the experts
twice over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.anatomy import Experts, Part, module
from dwindle.experts import mixture_module
from dwindle.prune.parameters import read_parameter

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["Mixture", "Routed", "masked_mixtures", "mixtures_of"]


@dataclass(frozen=True)
class Routed:
    """The n tokens that one expert is chosen for."""

    expert: int
    rows: Tensor
    """[n]: which tokens."""
    weights: Tensor
    """[n]: what its output is multiplied by."""
    activations: Tensor
    """[n, F]: what its down projection reads."""


class Mixture:
    """Router and experts of one layer of a model in memory."""

    def __init__(self, bundle: ModelBundle, layer: int, experts: Experts) -> None:
        from transformers.activations import ACT2FN

        self._bundle, self._layer = bundle, layer
        self.experts = experts
        self.module = mixture_module(bundle.model, bundle.anatomy, layer)
        """Full name of the block that holds them."""
        self._activation: nn.Module = ACT2FN[bundle.anatomy.traits.activation]

    def weight(self, expert: int, part: Part) -> Tensor:
        """Return the weight of one linear of an expert."""
        return read_parameter(self._bundle, f"{self._bundle.anatomy.expert_parts(self._layer, expert)[part]}.weight")

    @property
    def router(self) -> Tensor:
        """Return the router's weight [E, D]."""
        return read_parameter(self._bundle, f"{self._bundle.anatomy.router(self._layer)}.weight")

    def routed(
        self, states: Tensor, kept: Sequence[int] | None = None, experts: Sequence[int] | None = None
    ) -> Iterator[Routed]:
        """Yield what each of `experts` gets of the tokens [N, D], where only `kept` ones can be chosen."""
        scores = states @ self.router.T
        if kept is not None:
            allowed = torch.zeros(self.experts.count, dtype=torch.bool, device=scores.device)
            allowed[list(kept)] = True
            scores = scores.masked_fill(~allowed, -torch.inf)
        weights, chosen = scores.float().softmax(-1).topk(self.experts.top_k, -1)
        if self.experts.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        for expert in range(self.experts.count) if experts is None else experts:
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            given = states[rows]
            gate = self._activation(given @ self.weight(expert, "gate").T)
            yield Routed(expert, rows, weights[rows, place].to(states), gate * (given @ self.weight(expert, "up").T))

    def masked_output(self, states: Tensor, experts: Tensor, units: Tensor) -> Tensor:
        """Return y [B, T, D] with masks on the experts [B, E] and on their units [B, E, F], one row per window."""
        windows, tokens, width = states.shape
        total = torch.zeros(windows * tokens, width, dtype=states.dtype, device=states.device)
        for found in self.routed(states.reshape(-1, width)):
            window = found.rows // tokens
            given = (found.activations * units[window, found.expert]) @ self.weight(found.expert, "down").T
            factor = found.weights * experts[window, found.expert]
            total = total.index_add(0, found.rows, given * factor[:, None])
        return total.view_as(states)


def mixtures_of(bundle: ModelBundle) -> dict[int, Mixture]:
    """Return the mixtures by layer; none of a dense model."""
    found = {layer: bundle.anatomy.experts_of(layer) for layer in range(bundle.anatomy.layers)}
    return {layer: Mixture(bundle, layer, experts) for layer, experts in found.items() if experts is not None}


@contextmanager
def masked_mixtures(
    bundle: ModelBundle, mixtures: Mapping[int, Mixture], masks: Mapping[int, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """While it is open, gradients reach masks of ones on the experts [B, E] and units [B, E, F] of each layer.

    What the model computes stays as it is, and so does the gradient of everything else.
    """

    def adder(mixture: Mixture, of_layer: tuple[Tensor, Tensor]) -> Callable[..., Any]:
        def add(_: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
            masked = mixture.masked_output(given[0].detach(), *of_layer)
            masked = masked - masked.detach()  # zeros, with a gradient
            return (output[0] + masked, *output[1:]) if isinstance(output, tuple) else output + masked

        return add

    hooks = [
        module(bundle.model, mixture.module).register_forward_hook(adder(mixture, masks[layer]))
        for layer, mixture in mixtures.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
