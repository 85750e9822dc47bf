from __future__ import annotations

import pytest
import torch

from dwindle.quantize.palettize import palettize


def relative_error(weight: torch.Tensor, dense: torch.Tensor) -> float:
    return float((weight - dense).square().sum() / weight.square().sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("group_size", [8, 16, 32, 64])
def test_every_width_and_group(bits: int, group_size: int) -> None:
    weight = torch.randn(64, 40, generator=torch.Generator().manual_seed(bits))
    coded = palettize(weight, bits, group_size)
    assert coded.indices.shape == (64, 40)
    assert coded.palettes.shape == (64 // group_size, 2**bits)
    assert relative_error(weight, coded.dequantize()) < {1: 0.4, 2: 0.13, 3: 0.04, 4: 0.011, 6: 8e-4, 8: 6e-5}[bits]


def test_every_weight_has_the_nearest_value_of_the_stored_palette() -> None:
    weight = torch.randn(32, 300)
    coded = palettize(weight, 4, 16)
    palettes = coded.palettes.float().repeat_interleave(16, 0)
    best = (weight[:, :, None] - palettes[:, None]).abs().amin(2)
    assert torch.allclose((weight - coded.dequantize()).abs(), best, atol=1e-6)


def test_a_palette_of_fp16_values_comes_back_exactly() -> None:
    values = torch.randn(2, 16).half().float()
    weight = torch.gather(values, 1, torch.randint(0, 16, (2, 16 * 500))).view(32, 500)
    coded = palettize(weight, 4, 16)
    assert torch.equal(coded.dequantize(), weight)
    assert torch.equal(palettize(coded.dequantize(), 4, 16).dequantize(), weight)


def test_half_precision_and_strided_weights() -> None:
    weight = torch.randn(40, 32).half()
    assert torch.equal(palettize(weight.T, 4, 16).indices, palettize(weight.T.float().contiguous(), 4, 16).indices)
