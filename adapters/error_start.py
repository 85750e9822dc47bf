r"""Where a recovery adapter begins: with the best rank-r part of what quantization changed.

`error` takes the weights' error E = W - W_quantized (LoftQ, Li et al. 2023, arXiv 2310.08659, with one iteration; the
codes stay as they are):

    min |E - s B A|^2             E = U diag(sigma) V^T         s B A = U_r diag(sigma_r) V_r^T

`outputs` takes the error of what the linears give out on some of the training text, X their inputs (QERA, Zhang et al.
2024, arXiv 2410.06040, its exact solution):

    min |(E - s B A) X|^2         E H^(1/2) = U diag(sigma) V^T     s B A = U_r diag(sigma_r) V_r^T H^(-1/2)

with H = X X^T / mean of its diagonal + damping. It costs a pass over the text for every layer, one layer's H in memory,
and an eigendecomposition for each width. Weighting by the diagonal of H alone is no better than `error` where the
codes were chosen by H already (`docs/experiments.md`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.adapters.attach import NAME, adapter_tensors
from dwindle.evaluation_mode import evaluating

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["largest_errors", "largest_output_errors"]

_TOKENS = 16_384
"""Tokens of the training text that the inputs are taken from."""
_BATCH_TOKENS = 2_048
_DAMPING = 0.1


def largest_errors(
    bundle: ModelBundle, teacher: ModelBundle, adapted: ModelBundle, names: list[str]
) -> dict[str, Tensor]:
    """Return A and B whose product is the best rank-r part of what quantization changed in each linear."""
    tensors = adapter_tensors(adapted.model)
    for name in names:
        rank, scale = _shape(adapted, name)
        left, sigma, right = torch.linalg.svd(_error(bundle, teacher, name), full_matrices=False)
        root = sigma[:rank].sqrt()
        _put(tensors, name, root[:, None] * right[:rank], left[:, :rank] * root / scale)
    return tensors


def largest_output_errors(
    bundle: ModelBundle, teacher: ModelBundle, adapted: ModelBundle, names: list[str], ids: Tensor
) -> dict[str, Tensor]:
    """Return A and B whose product repairs most of each linear's outputs on the windows `ids` [N, T]."""
    tensors, wanted = adapter_tensors(adapted.model), set(names)
    count = max(1, _TOKENS // ids.shape[1])
    ids = ids[:: max(1, len(ids) // count)][:count]
    for layer in range(bundle.anatomy.layers):
        for together, moment in _second_moments(bundle, set(bundle.anatomy.parts(layer).values()) & wanted, ids):
            moment = moment / moment.diagonal().mean().clamp(min=1e-30)
            values, vectors = torch.linalg.eigh(moment + _DAMPING * torch.eye(len(moment), dtype=moment.dtype))
            root = (vectors * values.sqrt()) @ vectors.T
            inverse = (vectors / values.sqrt()) @ vectors.T
            for name in together:
                rank, scale = _shape(adapted, name)
                left, sigma, right = torch.linalg.svd(_error(bundle, teacher, name) @ root, full_matrices=False)
                size = sigma[:rank].sqrt()
                _put(tensors, name, size[:, None] * right[:rank] @ inverse, left[:, :rank] * size / scale)
    return tensors


class _Seen(Exception):
    """Every linear of the layer was called."""


def _second_moments(bundle: ModelBundle, names: set[str], ids: Tensor) -> list[tuple[list[str], Tensor]]:
    """Return X X^T of the linears' inputs in float64, once for those that read the same one, with their names."""
    found: list[tuple[list[str], Tensor]] = []
    seen: list[tuple[Tensor, int]] = []
    left = set(names)

    def look(name: str, read: Tensor) -> None:
        place = next((place for tensor, place in seen if tensor is read), None)
        if place is None:
            place = len({at for _, at in seen})
            rows = read.detach().flatten(0, -2).float()
            product = (rows.T @ rows).double().cpu()
            if place == len(found):
                found.append(([], torch.zeros_like(product)))
            found[place][1].add_(product)
            seen.append((read, place))
        if name not in found[place][0]:
            found[place][0].append(name)
        left.discard(name)
        if not left:
            raise _Seen

    hooks = [bundle.model.get_submodule(name).register_forward_hook(
                 lambda module, given, out, name=name: look(name, given[0])) for name in sorted(names)]  # fmt: skip
    model: Any = bundle.model
    try:
        with torch.no_grad(), evaluating(model):
            for part in torch.split(ids, max(1, _BATCH_TOKENS // ids.shape[1])) if names else ():
                left = set(names)
                seen.clear()
                part = part.to(model.device, torch.long)
                try:
                    model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False)
                except _Seen:
                    continue
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _shape(adapted: ModelBundle, name: str) -> tuple[int, float]:
    layer: Any = adapted.model.get_submodule(name)
    return layer.r[NAME], layer.scaling[NAME]


def _error(bundle: ModelBundle, teacher: ModelBundle, name: str) -> Tensor:
    """Return W - W_quantized [O, I] in float64 on the CPU."""
    before, after = (_dense(of, name) for of in (teacher, bundle))
    return before - after


def _dense(bundle: ModelBundle, name: str) -> Tensor:
    weight: Any = bundle.model.get_submodule(name).weight
    dense: Tensor = weight.detach().double().cpu()
    return dense


def _put(tensors: dict[str, Tensor], name: str, a: Tensor, b: Tensor) -> None:
    tensors[f"base_model.model.{name}.lora_A.weight"] = a.float().contiguous()
    tensors[f"base_model.model.{name}.lora_B.weight"] = b.float().contiguous()
