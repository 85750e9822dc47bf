"""Activation checkpointing: a layer keeps its inputs, and computes the rest again in the backward pass.

A decoder layer keeps some 15 to 20 numbers per token and channel for its backward pass, and T times as many attention
weights where the kernel keeps them; with this it keeps one. The price is a second forward pass of every layer, about a
third of a step (Chen et al. 2016, arXiv 1604.06174). Values and gradients are the same to the bit: torch's own
`checkpoint` restores the random state and autocast of the first pass.

transformers' `gradient_checkpointing_enable` does the same for its own models only, and changes their configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed"]


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within, `layers` keep their inputs only; they are as before afterwards."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the instance's; the class's shows again
