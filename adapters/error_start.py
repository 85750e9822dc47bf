r"""Where a recovery adapter begins: with the best rank-r part of what quantization changed.

`error` takes the weights' error E = W - W_quantized (LoftQ, Li et al. 2023, arXiv 2310.08659, with one iteration; the
codes stay as they are):

    min |E - s B A|^2             E = U diag(sigma) V^T         s B A = U_r diag(sigma_r) V_r^T

`outputs` takes the error of what the linears give out on some of the training text, X their inputs (QERA, Zhang et al.
2024, arXiv 2410.06040, its exact solution):

    min |(E - s B A) X|^2         E H^(1/2) = U diag(sigma) V^T     s B A = U_r diag(sigma_r) V_r^T H^(-1/2)

`fisher` takes the divergence that the error of a linear causes, to second order, with the Fisher information of its
weights as a Kronecker product of input and gradient moments (K-FAC, Martens and Grosse 2015, arXiv 1503.05671):

    KL ~ 1/2 tr(F E H E^T)        F^(1/2) E H^(1/2) = U diag(sigma) V^T
                                  s B A = F^(-1/2) U_r diag(sigma_r) V_r^T H^(-1/2)

with F = G G^T / mean of its diagonal + damping, G the gradients of -log p(y) at the outputs of the unquantized model
for tokens y drawn from its own predictions, and H of its inputs. So it counts where an error goes, not its size alone:
as a start it closes half of what 2 bits opened on pycode-6m, `outputs` 29 % (`docs/experiments.md`).

`outputs` costs a pass over the text for every layer, `fisher` a pass and its way back; both keep one layer's moments in
memory and take an eigendecomposition for each. Weighting by the diagonal of H alone is no better than `error` where the
codes were chosen by H already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.adapters.attach import NAME, adapter_tensors
from dwindle.adapters.linear_moments import divergence_moments, input_moments

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["largest_divergences", "largest_errors", "largest_output_errors"]

_TOKENS = 16_384
"""Tokens of the training text that moments are taken from."""
_DAMPING = 0.1


def largest_errors(
    bundle: ModelBundle, teacher: ModelBundle, adapted: ModelBundle, names: list[str]
) -> dict[str, Tensor]:
    """Return A and B whose product is the best rank-r part of what quantization changed in each linear."""
    tensors = adapter_tensors(adapted.model)
    for name in names:
        _put(tensors, adapted, name, _error(bundle, teacher, name))
    return tensors


def largest_output_errors(
    bundle: ModelBundle, teacher: ModelBundle, adapted: ModelBundle, names: list[str], ids: Tensor
) -> dict[str, Tensor]:
    """Return A and B whose product repairs most of each linear's outputs on the windows `ids` [N, T]."""
    tensors, ids = adapter_tensors(adapted.model), _some(ids)
    for layer in _by_layer(bundle, names):
        for row in input_moments(bundle, layer, ids):
            inputs = _Root(row.inputs)
            for name in row.names:
                _put(tensors, adapted, name, _error(bundle, teacher, name), inputs=inputs)
    return tensors


def largest_divergences(
    bundle: ModelBundle, teacher: ModelBundle, adapted: ModelBundle, names: list[str], ids: Tensor
) -> dict[str, Tensor]:
    """Return A and B whose product takes away most of the divergence from the teacher on the windows `ids` [N, T]."""
    tensors, ids = adapter_tensors(adapted.model), _some(ids)
    for layer in _by_layer(bundle, names):
        for row in divergence_moments(teacher, layer, ids):
            inputs = _Root(row.inputs)
            for name in row.names:
                _put(tensors, adapted, name, _error(bundle, teacher, name),
                     inputs=inputs, outputs=_Root(row.gradients.pop(name)))  # fmt: skip
    return tensors


class _Root:
    """Symmetric square root of a moment [n, n] (diagonal's mean set to 1, damped), and the inverse of the root."""

    def __init__(self, moment: Tensor) -> None:
        moment = moment / moment.diagonal().mean().clamp(min=1e-30)
        values, vectors = torch.linalg.eigh(moment + _DAMPING * torch.eye(len(moment), dtype=moment.dtype))
        self.root = (vectors * values.sqrt()) @ vectors.T
        self.inverse = (vectors / values.sqrt()) @ vectors.T


def _by_layer(bundle: ModelBundle, names: list[str]) -> list[set[str]]:
    wanted = set(names)
    return [set(bundle.anatomy.parts(layer).values()) & wanted for layer in range(bundle.anatomy.layers)]


def _some(ids: Tensor) -> Tensor:
    count = max(1, _TOKENS // ids.shape[1])
    return ids[:: max(1, len(ids) // count)][:count]


def _error(bundle: ModelBundle, teacher: ModelBundle, name: str) -> Tensor:
    """Return W - W_quantized [O, I] in float64 on the CPU."""
    before, after = (_dense(of, name) for of in (teacher, bundle))
    return before - after


def _dense(bundle: ModelBundle, name: str) -> Tensor:
    weight: Any = bundle.model.get_submodule(name).weight
    dense: Tensor = weight.detach().double().cpu()
    return dense


def _put(
    tensors: dict[str, Tensor], adapted: ModelBundle, name: str, error: Tensor,
    inputs: _Root | None = None, outputs: _Root | None = None,
) -> None:  # fmt: skip
    """Store A and B of the best rank-r part of an error as it is weighed, each with half of its size."""
    layer: Any = adapted.model.get_submodule(name)
    rank, scale = layer.r[NAME], layer.scaling[NAME]
    error = error if inputs is None else error @ inputs.root
    error = error if outputs is None else outputs.root @ error
    left, sigma, right = torch.linalg.svd(error, full_matrices=False)
    size = sigma[:rank].sqrt()
    b, a = left[:, :rank] * size / scale, size[:, None] * right[:rank]
    a = a if inputs is None else a @ inputs.inverse
    b = b if outputs is None else outputs.inverse @ b
    tensors[f"base_model.model.{name}.lora_A.weight"] = a.float().contiguous()
    tensors[f"base_model.model.{name}.lora_B.weight"] = b.float().contiguous()
