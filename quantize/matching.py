"""What is minimised end to end: the forward KL from the unquantized model, on the text that calibrates.

The full value over the whole vocabulary, at every position. Nothing is taken from labels: the unquantized model is
what the quantized one must equal, and it says more per token than one label does, so a few hundred windows suffice.
Where only the KL to a set of candidate tokens is trained, the rest of the distribution drifts; the full value has no
rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.divergence import forward_kl
from dwindle.errors import DataError
from dwindle.quantize.options import QuantizeOptions
from dwindle.token_set import TokenSet
from dwindle.train import TrainOptions

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["Matching", "pieces_of", "training_of", "training_windows"]

_PIECE_BYTES = 1 << 29
"""Logits of one forward pass, about: the batch is cut into pieces beyond it."""


class Matching:
    """The objective of the training loop: mean KL(unquantized || quantized) over all B * T positions."""

    def __init__(self, teacher: ModelBundle) -> None:
        self._teacher = teacher.model

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss in nats per token; every position of `batch` [B, T] is predicted from."""
        return self.divergence(model, batch), {}

    def divergence(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the mean KL over the positions of `ids` [B, T], differentiable in the weights of `model`."""
        with torch.no_grad():
            reference = _logits(self._teacher, ids)
        return forward_kl(_logits(model, ids), reference)


def _logits(model: Any, ids: Tensor) -> Tensor:
    # The mask of ones: nothing is padded, so attention may take its causal fast path (see core.measure).
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.flatten(0, 1)


def training_windows(tokens: TokenSet, step: str) -> TokenSet:
    """Return the calibration (or training) windows with the role the loop asks for; evaluation text is refused."""
    if tokens.role == "evaluation":
        raise DataError(
            f"{tokens.source}: {step} trains on this text, and its role is 'evaluation'. Build a calibration set; "
            "what is measured on must not be trained on."
        )
    return replace(tokens, role="train")


def pieces_of(batch_size: int, window_tokens: int, vocabulary: int) -> int:
    """Return into how many pieces a batch is cut so that the logits of one stay near half a gigabyte.

    >>> pieces_of(8, 512, 4096), pieces_of(8, 2048, 152_000)
    (1, 8)
    """
    needed = batch_size * window_tokens * vocabulary * 4 / _PIECE_BYTES
    return next(n for n in range(1, batch_size + 1) if batch_size % n == 0 and (n >= needed or n == batch_size))


def training_of(
    options: QuantizeOptions, windows: TokenSet, vocabulary: int, rate: float, **length: Any
) -> TrainOptions:
    """Return how codes or tables are trained; `rate` where the options name none, `length` in steps or tokens."""
    return TrainOptions(
        batch_size=options.batch_size,
        gradient_accumulation=pieces_of(options.batch_size, windows.ids.shape[1], vocabulary),
        learning_rate=rate if options.learning_rate is None else options.learning_rate,
        schedule="cosine",
        warmup_share=0.05,
        weight_decay=0.0,
        seed=options.seed,
        **length,
    )
