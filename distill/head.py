"""What follows a decoder, and hidden states of which it makes logits where they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dwindle.families import family_of

__all__ = ["Head", "HeadStates", "head_of", "inside"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Head:
    """Logits = cap(hidden weight^T + bias)."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None = None
    """[V]."""
    cap: float | None = None
    """Gemma 2: c * tanh(logits / c)."""

    def rows(self, kept: Tensor) -> Head:
        """Return the head of a part of the vocabulary."""
        return Head(self.weight[kept], None if self.bias is None else self.bias[kept], self.cap)


def head_of(model: Any) -> Head:
    """Return the head of a causal language model of any family of the table; a packed one is unpacked here."""
    module, config = model.get_output_embeddings(), model.config
    cap = config.final_logit_softcapping if family_of(config.model_type).logit_softcap else None
    return Head(module.weight, getattr(module, "bias", None), cap)


@dataclass(frozen=True)
class HeadStates:
    """A model's word on N positions, before its head: hidden [N, D], on the device of the head."""

    hidden: Tensor
    head: Head

    def at(self, index: Tensor) -> HeadStates:
        """Return the states of some positions."""
        return HeadStates(self.hidden[index.to(self.hidden.device)], self.head)

    def logits(self) -> Tensor:
        """Return all logits [N, V] at once."""
        found = torch.nn.functional.linear(self.hidden, self.head.weight, self.head.bias)
        return found if self.head.cap is None else torch.tanh(found / self.head.cap) * self.head.cap


def inside(model: nn.Module, function: Callable[[Tensor], _T], ids: Tensor) -> _T:
    """Return `function(ids)`, run as the forward pass of `model`, with the hooks of a sharded model around it."""
    before = model.__dict__.get("forward")
    model.forward = function
    try:
        found: _T = model(ids)
    finally:
        del model.forward
        if before is not None:
            model.forward = before
    return found
