"""Rotary position embeddings: what a layer uses, and the exact frequencies the stock model computes.

A pair of dimensions (j, j + R/2) of a head is turned by the angle p * f_j at position p, with f_j = theta^(-2j/R)
(Su et al. 2021, RoFormer, arXiv:2104.09864). Models trained for one context and stretched to another scale f:

    linear    f / factor                                        (Chen et al. 2023, arXiv:2306.15595)
    dynamic   theta grows with the text beyond the trained context; within it f is unchanged
    yarn      long waves are interpolated, short ones kept, a ramp between; cos and sin scaled (arXiv:2309.00071)
    llama3    the same idea with wavelength thresholds (Llama 3.1 model card)
    longrope  one learned factor per pair, one set for short and one for long texts (arXiv:2402.13753)

Why not transformers' own table of functions: its signatures differ between 4.57 and 5.x, and they take a whole model
config. The arithmetic is kept in float32 and in the same order as there, so that angles at far positions agree
to the last bit; tests hold them to the buffers of the stock models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dwindle.errors import UnsupportedModel

__all__ = ["ROPE_KINDS", "Rope"]

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one layer."""

    theta: float
    """Base of the geometric series of frequencies."""
    rotary_dim: int
    """Leading dimensions of a head that are turned (R, even); the rest pass through."""
    context: int
    """Longest text the checkpoint names (max_position_embeddings), in tokens."""
    kind: str = "default"
    """One of ROPE_KINDS."""
    scaling: Mapping[str, Any] | None = None
    """The scaling's own parameters, under the names of the checkpoint's config."""

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise UnsupportedModel(f"rope scaling {self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}.")

    def _number(self, key: str) -> float:
        value = (self.scaling or {}).get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UnsupportedModel(f"rope scaling {self.kind!r} needs a number for {key!r}, found {value!r}.")
        return float(value)

    def _optional(self, key: str) -> float | None:
        return None if (self.scaling or {}).get(key) is None else self._number(key)

    @property
    def longest_exact(self) -> int:
        """Return the number of positions for which one fixed set of frequencies is the stock model's behaviour.

        Dynamic and longrope models change all frequencies when the text outgrows this length.
        """
        if self.kind == "longrope":
            return int(self._optional("original_max_position_embeddings") or self.context)
        return self.context

    def frequencies(self) -> tuple[torch.Tensor, float]:
        """Return (f [R/2] float32, factor on cos and sin), for texts of up to `longest_exact` tokens."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).to(torch.float32) / self.rotary_dim
        waves = self.theta**exponents
        if self.kind == "linear":
            return (1.0 / waves) / self._number("factor"), 1.0
        if self.kind == "llama3":
            return self._llama3(1.0 / waves), 1.0
        if self.kind == "yarn":
            return self._yarn(waves)
        if self.kind == "longrope":
            return self._longrope(waves)
        return 1.0 / waves, 1.0

    def tables(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin), each [length, R/2] float32, for positions 0 to length - 1."""
        frequencies, factor = self.frequencies()
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies[None, :]
        return angles.cos() * factor, angles.sin() * factor

    def _llama3(self, plain: torch.Tensor) -> torch.Tensor:
        factor, low, high = self._number("factor"), self._number("low_freq_factor"), self._number("high_freq_factor")
        trained = self._number("original_max_position_embeddings")
        wavelength = 2 * math.pi / plain
        scaled = torch.where(wavelength > trained / low, plain / factor, plain)
        smooth = (trained / wavelength - low) / (high - low)
        blended = (1 - smooth) * scaled / factor + smooth * scaled
        between = ~(wavelength < trained / high) & ~(wavelength > trained / low)
        return torch.where(between, blended, scaled)

    def _yarn(self, waves: torch.Tensor) -> tuple[torch.Tensor, float]:
        factor = self._number("factor")
        trained = self._optional("original_max_position_embeddings") or self.context
        fast, slow = self._optional("beta_fast") or 32.0, self._optional("beta_slow") or 1.0

        def pair_with(turns: float) -> float:
            """Return the (fractional) pair index that makes `turns` full turns over the trained context."""
            return self.rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_with(fast), pair_with(slow)
        if (self.scaling or {}).get("truncate", True):
            low, high = float(math.floor(low)), float(math.ceil(high))
        low, high = max(low, 0.0), min(high, self.rotary_dim - 1.0)
        high = high + 0.001 if low == high else high
        ramp = torch.clamp((torch.arange(self.rotary_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
        kept = 1 - ramp
        return (1.0 / (factor * waves)) * (1 - kept) + (1.0 / waves) * kept, self._yarn_factor(factor)

    def _yarn_factor(self, factor: float) -> float:
        def temperature(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        given = self._optional("attention_factor")
        if given is not None:
            return given
        scale, all_dims = self._optional("mscale"), self._optional("mscale_all_dim")
        return temperature(scale) / temperature(all_dims) if scale and all_dims else temperature(1.0)

    def _longrope(self, waves: torch.Tensor) -> tuple[torch.Tensor, float]:
        short = (self.scaling or {}).get("short_factor")
        if not isinstance(short, list | tuple) or len(short) != self.rotary_dim // 2:
            raise UnsupportedModel(
                f"rope scaling 'longrope' needs {self.rotary_dim // 2} numbers in 'short_factor', found {short!r}."
            )
        trained, given = self.longest_exact, self._optional("attention_factor")
        stretch = self._optional("factor") or self.context / trained
        factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(trained))
        return 1.0 / (torch.tensor(short, dtype=torch.float32) * waves), factor if given is None else given
