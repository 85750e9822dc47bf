"""Weights that are quantized in every forward pass and trained behind it.

*Integers* (LSQ, Esser et al., ICLR 2020, arXiv 1902.08153; the form of arXiv 2507.13575, section 5):

    W' = s * q      q = clamp(round(W / s_0 + z), qmin, qmax) - z      s = f * s_0      s_0 = c / qmax

z = 0 for symmetric integers; z = 1/2 for the balanced set, which at 2 bits has the levels {-1.5, -0.5, 0.5, 1.5} * s:
no level is spent on a second negative one, and the gradients of both signs are alike. s_0 is the scale that training
begins with, from a better quantizer or from the clip c of `clipping`. The paper learns one f per tensor; a scale per
group is stored whatever it is, so one f per scale is learned here and costs nothing.

*Palettes.* W' = palette[k], k the entry of the *first* palette that is nearest to W: the same idea for a free set of
values. With row scales the palettes are those of W / r.

*Gradients.* Rounding has derivative 1 (the straight-through estimator): W gets dL/dW' unchanged, but for weights that
an integer grid clips, which get none. Tables get theirs exactly, for they enter linearly:

    dL/df = s_0 sum(q dL/dW')        dL/d palette[k] = sum of dL/dW' over the weights that sit on entry k

*The borders between cells stay* where they were at the start, while the levels move. LSQ and others round anew with
the trained table, so every step of a table moves all borders, and thousands of codes flip with no gradient asking for
it. A code and its level are all that is stored; where the border lay is nobody's business. From LNQ's codes at 2 bits,
babyllama-105 and 64 steps of 8 windows, KL 0.351 goes to 0.187 with resting borders and to 0.369 with moving ones, at
the same rates.

*What is trained is what is stored.* Tables are rounded to fp16 in the forward pass (straight-through), and the
arithmetic is that of `weights`: one float32 multiplication per weight. `finish()` returns codes and tables whose
`dequantize()` has the bits of the last forward pass.

*Units.* Trained tensors are kept as multiples of a power of two near their root mean square: exact, and the steps of
AdamW, which are absolute, mean the same share of a weight in every layer of every model. The unit of the weights is
smaller by `WEIGHT_RATE`, so that they move more slowly than the tables.

torchao's fake quantizers know neither a learned scale per group, half-way levels nor palettes; where both can express
a grid, values and codes agree (tests/quantize/test_fake_quantize.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.quantize.integers import IntegerGrid, storable
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

__all__ = [
    "FakeInteger",
    "FakePalette",
    "fake_quantized",
    "nearest_entries",
    "power_of_two_unit",
    "sum_by_entry",
]

WEIGHT_RATE = 0.125
"""Rate of the weights as a share of the tables' (a power of two): a table has many gradients, a weight but one."""
_LARGEST_FP16 = 65504.0
_MARGIN = 0.02
"""How far inside its cell `inside_cells` puts a weight, as a share of the cell."""


def power_of_two_unit(values: Tensor) -> float:
    """Return the power of two nearest to the root mean square of `values` (1 for zeros).

    >>> power_of_two_unit(torch.tensor([3.0, -4.0, 5.0]))
    4.0
    """
    mean_square = float(values.detach().double().square().mean())
    return 2.0 ** round(math.log2(mean_square) / 2) if mean_square > 0 else 1.0


class _StraightThrough(torch.autograd.Function):
    """One tensor in the forward pass, the gradient to another."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        """Return the rounded values."""
        return rounded

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the exact ones."""
        return outer, None


def _stored_scales(scales: Tensor) -> Tensor:
    rounded: Tensor = _StraightThrough.apply(scales, storable(scales.detach()))  # type: ignore[no-untyped-call]
    return rounded


def _stored_values(values: Tensor) -> Tensor:
    """Return float32 values as fp16 holds them, finite."""
    half = values.detach().clamp(-_LARGEST_FP16, _LARGEST_FP16).half().to(torch.float32)
    rounded: Tensor = _StraightThrough.apply(values, half)  # type: ignore[no-untyped-call]
    return rounded


def sum_by_entry(values: Tensor, entries: Tensor, count: int) -> Tensor:
    """Return [G, count]: the sum of values [G, n] over the places where entries [G, n] is k. The same bits every time.

    >>> sum_by_entry(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 1, 0]]), 2).tolist()
    [[5.0, 2.0]]
    """
    groups = len(values)
    if values.device.type != "cpu":  # bincount adds in any order there
        columns = [values.masked_fill(entries != entry, 0.0).sum(1) for entry in range(count)]
        return torch.stack(columns, 1)
    flat = entries + torch.arange(groups, device=entries.device)[:, None] * count
    sums = torch.bincount(flat.reshape(-1), weights=values.reshape(-1).double(), minlength=groups * count)
    return sums.view(groups, count).to(values.dtype)


