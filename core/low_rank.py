r"""The low-rank change of a linear, and a model computed with such changes without touching it.

    LoRA, rsLoRA    y = W x + b + s B A x                       s = alpha / r, rsLoRA alpha / sqrt(r)
    DoRA            y = g * (W x + s B A x) + b                 g = m / |W + s B A|, a number for each row

DoRA (Liu 2024, arXiv 2402.09353) gives the rows of W + s B A the trained lengths m. The lengths that they have are
known once A and B are, so what a runtime needs is one scale g a row. `factors` folds s and g into B:

    y = g * (W x) + b + B' A x                                  B' = g s B, g = 1 without DoRA

which a test holds to PEFT's own layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["Factors", "LowRank", "changed", "factors"]


@dataclass(frozen=True)
class LowRank:
    """The change of one linear O x I: W + scale * b @ a, for DoRA with its rows then set to the length `magnitude`."""

    a: Tensor
    """[r, I]"""
    b: Tensor
    """[O, r]"""
    scale: float
    magnitude: Tensor | None = None
    """[O], DoRA only."""


@dataclass(frozen=True)
class Factors:
    """What computes a change at run time: y = row_scale * (W x) + bias + b a x."""

    a: Tensor
    """float32 [r, I]"""
    b: Tensor
    """float32 [O, r]"""
    row_scale: Tensor | None
    """float32 [O]; None where the rows keep their length."""


def factors(change: LowRank, weight: Tensor | None = None) -> Factors:
    """Return the factors of a change; `weight` [O, I] is the base's, which DoRA alone needs.

    >>> import torch
    >>> change = LowRank(torch.tensor([[3.0, 4.0]]), torch.ones(1, 1), 1.0, magnitude=torch.tensor([10.0]))
    >>> made = factors(change, torch.zeros(1, 2))
    >>> made.b, made.row_scale
    (tensor([[2.]]), tensor([2.]))
    """
    a, b = change.a.double(), change.scale * change.b.double()
    if change.magnitude is None:
        return Factors(a.float(), b.float(), None)
    if weight is None:
        raise ValueError("the rows' lengths of a DoRA change are known with the base's weight only")
    lengths = (weight.detach().double().cpu() + b @ a).norm(dim=1)
    scale = change.magnitude.double().flatten() / lengths
    return Factors(a.float(), (scale[:, None] * b).float(), scale.float())


@contextmanager
def changed(bundle: ModelBundle, changes: Mapping[str, LowRank]) -> Iterator[None]:
    """Let the bundle's linears compute with these changes while the context lasts; its weights stay as they are."""
    handles = []
    try:
        for name, change in changes.items():
            linear: Any = bundle.model.get_submodule(name)
            weight = linear.weight if change.magnitude is not None else None
            handles.append(linear.register_forward_hook(_hook(factors(change, weight), linear)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(made: Factors, linear: Any) -> Any:
    device, bias = next(iter([*linear.parameters(), *linear.buffers()])).device, linear.bias
    a, b = made.a.to(device), made.b.to(device)
    scale = None if made.row_scale is None else made.row_scale.to(device)

    def added(_module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        low = (inputs[0] @ a.T) @ b.T
        if scale is None:
            return y + low
        plain = y if bias is None else y - bias
        scaled = scale * plain + low
        return scaled if bias is None else scaled + bias

    return added
