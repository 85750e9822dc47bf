from __future__ import annotations

import pytest
import torch

from dwindle.quantize.hqq import hqq, norm_errors
from dwindle.quantize.integers import round_to_nearest


def heavy_tailed(seed: int) -> torch.Tensor:
    return torch.randn(32, 96, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "balanced"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("group_size", [32, 96])
def test_never_worse_than_rounding_in_its_norm(bits: int, symmetric: bool, balanced: bool, group_size: int) -> None:
    weight = heavy_tailed(bits)
    found = hqq(weight, bits, group_size, symmetric, balanced=balanced)
    assert (found.bits, found.group_size, found.symmetric, found.balanced) == (bits, group_size, symmetric, balanced)
    plain = round_to_nearest(weight, bits, group_size, symmetric, balanced=balanced)
    ours, theirs = norm_errors(weight, found), norm_errors(weight, plain)
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < theirs.sum()
    assert (norm_errors(weight, found, 2.0) <= norm_errors(weight, plain, 2.0) * (1 + 1e-5)).all()


def test_zero_points_move() -> None:
    weight = heavy_tailed(1) + 0.05
    plain, found = round_to_nearest(weight, 3, 32, False), hqq(weight, 3, 32, False)
    assert found.zero_points is not None
    assert not torch.equal(found.zero_points, plain.zero_points)


def test_an_outlier_is_not_given_up_for_the_norm() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    weight[:, 0] = 12
    found = hqq(weight, 3, 32).dequantize()
    assert (found[:, 0] > 9).all()


def test_scaling_a_weight_scales_the_result() -> None:
    weight = heavy_tailed(3)
    small, large = hqq(weight, 4, 32, False), hqq(weight * 64, 4, 32, False)
    assert torch.equal(small.codes, large.codes)


def test_zeros_and_extremes_stay_finite() -> None:
    for magnitude in (0.0, 1e-9, 3e4):
        for symmetric in (True, False):
            weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(4)).clamp(-2, 2) * magnitude
            assert torch.isfinite(hqq(weight, 3, 16, symmetric).dequantize()).all()


def test_rows_are_coded_alike_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed(5)
    whole = hqq(weight, 4, 32, False)
    monkeypatch.setattr("dwindle.quantize.hqq._CHUNK_WEIGHTS", 500)
    assert torch.equal(hqq(weight, 4, 32, False).codes, whole.codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_not_worse_than_hqq_of_torchao(bits: int) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = heavy_tailed(6)
    theirs = primitives._choose_qparams_and_quantize_affine_hqq(
        weight, nbits=bits, group_size=32, axis=1, compute_dtype=torch.float32, device="cpu", raw_output=True
    )
    codes, scale, zero = (t.float() for t in theirs[:3])
    dense = ((codes.view(-1, 32) - zero.view(-1, 1)) * scale.view(-1, 1)).view(weight.shape)
    with_real_zeros = (weight - dense).abs().pow(0.7).sum()
    ours = norm_errors(weight, hqq(weight, bits, 32, False)).sum()
    assert ours < 1.02 * with_real_zeros
