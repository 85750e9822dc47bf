"""The KV cache of an exported decoder: where keys and values of earlier tokens live, and which of them a token may see.

Attention hands each layer's new keys and values to a cache and gets those of all tokens back. Where they are kept is
the exporter's choice, and the decoder's arithmetic does not change with it:

    ConcatenatedCache           the past comes in as tensors, the whole goes out (the default of `Decoder.forward`)
    coreml_decoder.StateCache   slices of two fixed buffers are written in place (Core ML states)

Shapes: B batch, T new tokens, P past, S = P + T, D head_dim, K KV heads, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

__all__ = ["MASKED", "Cache", "ConcatenatedCache", "causal_bias"]

MASKED = -1e4
"""Added to the score of a pair that must not attend. Finite, so that a row with nothing to see stays a number, and
within float16, so that it survives any runtime; exp(-1e4) is 0 in every float type."""


class Cache(Protocol):
    """Where keys and values of earlier tokens are kept."""

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a layer's new key and value [B, K, T, D]; return those of all tokens, [B, K, S, D]."""
        ...


class ConcatenatedCache:
    """A cache of tensors that grow: the new is appended to the past."""

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        self.keys, self.values = list(keys), list(values)

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append along the slots."""
        self.keys[layer] = torch.cat((self.keys[layer], key), dim=2)
        self.values[layer] = torch.cat((self.values[layer], value), dim=2)
        return self.keys[layer], self.values[layer]


def causal_bias(tokens: int, past: int = 0, padding: torch.Tensor | None = None) -> torch.Tensor:
    """Return the additive bias [B or 1, 1, T, P + T] of causal attention.

    `padding` [B, P + T] is 1 at real tokens and 0 at padding (transformers' attention_mask).

    >>> causal_bias(2, past=1)[0, 0].tolist()
    [[0.0, 0.0, -10000.0], [0.0, 0.0, 0.0]]
    """
    slots = torch.arange(past + tokens)
    hidden = (slots[None, :] > slots[past:, None])[None, None]
    if padding is not None:
        hidden = hidden | (padding == 0)[:, None, None, :]
    return torch.zeros(hidden.shape).masked_fill(hidden, MASKED)
