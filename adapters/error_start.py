r"""Where a recovery adapter begins: with the best rank-r part of what quantization changed.

`error` takes the weights' error E = W - W_quantized (LoftQ, Li et al. 2023, arXiv 2310.08659, with one iteration; the
codes stay as they are):

    min |E - s B A|^2             E = U diag(sigma) V^T         s B A = U_r diag(sigma_r) V_r^T

`outputs` takes the error of what the linears give out on some of the training text, X their inputs (QERA, Zhang et al.
2024, arXiv 2410.06040, its exact solution):

    min |(E - s B A) X|^2         E H^(1/2) = U diag(sigma) V^T     s B A = U_r diag(sigma_r) V_r^T H^(-1/2)

with H = X X^T / mean of its diagonal + damping. It costs a pass over the text for every layer, one layer's H in memory,
and an eigendecomposition for each width. Weighting by the diagonal of H alone is no better than `error` where the
codes were chosen by H already (`docs/experiments.md`). `fisher` is in `divergence_start`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.adapters.attach import NAME, adapter_tensors
from dwindle.adapters.linear_moments import input_moments

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["DAMPING", "Root", "dense_weight", "largest_errors", "largest_output_errors", "low_rank", "some_windows"]

_TOKENS = 16_384
"""Tokens of the training text that moments are taken from."""
DAMPING = 0.1
"""Share of the mean of a moment's diagonal that is added to its diagonal."""


def largest_errors(
    bundle: ModelBundle, teacher: ModelBundle, adapted: ModelBundle, names: list[str]
) -> dict[str, Tensor]:
    """Return A and B whose product is the best rank-r part of what quantization changed in each linear."""
    tensors = adapter_tensors(adapted.model)
    for name in names:
        _put(tensors, name, *low_rank(adapted, name, _error(bundle, teacher, name)))
    return tensors


def largest_output_errors(
    bundle: ModelBundle, teacher: ModelBundle, adapted: ModelBundle, names: list[str], ids: Tensor
) -> dict[str, Tensor]:
    """Return A and B whose product repairs most of each linear's outputs on the windows `ids` [N, T]."""
    tensors, wanted, ids = adapter_tensors(adapted.model), set(names), some_windows(ids)
    for layer in range(bundle.anatomy.layers):
        for row in input_moments(bundle, set(bundle.anatomy.parts(layer).values()) & wanted, ids):
            inputs = Root(row.inputs)
            for name in row.names:
                weighed = _error(bundle, teacher, name) @ inputs.root
                _put(tensors, name, *low_rank(adapted, name, weighed, inputs=inputs))
    return tensors


class Root:
    """Symmetric square root of a moment [n, n] (diagonal's mean set to 1, damped), and the inverse of the root."""

    def __init__(self, moment: Tensor) -> None:
        self.mean = moment.diagonal().mean().clamp(min=1e-30)
        damped = moment / self.mean + DAMPING * torch.eye(len(moment), dtype=moment.dtype)
        values, vectors = torch.linalg.eigh(damped)
        self.root: Tensor = (vectors * values.sqrt()) @ vectors.T
        self.inverse: Tensor = (vectors / values.sqrt()) @ vectors.T


def low_rank(
    adapted: ModelBundle, name: str, weighed: Tensor, inputs: Root | None = None, outputs: Root | None = None
) -> tuple[Tensor, Tensor]:
    """Return A [r, I] and B [O, r] of the best rank-r part of an error [O, I] that was weighed by these roots."""
    layer: Any = adapted.model.get_submodule(name)
    rank, scale = layer.r[NAME], layer.scaling[NAME]
    left, sigma, right = torch.linalg.svd(weighed, full_matrices=False)
    size = sigma[:rank].sqrt()
    b, a = left[:, :rank] * size / scale, size[:, None] * right[:rank]
    a = a if inputs is None else a @ inputs.inverse
    b = b if outputs is None else outputs.inverse @ b
    return a.float().contiguous(), b.float().contiguous()


def some_windows(ids: Tensor) -> Tensor:
    """Return windows of `ids` [N, T] at equal distances, 16,384 tokens of them."""
    count = max(1, _TOKENS // ids.shape[1])
    return ids[:: max(1, len(ids) // count)][:count]


def _error(bundle: ModelBundle, teacher: ModelBundle, name: str) -> Tensor:
    """Return W - W_quantized [O, I] in float64 on the CPU."""
    before, after = (dense_weight(of, name) for of in (teacher, bundle))
    return before - after


def dense_weight(bundle: ModelBundle, name: str) -> Tensor:
    """Return the weight of a linear [O, I], codes unpacked, in float64 on the CPU."""
    weight: Any = bundle.model.get_submodule(name).weight
    dense: Tensor = weight.detach().double().cpu()
    return dense


def _put(tensors: dict[str, Tensor], name: str, a: Tensor, b: Tensor) -> None:
    tensors[f"base_model.model.{name}.lora_A.weight"] = a
    tensors[f"base_model.model.{name}.lora_B.weight"] = b
