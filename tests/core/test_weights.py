from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwindle.errors import UnsupportedModel
from dwindle.weights import (
    AffineWeight,
    PalettizedWeight,
    QuantizedWeight,
    packed_shapes,
    spec_bits,
    weight_from_tensors,
)


def affine(
    bits: int = 4, group_size: int = 4, symmetric: bool = True, seed: int = 0, outputs: int = 6, balanced: bool = False
) -> AffineWeight:
    g = torch.Generator().manual_seed(seed)
    groups = 12 // group_size
    codes = torch.randint(0, 2**bits, (outputs, 12), generator=g).to(torch.uint8)
    zeros = None if symmetric else torch.randint(0, 2**bits, (outputs, groups), generator=g).to(torch.uint8)
    return AffineWeight(codes, torch.rand(outputs, groups, generator=g).half(), zeros, bits, group_size, balanced)


def palettized(bits: int = 4, group_size: int = 2, scaled: bool = False, seed: int = 0) -> PalettizedWeight:
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 2**bits, (6, 5), generator=g).to(torch.uint8)
    scales = torch.rand(6, generator=g).half() if scaled else None
    return PalettizedWeight(
        indices, torch.randn(6 // group_size, 2**bits, generator=g).half(), bits, group_size, scales
    )


def test_affine_arithmetic_is_one_float32_product() -> None:
    for weight in (affine(), affine(symmetric=False)):
        for o in range(6):
            for i in range(12):
                zero = 8 if weight.zero_points is None else int(weight.zero_points[o, i // 4])
                difference = torch.tensor(float(int(weight.codes[o, i]) - zero))
                assert weight.dequantize()[o, i] == difference * weight.scales[o, i // 4].float()


def test_balanced_codes_are_centred_half_way() -> None:
    weight = AffineWeight(
        torch.arange(4, dtype=torch.uint8).view(1, 4), torch.full((1, 1), 0.25).half(), None, 2, 4, balanced=True
    )
    assert weight.dequantize().tolist() == [[-0.375, -0.125, 0.125, 0.375]]
    assert weight.spec()["balanced"] is True
    assert weight.stored_bits == 4 * 2 + 16
    for bits in (2, 3, 4, 8):
        weight = affine(bits, balanced=True)
        numbers = (weight.codes.float() - (2**bits - 1) / 2).view(6, 3, 4)
        assert torch.equal(weight.dequantize().view(6, 3, 4), numbers * weight.scales.float()[..., None])


def test_a_spec_written_before_balanced_codes_reads_on() -> None:
    weight = affine()
    assert "balanced" not in weight.spec()
    assert not weight_from_tensors(weight.to_tensors(), weight.spec()).spec().get("balanced")


def test_palettized_arithmetic() -> None:
    for scaled in (False, True):
        weight = palettized(scaled=scaled)
        for o in range(6):
            for i in range(5):
                value = weight.palettes[o // 2, int(weight.indices[o, i])].float()
                scale = 1.0 if weight.row_scales is None else weight.row_scales[o].float()
                assert weight.dequantize()[o, i] == value * scale


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8), group_size=st.sampled_from([1, 2, 4, 12]), symmetric=st.booleans(), seed=st.integers(0, 99)
)
def test_affine_round_trip(bits: int, group_size: int, symmetric: bool, seed: int) -> None:
    check_round_trip(affine(bits, group_size, symmetric, seed))
    check_round_trip(affine(bits, group_size, True, seed, balanced=True))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), group_size=st.sampled_from([1, 2, 3, 6]), scaled=st.booleans(), seed=st.integers(0, 99))
def test_palettized_round_trip(bits: int, group_size: int, scaled: bool, seed: int) -> None:
    check_round_trip(palettized(bits, group_size, scaled, seed))


def check_round_trip(weight: QuantizedWeight) -> None:
    tensors = weight.to_tensors("layer.")
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == {
        f"layer.{k}": v for k, v in packed_shapes(weight.spec()).items()
    }
    assert weight.stored_bits == spec_bits(weight.spec()) == 8 * sum(t.nbytes for t in tensors.values())
    again = weight_from_tensors(tensors, weight.spec(), "layer.")
    assert type(again) is type(weight)
    assert again.spec() == weight.spec()
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_stored_bits_count_every_table() -> None:
    assert affine().stored_bits == 6 * 12 * 4 + 6 * 3 * 16
    assert affine(symmetric=False).stored_bits == 6 * 12 * 4 + 6 * 3 * (16 + 4)
    assert palettized().stored_bits == 6 * 5 * 4 + 3 * 16 * 16
    assert palettized(scaled=True).stored_bits == 6 * 5 * 4 + 3 * 16 * 16 + 6 * 16


def test_an_unknown_kind_asks_for_an_update() -> None:
    with pytest.raises(UnsupportedModel, match=r"kind 'vector'.*Update dwindle"):
        weight_from_tensors({}, {"kind": "vector"})


def test_all_damaged_tensors_are_named() -> None:
    weight = affine(symmetric=False)
    tensors = weight.to_tensors("w.")
    tensors["w.scales"] = tensors["w.scales"].float()
    del tensors["w.zero_points"]
    with pytest.raises(UnsupportedModel, match=r"w.scales is torch.float32 .*; w.zero_points is missing"):
        weight_from_tensors(tensors, weight.spec(), "w.")


@pytest.mark.parametrize(
    "changes",
    [{"group_size": 5}, {"group_size": 6}, {"bits": 9}, {"scales": torch.zeros(6, 3)}, {"codes": torch.zeros(6, 12)},
     {"zero_points": torch.zeros(6, 2, dtype=torch.uint8)},
     {"zero_points": torch.zeros(6, 3, dtype=torch.uint8), "balanced": True}],
)  # fmt: skip
def test_fields_that_do_not_belong_together(changes: dict[str, Any]) -> None:
    weight = affine()
    fields = {name: getattr(weight, name) for name in ("codes", "scales", "zero_points", "bits", "group_size")}
    with pytest.raises(AssertionError):
        AffineWeight(**{**fields, **changes})
