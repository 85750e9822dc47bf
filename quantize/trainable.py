"""Codes that gradients can move: integers and palettes whose rounding, scales and entries are parameters.

Rounding is not differentiable, so the forward pass computes the stored form exactly (fp16 tables, whole codes) and
the backward pass takes rounding for the identity (straight-through, Bengio et al. 2013, arXiv:1308.3432). What is
learned is not the weight but where it rounds to:

    integers   code = clamp(round(w / s + z + v), 0, 2^b - 1)     s = fp16(s0 f)     z = round(z0 + d)
    palettes   code = nearest palette entry to  w / r + u v       p = fp16(p0 + u' e)     r = fp16(r0 f)

An offset v per weight, in grid steps and bounded, lets it go to the code above or below the nearest (SignRound, Cheng
et al. 2023, arXiv:2309.05516, for integers; here for palettes as well, u being the distance between the two entries
that a weight lies between). The factor f of a scale gets the gradient of learned step sizes (LSQ, Esser et al. 2019,
arXiv:1902.08153): q - w/s inside the grid, q beyond its ends. A palette entry gets the sum of the gradients of its
weights; u' is the mean distance of the entries of its palette, so that one learning rate serves all layers.

Everything starts at the codes given, also where they are not the nearest (GPTQ, LNQ). Such codes are good together, and
a weight that lay at the border of its code's cell would leave it with the first step, thousands at once: from 0.33 the
KL of GPTQ's 2-bit codes rose to 1.3 in 20 steps. So a weight is moved into the cell of its code and half-way to the
code's value, and that is the w that is rounded: every change takes steps that agree.

`weight()` and `finish().dequantize()` are
equal bit for bit, so the loss that was minimised is the loss of what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dwindle.quantize.fake_quantize import nearest_entries
from dwindle.quantize.integers import LEAST_SCALE, storable
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

__all__ = ["TrainableIntegers", "TrainablePalettes", "trainable"]

_KEPT = 0.5
"""Share of a weight's distance from the value of its start code, within the code's cell, that is kept."""
_LARGEST_FP16 = 65504.0


def trainable(dense: Tensor, start: QuantizedWeight) -> TrainableIntegers | TrainablePalettes:
    """Return the trainable form of a float weight [O, I] whose codes are `start`, on the device of `dense`."""
    return TrainableIntegers(dense, start) if isinstance(start, AffineWeight) else TrainablePalettes(dense, start)


class TrainableIntegers(nn.Module):
    """Integers with an offset per weight, and a scale factor and zero-point offset per group."""

    def __init__(self, dense: Tensor, start: AffineWeight) -> None:
        super().__init__()
        device = dense.device
        self.bits, self.group_size, self.outputs = start.bits, start.group_size, len(dense)
        self._balanced = start.balanced
        self._scale = storable(start.scales.to(device, torch.float32))[..., None]
        zeros = torch.full_like(start.scales, start.centre) if start.zero_points is None else start.zero_points
        self._zero = zeros.to(device, torch.float32)[..., None]
        self.learns_zero = start.zero_points is not None
        codes = start.codes.to(device, torch.float32).view(self.outputs, -1, self.group_size)
        grouped = dense.detach().to(torch.float32).view_as(codes)
        self._origin = self._scale * (_inside(grouped / self._scale + self._zero, codes, self._top) - self._zero)
        self.offset = nn.Parameter(torch.zeros_like(codes))
        self.scale_factor = nn.Parameter(torch.ones_like(self._scale))
        self.zero_offset = nn.Parameter(torch.zeros_like(self._scale), requires_grad=self.learns_zero)

    @property
    def _top(self) -> float:
        return float(2**self.bits - 1)

    def _codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return whole codes, zero points and fp16-exact scales, all float32 with straight-through gradients."""
        scale = self._scale * self.scale_factor
        scale = _straight_through(storable(scale), scale)
        zero = self._zero
        if self.learns_zero:
            zero = _rounded((zero + self.zero_offset).clamp(0, self._top))
        codes = _rounded(self._origin / scale + zero + self.offset).clamp(0, self._top)
        return codes, zero, scale

    def weight(self) -> Tensor:
        """Return float32 [O, I] as it would be stored, differentiable."""
        codes, zero, scale = self._codes()
        return ((codes - zero) * scale).view(self.outputs, -1)

    @torch.no_grad()
    def finish(self) -> AffineWeight:
        """Return the stored form; it dequantizes to `weight()` bit for bit."""
        codes, zero, scale = self._codes()
        zeros = zero[..., 0].to("cpu", torch.uint8) if self.learns_zero else None
        return AffineWeight(
            codes.view(self.outputs, -1).to("cpu", torch.uint8), scale[..., 0].to("cpu", torch.float16), zeros,
            self.bits, self.group_size, balanced=self._balanced,
        )  # fmt: skip

    def tables(self) -> list[nn.Parameter]:
        """Return the parameters of scales and zero points."""
        return [self.scale_factor, self.zero_offset] if self.learns_zero else [self.scale_factor]