def nearest_entries(values: Tensor, palettes: Tensor) -> Tensor:
    """Return int64 [G, n]: the nearest of the ascending entries [G, k] for each of values [G, n]."""
    middles = (palettes[:, 1:] + palettes[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), values.contiguous())


class _Lookup(torch.autograd.Function):
    """Entries looked up, with the exact gradient."""

    @staticmethod
    def forward(ctx: Any, palettes: Tensor, entries: Tensor) -> Tensor:
        """Return palettes [G, k] at entries [G, n]."""
        ctx.save_for_backward(entries)
        ctx.count = palettes.shape[1]
        return palettes.gather(1, entries)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        """Return the gradient by the palettes."""
        (entries,) = ctx.saved_tensors
        return sum_by_entry(outer, entries, ctx.count), None


class _PassedOn(torch.autograd.Function):
    """Quantized weights, with the gradient handed to the tables they were made with and to the latent weights."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, latent: Tensor, inside: Tensor | None) -> Tensor:
        """Return `dense`; `inside`, if given, says which latent weights get a gradient."""
        ctx.save_for_backward(inside)
        return dense.view_as(dense)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradient twice."""
        (inside,) = ctx.saved_tensors
        return outer, outer if inside is None else outer * inside, None


class FakeInteger(nn.Module):
    """A weight [O, I] as integers on learned scales; `start` gives scales, zero points and the kind of grid.

    `latent` [O, I] are the weights that are trained (copied); None freezes the codes of `start`, and f alone is
    trained.
    """

    zero: Tensor
    first: Tensor
    codes: Tensor | None
    latent: nn.Parameter | None

    def __init__(self, latent: Tensor | None, start: AffineWeight, device: torch.device | None = None) -> None:
        super().__init__()
        device = device if latent is None else latent.device
        self.shape, self.group_size = start.shape, start.group_size
        self.grid = IntegerGrid(start.bits, start.symmetric, start.balanced)
        first = storable(start.scales.to(device, torch.float32).view(-1, 1))
        zero = torch.full_like(first, start.centre) if start.zero_points is None else start.zero_points.to(first)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("zero", zero.view(-1, 1), persistent=False)
        self.register_buffer("codes", start.codes.to(first.device) if latent is None else None)
        self.f = nn.Parameter(torch.ones_like(first))
        self.unit = 1.0 if latent is None else power_of_two_unit(latent) * WEIGHT_RATE
        self.latent = None if latent is None else nn.Parameter(latent.detach().to(torch.float32) / self.unit)

    def forward(self) -> Tensor:
        """Return the dequantized weight [O, I], differentiable in f and the latent weights."""
        codes, scale = self._stored()
        dense = (codes.view(-1, self.group_size).to(torch.float32) - self.zero) * scale
        if self.latent is not None:
            steps = self._groups().detach() / self.first + self.zero
            inside = (steps >= -0.5) & (steps <= self.grid.top + 0.5)
            dense = _PassedOn.apply(dense, self._groups(), inside)  # type: ignore[no-untyped-call]
        return dense.view(self.shape)

    @torch.no_grad()
    def finish(self) -> AffineWeight:
        """Return what is stored: its `dequantize()` has the bits of `forward()`."""
        codes, scale = self._stored()
        table = self.shape[0], -1
        return self.grid.weight(codes.view(self.shape).cpu(), scale.view(table).cpu(), self.zero.view(table).cpu())

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Return the codes, and the scales as fp16 holds them."""
        codes = self.grid.codes(self._groups().detach(), self.first, self.zero) if self.codes is None else self.codes
        return codes, _stored_scales(self.f * self.first)

    def _groups(self) -> Tensor:
        assert self.latent is not None
        return self.latent.view(-1, self.group_size) * self.unit


class FakePalette(nn.Module):
    """A weight [O, I] as indices into learned palettes; `latent` as in `FakeInteger`."""

    first: Tensor
    first_rows: Tensor | None
    indices: Tensor | None
    latent: nn.Parameter | None
    rows: nn.Parameter | None

    def __init__(self, latent: Tensor | None, start: PalettizedWeight, device: torch.device | None = None) -> None:
        super().__init__()
        device = device if latent is None else latent.device
        self.shape, self.bits, self.group_size = start.shape, start.bits, start.group_size
        palettes = start.palettes.to(device, torch.float32)
        palettes = palettes if latent is None else palettes.sort(1).values
        rows = None if start.row_scales is None else start.row_scales.to(device, torch.float32)
        self.register_buffer("first", palettes, persistent=False)
        self.register_buffer("first_rows", rows, persistent=False)
        self.register_buffer("indices", start.indices.to(device) if latent is None else None)
        self.unit, self.row_unit = power_of_two_unit(palettes), 1.0 if rows is None else power_of_two_unit(rows)
        self.palettes = nn.Parameter(palettes / self.unit)
        self.rows = None if rows is None else nn.Parameter(rows / self.row_unit)
        self.latent_unit = 1.0 if latent is None else power_of_two_unit(latent) * WEIGHT_RATE
        self.latent = None if latent is None else nn.Parameter(latent.detach().to(torch.float32) / self.latent_unit)

    def forward(self) -> Tensor:
        """Return the dequantized weight [O, I], differentiable in palettes, row scales and latent weights."""
        palettes, rows = self._tables()
        dense: Tensor = _Lookup.apply(palettes, self._entries())  # type: ignore[no-untyped-call]
        dense = dense.view(self.shape)
        dense = dense if rows is None else dense * rows[:, None]
        if self.latent is not None:
            dense = _PassedOn.apply(dense, self.latent * self.latent_unit, None)  # type: ignore[no-untyped-call]
        return dense

    @torch.no_grad()
    def finish(self) -> PalettizedWeight:
        """Return what is stored: its `dequantize()` has the bits of `forward()`."""
        palettes, rows = self._tables()
        indices = self._entries().to("cpu", torch.uint8).view(self.shape)
        row_scales = None if rows is None else rows.to("cpu", torch.float16)
        return PalettizedWeight(indices, palettes.to("cpu", torch.float16), self.bits, self.group_size, row_scales)

    def _tables(self) -> tuple[Tensor, Tensor | None]:
        """Return palettes and row scales as fp16 holds them."""
        rows = None if self.rows is None else _stored_values(self.rows * self.row_unit)
        return _stored_values(self.palettes * self.unit), rows

    def _entries(self) -> Tensor:
        """Return int64 [G, n]: the entry of every weight."""
        if self.latent is None:
            assert self.indices is not None
            return self.indices.view(len(self.palettes), -1).to(torch.int64)
        latent = self.latent.detach() * self.latent_unit
        if self.first_rows is not None:
            latent = latent / torch.where(self.first_rows == 0, 1.0, self.first_rows)[:, None]
        return nearest_entries(latent.view(len(self.palettes), -1), self.first)


def fake_quantized(
    latent: Tensor | None, start: QuantizedWeight, device: torch.device | None = None
) -> FakeInteger | FakePalette:
    """Return the trained form of `start`, on the device of `latent` or, without one, on `device`."""
    kind: Any = FakeInteger if isinstance(start, AffineWeight) else FakePalette
    found: FakeInteger | FakePalette = kind(latent, start, device)
    return found


def inside_cells(weight: Tensor, start: QuantizedWeight) -> Tensor:
    """Return float weights [O, I] whose nearest levels are the codes of `start`: each as near `weight` as it can be."""
    low, high = _palette_cells(start) if isinstance(start, PalettizedWeight) else _grid_cells(start)
    return torch.minimum(torch.maximum(weight.detach().float(), low.to(weight.device)), high.to(weight.device))


def _grid_cells(start: AffineWeight) -> tuple[Tensor, Tensor]:
    """Return the borders of every weight's cell, moved inwards by the margin; the outermost cells are open."""
    dense = start.dequantize()
    half = start.scales.float().repeat_interleave(start.group_size, 1) * (0.5 - _MARGIN)
    low = torch.where(start.codes == 0, -torch.inf, dense - half)
    high = torch.where(start.codes == 2**start.bits - 1, torch.inf, dense + half)
    return low, high


def _palette_cells(start: PalettizedWeight) -> tuple[Tensor, Tensor]:
    palettes, order = start.palettes.float().sort(1)
    rank = order.argsort(1).gather(1, start.indices.view(len(palettes), -1).long())
    middles = (palettes[:, 1:] + palettes[:, :-1]) / 2
    edge = torch.full((len(palettes), 1), torch.inf)
    low, high = torch.cat([-edge, middles], 1), torch.cat([middles, edge], 1)
    low = torch.where(low.isfinite(), low + _MARGIN * (palettes - low), low)
    high = torch.where(high.isfinite(), high - _MARGIN * (high - palettes), high)
    rows = torch.ones(len(start.indices)) if start.row_scales is None else start.row_scales.float()
    bounds = [cell.gather(1, rank).view(start.indices.shape) * rows[:, None] for cell in (low, high)]
    return torch.minimum(*bounds), torch.maximum(*bounds)
