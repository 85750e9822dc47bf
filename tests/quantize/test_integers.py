from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwindle.quantize.integers import round_to_nearest


def errors(weight: torch.Tensor, **options: object) -> torch.Tensor:
    coded = round_to_nearest(weight, **options)  # type: ignore[arg-type]
    return (weight - coded.dequantize()).view(-1, coded.group_size).square().sum(1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_equal_torchao(bits: int, symmetric: bool) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    ours = round_to_nearest(weight, bits, 32, symmetric, clip_candidates=1)
    scales = ours.scales.float()
    if symmetric:
        zero = torch.zeros(scales.shape, dtype=torch.int32)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        assert ours.zero_points is not None
        zero, low, high = ours.zero_points.to(torch.int32), 0, 2**bits - 1
    theirs = primitives.quantize_affine(weight, (1, 32), scales, zero, torch.int32, low, high)
    assert torch.equal(ours.codes.to(torch.int32), theirs - low)
    dense = primitives.dequantize_affine(theirs, (1, 32), scales, zero, torch.int32, low, high)
    assert torch.equal(ours.dequantize(), dense)


def test_scales_equal_torchao_up_to_fp16() -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = torch.randn(8, 64)
    scale, zero = primitives.choose_qparams_affine(
        weight, primitives.MappingType.ASYMMETRIC, (1, 32), torch.uint8, 0, 15, eps=1e-9
    )
    ours = round_to_nearest(weight, 4, 32, symmetric=False, clip_candidates=1)
    assert torch.allclose(ours.scales.float(), scale.view(8, 2), rtol=1e-3)
    assert ours.zero_points is not None
    assert (ours.zero_points.int() - zero.view(8, 2).int()).abs().max() <= 1


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_is_never_worse_than_plain_rounding(bits: int, symmetric: bool) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(bits)) ** 3
    searched = errors(weight, bits=bits, group_size=32, symmetric=symmetric)
    plain = errors(weight, bits=bits, group_size=32, symmetric=symmetric, clip_candidates=1)
    assert (searched <= plain * (1 + 1e-6)).all()
    assert searched.sum() < plain.sum()


def test_int4_blocks_gain_a_tenth_from_the_search() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    plain = errors(weight, bits=4, group_size=32, clip_candidates=1).sum()
    assert errors(weight, bits=4, group_size=32).sum() < 0.9 * plain


def test_int8_per_channel_is_within_half_a_step() -> None:
    weight = torch.randn(32, 48)
    coded = round_to_nearest(weight, 8, 48, clip_candidates=1)
    assert coded.scales.shape == (32, 1)
    assert ((weight - coded.dequantize()).abs() <= coded.scales.float() * 0.51 + weight.abs() * 6e-4).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000), bits=st.integers(2, 8), symmetric=st.booleans(),
    magnitude=st.sampled_from([0.0, 1e-9, 1e-6, 1e-2, 1.0, 3e4]),
)  # fmt: skip
def test_any_magnitude_stays_finite(seed: int, bits: int, symmetric: bool, magnitude: float) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2) * magnitude
    coded = round_to_nearest(weight, bits, 16, symmetric)
    dense = coded.dequantize()
    assert torch.isfinite(dense).all()
    assert int(coded.codes.max()) < 2**bits
    assert ((dense - weight).square().sum() <= weight.square().sum() + 1e-12).all()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.cat([torch.zeros(2, 32), torch.randn(2, 32)])
    for symmetric in (True, False):
        assert torch.equal(round_to_nearest(weight, 4, 32, symmetric).dequantize()[:2], torch.zeros(2, 32))


def test_rows_are_coded_alike_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 64)
    whole = round_to_nearest(weight, 4, 32)
    monkeypatch.setattr("dwindle.quantize.integers._CHUNK_WEIGHTS", 200)
    assert torch.equal(round_to_nearest(weight, 4, 32).codes, whole.codes)


def test_balanced_codes_have_their_own_levels() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    coded = round_to_nearest(weight, 2, 16, balanced=True)
    levels = (coded.dequantize().view(16, 4, 16) / coded.scales.float()[..., None]).unique()
    assert torch.allclose(levels, torch.tensor([-1.5, -0.5, 0.5, 1.5]), atol=1e-3)
    nearest = (weight.view(16, 4, 16, 1) - coded.scales.float()[..., None, None] * levels).abs().argmin(3)
    assert torch.equal(coded.codes.view(16, 4, 16).long(), nearest)
    assert errors(weight, bits=2, group_size=16, balanced=True).sum() < errors(weight, bits=2, group_size=16).sum()


def test_importance_weighs_the_errors() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    importance = torch.rand(64, generator=torch.Generator().manual_seed(4)) ** 4
    plain, weighted = round_to_nearest(weight, 3, 32), round_to_nearest(weight, 3, 32, importance=importance)
    found = [((c.dequantize() - weight).square() * importance).sum() for c in (plain, weighted)]
    assert found[1] < 0.95 * found[0]
    alike = round_to_nearest(weight, 3, 32, importance=torch.full((16, 64), 2.0))
    assert torch.equal(alike.codes, plain.codes)
