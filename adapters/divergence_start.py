r"""Where a recovery adapter begins by default: with what takes away most of the divergence, layer after layer.

Behind layers that are coded, and adapted already, a linear reads x^ where the unquantized model has x, and gives out
Q x^ where that gives out W x. What is missing, r = W x - Q x^, is regressed on x^ at rank r, weighed by how much it
matters to the prediction:

    min over A, B   mean |F^(1/2) (r - s B A x^)|^2        r += h - h^ where the output is added to the residual stream

    F^(1/2) R X^^T H^(-1/2) = U diag(sigma) V^T            s B A = F^(-1/2) U_r diag(sigma_r) V_r^T H^(-1/2)

H = X^ X^^T and F = G G^T, G the gradients of -log p(y) at the linear's outputs in the unquantized model, y drawn from
its own predictions: to second order KL ~ 1/2 tr(F E H E^T) for an error E of the weights (K-FAC, Martens and Grosse
2015, arXiv 1503.05671). Both are damped; the damping of H draws the product towards W - Q. The solution is that of
weighted reduced-rank regression (Izenman 1975). Codes that were made to make good what was lost before them (`lnq`,
`gptq`) are not taken for wrong so, as they are where W - Q stands for R: on pycode-6m at rank 16 this start closes 31
instead of 20 % of the gap at 3.5 bits, 55 instead of 49 % at 2 bits (`docs/experiments.md`).

Cost: for every layer a forward pass of its block for each of four stages (q k v, o, gate up, down), and a pass and its
way back from this layer to the logits of the unquantized model; hidden states of 16,384 tokens of both models, the
moments of one layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.adapters.attach import NAME, adapter_tensors
from dwindle.adapters.error_start import DAMPING, Root, dense_weight, low_rank, some_windows
from dwindle.adapters.linear_moments import BATCH_TOKENS, gradient_moments, weights_frozen
from dwindle.decoder_blocks import STAGES, TO_RESIDUAL, InMemoryBlocks, entering_linear
from dwindle.evaluation_mode import evaluating

if TYPE_CHECKING:
    from dwindle.anatomy import Part
    from dwindle.bundle import ModelBundle

__all__ = ["largest_divergences"]


def largest_divergences(
    bundle: ModelBundle, teacher: ModelBundle, adapted: ModelBundle, names: list[str], ids: Tensor
) -> dict[str, Tensor]:
    """Return A and B whose products take away most of the divergence from the teacher on the windows `ids` [N, T].

    The adapter on `adapted` is given them on the way, linear after linear.
    """
    wanted, ids = set(names), some_windows(ids)
    parts = torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1]))
    with evaluating(teacher.model), evaluating(adapted.model), weights_frozen(teacher.model), torch.no_grad():
        _without_effect(adapted.model, names)
        ours, theirs = _Side(adapted, parts), _Side(teacher, parts)
        for layer in range(bundle.anatomy.layers):
            linears = {part: name for part, name in bundle.anatomy.parts(layer).items() if name in wanted}
            modules = {name: teacher.model.get_submodule(name) for name in linears.values()}
            slopes = gradient_moments(theirs.blocks, layer, modules, theirs.states) if modules else {}
            for stage in STAGES:
                chosen: list[tuple[Part, str]] = [(part, linears[part]) for part in stage if part in linears]
                if chosen:
                    lost = _Lost(ours, theirs, layer, *chosen[0])
                    for _, name in chosen:
                        weighed = Root(slopes.pop(name))
                        error = weighed.root @ lost.on_whitened(bundle, teacher, name)
                        _fill(adapted.model, name, *low_rank(adapted, name, error, lost.inputs, weighed))
            ours.go_on(layer)
            theirs.go_on(layer)
    return adapter_tensors(adapted.model)


class _Side:
    """One of the two models, with the hidden states that enter the layer at work."""

    def __init__(self, bundle: ModelBundle, parts: tuple[Tensor, ...]) -> None:
        self.blocks, self.model = InMemoryBlocks(bundle), bundle.model
        self.states = [self.blocks.embed(part) for part in parts]

    def entering(self, layer: int, name: str, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a linear reads [n, I], and the residual stream [n, D] beside it."""
        block = self.model.get_submodule(self.blocks.anatomy.layer_path(layer))
        return entering_linear(self.blocks, layer, block, self.model.get_submodule(name), states)

    def go_on(self, layer: int) -> None:
        """Pass the layer."""
        self.states = [self.blocks.forward(layer, states) for states in self.states]


class _Lost:
    """Sums over the tokens of what one stage's linears lack: X^ X^^T, X X^^T, and (h - h^) X^^T."""

    def __init__(self, ours: _Side, theirs: _Side, layer: int, part: Part, name: str) -> None:
        anatomy = ours.blocks.anatomy
        to_residual = part in TO_RESIDUAL and anatomy.traits.norm_layout == "pre"
        read = crossed = lacking = torch.zeros((), dtype=torch.float64)
        for found, wanted in zip(ours.states, theirs.states, strict=True):
            given, stream = ours.entering(layer, name, found)
            float_given, float_stream = theirs.entering(layer, name, wanted)
            read = read + (given.T @ given).double().cpu()
            crossed = crossed + (float_given.T @ given).double().cpu()
            if to_residual:
                lacking = lacking + ((float_stream - stream).T @ given).double().cpu()
        self.inputs = Root(read)
        self._read, self._crossed, self._lacking = (sums / self.inputs.mean for sums in (read, crossed, lacking))

    def on_whitened(self, bundle: ModelBundle, teacher: ModelBundle, name: str) -> Tensor:
        """Return R X^^T H^(-1/2) [O, I] of a linear."""
        before, after = (dense_weight(of, name) for of in (teacher, bundle))
        missing = before @ self._crossed - after @ self._read + self._lacking + DAMPING * (before - after)
        return missing @ self.inputs.inverse


def _without_effect(model: nn.Module, names: list[str]) -> None:
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.lora_B[NAME].weight.zero_()


def _fill(model: nn.Module, name: str, a: Tensor, b: Tensor) -> None:
    layer: Any = model.get_submodule(name)
    layer.lora_A[NAME].weight.copy_(a)
    layer.lora_B[NAME].weight.copy_(b)
