"""What follows a decoder, and hidden states of which it makes logits where they are read.

For the families of the table that is a linear and at most a soft cap. Others scale their logits (Cohere, Granite),
project or normalize before them, and no config key says so for all of them: there the model's own forward pass is run
from the decoder's output on (`ModelTail`), a few positions at a time. Whether it can be cut there is tried out once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dwindle.errors import UnsupportedModel
from dwindle.families import family_of

__all__ = ["Head", "HeadStates", "ModelTail", "decoder_of", "head_of", "inside", "tail_of"]

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

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [N, V] for [N, D]."""
        found = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return found if self.cap is None else torch.tanh(found / self.cap) * self.cap


@dataclass(frozen=True, eq=False)
class ModelTail:
    """Logits as the model itself makes them from its decoder's output; without gradients."""

    model: Any
    decoder: nn.Module
    output: type[Any]
    """What the decoder returns; all but its `last_hidden_state` may be left out."""
    kept: Tensor | None = None
    """Of a part of the vocabulary: its ids."""

    def rows(self, kept: Tensor) -> ModelTail:
        """Return the tail of a part of the vocabulary."""
        return replace(self, kept=kept)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return [N, V] for [N, D]."""

        def given(*_: Any, **__: Any) -> Any:
            return self.output(last_hidden_state=hidden[None])

        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        before = self.decoder.__dict__.get("forward")
        self.decoder.forward = given
        try:
            found: Tensor = self.model.forward(input_ids=ids, use_cache=False).logits[0]
        finally:
            del self.decoder.forward
            if before is not None:
                self.decoder.forward = before
        return found if self.kept is None else found[:, self.kept]


def head_of(model: Any) -> Head:
    """Return the head of a causal language model of any family of the table; a packed one is unpacked here."""
    module, config = model.get_output_embeddings(), model.config
    cap = config.final_logit_softcapping if family_of(config.model_type).logit_softcap else None
    return Head(module.weight, getattr(module, "bias", None), cap)


@dataclass(frozen=True)
class HeadStates:
    """A model's word on N positions, before its head: hidden [N, D], on the device of the head."""

    hidden: Tensor
    head: Head | ModelTail

    def at(self, index: Tensor) -> HeadStates:
        """Return the states of some positions."""
        return HeadStates(self.hidden[index.to(self.hidden.device)], self.head)

    def logits(self) -> Tensor:
        """Return all logits [N, V] at once."""
        return self.head.logits(self.hidden)


def decoder_of(model: Any) -> nn.Module:
    """Return the module that makes the hidden states of which a causal language model makes its logits."""
    found: nn.Module = model.get_decoder()
    base: nn.Module = model.base_model
    return base if found is model else found  # GPT-2 and its kin have the decoder for a base


@torch.no_grad()
def tail_of(model: Any, device: torch.device) -> ModelTail:
    """Return what follows the decoder of a causal language model of any family.

    Raises UnsupportedModel for a model whose logits do not follow from its decoder's output, that reads what comes
    after a position, or that gives logits which are no numbers: a few made-up tokens are read to find out.
    """
    named = type(model).__name__
    ids = torch.arange(6, device=device)[None] % model.config.vocab_size
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % model.config.vocab_size], 1)
    try:
        whole, changed = (model(input_ids=one, use_cache=False).logits[0] for one in (ids, other))
        found = decoder_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        tail = ModelTail(model, decoder_of(model), type(found))
        cut = tail.logits(found.last_hidden_state[0])
    except Exception as error:  # classes of models raise whatever an unusual call makes them run into
        raise UnsupportedModel(f"{named} cannot be asked for hidden states as a causal decoder can "
                               f"({type(error).__name__}: {error}).") from error  # fmt: skip
    spread = whole.abs().max().clamp_min(1e-9)
    if not torch.isfinite(whole).all():
        raise UnsupportedModel(f"{named} gives logits that are no finite numbers; its weights are damaged.")
    if (whole[:-1] - changed[:-1]).abs().max() > 1e-3 * spread:
        raise UnsupportedModel(f"{named} reads the tokens that it should predict: it is no causal language model.")
    if whole.shape != cut.shape or (whole - cut).abs().max() > 1e-3 * spread:
        raise UnsupportedModel(f"{named}: the logits do not follow from the decoder's output alone; it cannot teach.")
    return tail


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
