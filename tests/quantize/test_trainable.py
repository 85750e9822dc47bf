from __future__ import annotations

from typing import Any

import pytest
import torch

from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.palettize import palettize
from dwindle.quantize.trainable import TrainableIntegers, TrainablePalettes, trainable
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

INTEGERS = [
    {"bits": bits, "symmetric": symmetric, "balanced": balanced}
    for bits in (2, 3, 4, 8)
    for symmetric, balanced in ((True, False), (False, False), (True, True))
]


def weight(seed: int = 0, outputs: int = 8, inputs: int = 64) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.1


def integers(dense: torch.Tensor, bits: int, symmetric: bool = True, balanced: bool = False) -> AffineWeight:
    return round_to_nearest(dense, bits, 16, symmetric, balanced=balanced)


def palettes(dense: torch.Tensor, bits: int, row_scales: bool = False) -> PalettizedWeight:
    return palettize(dense, bits, 4, row_scales=row_scales)


def arbitrary_codes(start: QuantizedWeight, seed: int = 1) -> QuantizedWeight:
    """The same tables under codes that are nowhere near the nearest."""
    codes = torch.randint(0, 2**start.bits, start.shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    if isinstance(start, AffineWeight):
        zeros = start.zero_points
        return AffineWeight(codes, start.scales, zeros, start.bits, start.group_size, start.balanced)
    order = torch.randperm(2**start.bits, generator=torch.Generator().manual_seed(seed))
    return PalettizedWeight(codes, start.palettes[:, order], start.bits, start.group_size, start.row_scales)


def scatter(part: TrainableIntegers | TrainablePalettes, seed: int = 2) -> None:
    order = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (part.offset, *part.tables()):
            parameter.add_(torch.rand(parameter.shape, generator=order) - 0.5)


def starts() -> list[Any]:
    dense = weight()
    found = [pytest.param(integers(dense, **kind), id=f"integers-{'-'.join(map(str, kind.values()))}")
             for kind in INTEGERS]  # fmt: skip
    return found + [
        pytest.param(palettes(dense, bits, row_scales), id=f"palettes-{bits}-{row_scales}")
        for bits in (1, 2, 4, 8)
        for row_scales in (False, True)
    ]


@pytest.mark.parametrize("start", starts())
@pytest.mark.parametrize("arbitrary", [False, True])
def test_it_begins_at_its_start(start: QuantizedWeight, arbitrary: bool) -> None:
    begin = arbitrary_codes(start) if arbitrary else start
    part = trainable(weight(), begin)
    assert torch.equal(part.weight(), begin.dequantize())
    assert torch.equal(part.finish().dequantize(), begin.dequantize())
    assert part.finish().spec() == begin.spec()


@pytest.mark.parametrize("start", starts())
def test_what_was_trained_is_what_is_stored(start: QuantizedWeight) -> None:
    part = trainable(weight(), start)
    scatter(part)
    assert not torch.equal(part.weight(), start.dequantize())
    assert torch.equal(part.finish().dequantize(), part.weight())


@pytest.mark.parametrize("start", starts())
def test_every_parameter_gets_a_gradient(start: QuantizedWeight) -> None:
    part = trainable(weight(), start)
    (part.weight() - weight(3)).square().sum().backward()
    for parameter in (part.offset, *part.tables()):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


def test_an_offset_of_half_a_step_reaches_the_neighbour() -> None:
    dense = torch.tensor([[0.1, 0.4, 1.2, -2.0]])
    start = AffineWeight(torch.tensor([[2, 2, 3, 0]], dtype=torch.uint8), torch.ones(1, 1).half(), None, 2, 4)
    part = TrainableIntegers(dense, start)
    with torch.no_grad():
        part.offset.view(-1).copy_(torch.tensor([0.5, 0.5, 0.5, -0.5]))
    assert part.finish().codes.tolist() == [[3, 3, 3, 0]]
    table = PalettizedWeight(
        torch.tensor([[0, 0, 1]], dtype=torch.uint8), torch.tensor([[-1.0, 3.0]]).half(), bits=1, group_size=1
    )
    found = TrainablePalettes(torch.tensor([[-1.0, 0.5, 1.5]]), table)
    with torch.no_grad():
        found.offset.copy_(torch.tensor([[0.4, 0.4, -0.4]]))
    assert found.finish().indices.tolist() == [[0, 1, 0]]


def test_scales_get_the_gradient_of_learned_step_sizes() -> None:
    dense = torch.tensor([[0.3, 1.3, -9.0, 0.0]])
    start = AffineWeight(torch.tensor([[8, 9, 0, 8]], dtype=torch.uint8), torch.ones(1, 1).half(), None, 4, 4)
    part = TrainableIntegers(dense, start)
    part.weight().sum().backward()
    assert part.scale_factor.grad is not None
    inside = (0 - 0.15) + (1 - 1.15)  # half-way from 0.3 and 1.3 to their codes
    assert part.scale_factor.grad.item() == pytest.approx(inside + -8.0, abs=1e-5)


def test_palette_entries_get_the_sum_over_their_weights() -> None:
    table = PalettizedWeight(
        torch.tensor([[0, 0, 1]], dtype=torch.uint8), torch.tensor([[-1.0, 3.0]]).half(), bits=1, group_size=1
    )
    part = TrainablePalettes(torch.tensor([[-1.0, 0.5, 1.5]]), table)
    (part.weight() * torch.tensor([[1.0, 10.0, 100.0]])).sum().backward()
    assert part.entry_offset.grad is not None
    assert part.entry_offset.grad.tolist() == [[11.0 * 4, 100.0 * 4]]


def test_entries_may_pass_each_other() -> None:
    part = TrainablePalettes(weight(), palettes(weight(), 2))
    with torch.no_grad():
        part.entry_offset.copy_(torch.tensor([2.0, 0.0, 0.0, -2.0]).expand_as(part.entry_offset))
    table = part.finish().palettes.float()
    assert (table.diff(dim=1) >= 0).all()
    assert torch.equal(part.finish().dequantize(), part.weight())


@pytest.mark.parametrize("scale", [0.0, 1e-9, 6e4])
def test_any_magnitude_stays_finite(scale: float) -> None:
    dense = weight() * scale / 0.5
    for start in (integers(dense, 2), integers(dense, 4, symmetric=False), palettes(dense, 2)):
        part = trainable(dense, start)
        scatter(part)
        assert torch.isfinite(part.weight()).all()
        assert torch.equal(part.finish().dequantize(), part.weight())