class TrainablePalettes(nn.Module):
    """Palette indices with an offset per weight, movable palette entries and, if there, row scales."""

    def __init__(self, dense: Tensor, start: PalettizedWeight) -> None:
        super().__init__()
        device = dense.device
        self.bits, self.group_size, self.outputs = start.bits, start.group_size, len(dense)
        palettes, order = start.palettes.to(device, torch.float32).sort(dim=1, stable=True)
        rank = order.argsort(dim=1)
        indices = rank.gather(1, start.indices.to(device, torch.int64).view(len(palettes), -1))
        scales = start.row_scales
        self._row_scale = None if scales is None else scales.to(device, torch.float32)[:, None]
        values = dense.detach().to(torch.float32)
        if self._row_scale is not None:
            values = values / torch.where(self._row_scale == 0, torch.ones_like(self._row_scale), self._row_scale)
        self._palettes = palettes
        self._spacing = _spacing(palettes)
        self._origin, self._gap = _into_cells(values.reshape(len(palettes), -1), palettes, indices)
        self.offset = nn.Parameter(torch.zeros_like(self._origin))
        self.entry_offset = nn.Parameter(torch.zeros_like(palettes))
        self.scale_factor = nn.Parameter(torch.ones(self.outputs, 1, device=device), requires_grad=scales is not None)

    def _stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return indices [P, n], fp16-exact ascending palettes and row scales, both with straight-through gradients."""
        moved = self._palettes + self._spacing * self.entry_offset
        palettes = _straight_through(_as_stored(moved), moved).sort(dim=1, stable=True).values
        scales = None
        position = (self._origin + self._gap * self.offset).detach()
        if self._row_scale is not None:
            scales = self._row_scale * self.scale_factor
            scales = _straight_through(_as_stored(scales), scales)
            inverse = torch.where(scales == 0, torch.ones_like(scales), self._row_scale / scales).detach()
            position = (position.view(self.outputs, -1) * inverse).view_as(position)
        return nearest_entries(position, palettes.detach()), palettes, scales

    def weight(self) -> Tensor:
        """Return float32 [O, I] as it would be stored, differentiable."""
        indices, palettes, scales = self._stored()
        moving = self._gap * self.offset
        values = (palettes.gather(1, indices) + (moving - moving.detach())).view(self.outputs, -1)
        return values if scales is None else values * scales

    @torch.no_grad()
    def finish(self) -> PalettizedWeight:
        """Return the stored form; it dequantizes to `weight()` bit for bit."""
        indices, palettes, scales = self._stored()
        return PalettizedWeight(
            indices.view(self.outputs, -1).to("cpu", torch.uint8), palettes.to("cpu", torch.float16), self.bits,
            self.group_size, None if scales is None else scales[:, 0].to("cpu", torch.float16),
        )  # fmt: skip

    def tables(self) -> list[nn.Parameter]:
        """Return the parameters of palettes and row scales."""
        return [self.entry_offset] if self._row_scale is None else [self.entry_offset, self.scale_factor]


def _straight_through(stored: Tensor, value: Tensor) -> Tensor:
    """Return `stored`, with the gradient of `value`; exact, because value - value is 0."""
    return stored.detach() + (value - value.detach())


def _rounded(value: Tensor) -> Tensor:
    return _straight_through(value.round(), value)


def _as_stored(table: Tensor) -> Tensor:
    """Return the values as fp16 will hold them."""
    return table.detach().clamp(-_LARGEST_FP16, _LARGEST_FP16).half().to(torch.float32)


def _inside(position: Tensor, codes: Tensor, top: float) -> Tensor:
    """Return positions on the grid that round to `codes`; weights beyond the grid's ends stay where they are."""
    beyond = ((codes == 0) & (position < 0)) | ((codes == top) & (position > top))
    return torch.where(beyond, position, codes + _KEPT * (position - codes).clamp(-0.5, 0.5))


def _spacing(palettes: Tensor) -> Tensor:
    """Return [P, 1]: the mean distance of neighbouring entries, above zero."""
    spread = (palettes[:, -1:] - palettes[:, :1]) / (palettes.shape[1] - 1)
    return spread.clamp(min=LEAST_SCALE)


def _into_cells(values: Tensor, palettes: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return values moved into the cells of their indices, and for each the distance of the entries around it."""
    borders = (palettes[:, 1:] + palettes[:, :-1]) / 2
    infinite = torch.full_like(palettes[:, :1], torch.inf)
    edges = torch.cat([-infinite, borders, infinite], dim=1)
    entry = palettes.gather(1, indices)
    within = torch.minimum(torch.maximum(values, edges.gather(1, indices)), edges.gather(1, indices + 1))
    origin = entry + _KEPT * (within - entry)
    last = palettes.shape[1] - 1
    other = torch.where(origin >= entry, (indices + 1).clamp(max=last), (indices - 1).clamp(min=0))
    gap = (palettes.gather(1, other) - entry).abs()
    return origin, torch.where(gap > 0, gap, _spacing(palettes).expand_as(gap))
