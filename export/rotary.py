"""Positions inside an exported graph: cos and sin of each token's angles, and the turn they make.

The frequencies are those of `dwindle.rope`. Shapes: B batch, T new tokens, D head_dim, R rotated dimensions, H heads.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from dwindle.rope import Rope

__all__ = ["Rotary", "rotated"]


class Rotary(nn.Module):
    """cos and sin [B, 1, T, R/2] of positions [B, T], read from tables or computed in the graph.

    A table is exact whatever the runtime's precision and costs context * R floats; computing costs nothing but is
    wrong at far positions where the runtime multiplies positions in float16.
    """

    def __init__(self, rope: Rope, context: int, computed: bool) -> None:
        super().__init__()
        self.computed = computed
        frequencies, self.factor = rope.frequencies()
        if computed:
            self.frequencies = nn.Buffer(frequencies, persistent=False)
        else:
            cos, sin = rope.tables(context)
            self.cos, self.sin = nn.Buffer(cos, persistent=False), nn.Buffer(sin, persistent=False)

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin)."""
        if self.computed:
            angles = (position_ids.to(self.frequencies.dtype).unsqueeze(-1) * self.frequencies).unsqueeze(1)
            cos, sin = angles.cos(), angles.sin()
            return (cos, sin) if self.factor == 1.0 else (cos * self.factor, sin * self.factor)
        cos, sin = (functional.embedding(position_ids, table).unsqueeze(1) for table in (self.cos, self.sin))
        return cos, sin


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first R dimensions of x [B, H, T, D], pairing dimension j with j + R/2."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat(turned if 2 * half == x.shape[-1] else (*turned, x[..., 2 * half :]), dim=-1)
