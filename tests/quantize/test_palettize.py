from __future__ import annotations

import pytest
import torch

from dwindle.quantize import palettize as module
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


def unlike_rows(rows: int = 32, inputs: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(-2, 0, rows)[torch.randperm(rows, generator=generator)]
    return torch.randn(rows, inputs, generator=generator) * sizes[:, None]


@pytest.mark.parametrize("shape", [(300,), (32, 300)])
def test_importance_lowers_the_weighted_error(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(shape, generator=generator) + 0.1
    weight = torch.randn(32, 300, generator=generator) * size
    importance = size**-2
    plain, weighted = (palettize(weight, 2, 16, importance=h).dequantize() for h in (None, importance))
    errors = [float((importance * (weight - dense).square()).sum()) for dense in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]


def test_a_uniform_importance_changes_nothing() -> None:
    weight = torch.randn(32, 300)
    assert torch.equal(palettize(weight, 4, 16, importance=torch.full((300,), 2.0)).palettes,
                       palettize(weight, 4, 16).palettes)  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4])
def test_row_scales_serve_rows_of_unlike_size(bits: int) -> None:
    weight = unlike_rows(inputs=2000)
    scaled, plain = palettize(weight, bits, 32, row_scales=True), palettize(weight, bits, 32)
    assert scaled.row_scales is not None
    assert scaled.row_scales.shape == (32,)
    assert relative_error(weight, scaled.dequantize()) < 0.9 * relative_error(weight, plain.dequantize())
    alone = palettize(weight, bits, 1)
    assert relative_error(weight, scaled.dequantize()) < 1.15 * relative_error(weight, alone.dequantize())


def test_row_scales_assign_against_what_is_stored() -> None:
    weight = unlike_rows()
    coded = palettize(weight, 3, 16, row_scales=True)
    assert coded.row_scales is not None
    values = coded.palettes.float().repeat_interleave(16, 0) * coded.row_scales.float()[:, None]
    best = (weight[:, :, None] - values[:, None]).abs().amin(2)
    assert torch.allclose((weight - coded.dequantize()).abs(), best, atol=1e-6)


def test_row_scales_follow_the_importance() -> None:
    weight = unlike_rows()
    importance = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) ** 4
    plain, weighted = (palettize(weight, 2, 32, importance=h, row_scales=True).dequantize() for h in (None, importance))
    errors = [float((importance * (weight - dense).square()).sum()) for dense in (plain, weighted)]
    assert errors[1] < errors[0]


def test_rows_of_zeros_and_of_hardly_anything_keep_a_usable_scale() -> None:
    weight = unlike_rows()
    weight[3], weight[4] = 0.0, 1e-7 * weight[4]
    coded = palettize(weight, 4, 16, row_scales=True)
    assert coded.row_scales is not None
    assert (coded.row_scales > 0).all()
    assert torch.isfinite(coded.dequantize()).all()
    assert torch.equal(palettize(torch.zeros(16, 8), 2, 16, row_scales=True).dequantize(), torch.zeros(16, 8))


@pytest.mark.parametrize("row_scales", [False, True])
def test_the_number_of_threads_changes_no_bit(row_scales: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = unlike_rows(rows=48)
    alone = palettize(weight, 3, 8, row_scales=row_scales)
    monkeypatch.setattr(module, "_WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = palettize(weight, 3, 8, row_scales=row_scales)
    assert torch.equal(alone.indices, together.indices)
    assert torch.equal(alone.palettes, together.palettes)
