"""The prior over shapes says what its sources say."""

from __future__ import annotations

import dataclasses

import pytest

from dwindle.prune.capacity import bits_factor, effective_parameters
from dwindle.prune.shape import Shape

LLAMA_8B = Shape("llama", 32, 4096, 14336, 32, 8, 128, 128_256, False, 2, "none", False, False, False)


def worth(**sizes: int) -> float:
    return effective_parameters(dataclasses.replace(LLAMA_8B, **sizes), LLAMA_8B, 16)


def test_the_full_model_is_worth_its_decoder() -> None:
    assert worth() == pytest.approx(32 * LLAMA_8B.layer_parameters)


def test_width_goes_before_depth_at_the_size_minitron_compared() -> None:
    by_width, by_depth = {"width": 3072, "ffn_width": 9216}, {"layers": 16}
    shapes = [dataclasses.replace(LLAMA_8B, **sizes) for sizes in (by_width, by_depth)]
    assert shapes[0].parameters == pytest.approx(shapes[1].parameters, rel=0.02)
    assert worth(**by_width) > 1.2 * worth(**by_depth)


def test_a_cut_spread_over_axes_is_worth_more_than_one_to_the_bone() -> None:
    one_size = [{"width": 2816, "ffn_width": 8448}, {"ffn_width": 4608}, {"width": 1856}]
    counts = [dataclasses.replace(LLAMA_8B, **sizes).layer_parameters for sizes in one_size]
    assert max(counts) < 1.03 * min(counts)
    assert worth(**one_size[0]) > 1.04 * max(worth(**one_size[1]), worth(**one_size[2]))
    assert worth(kv_heads=8, heads=32, ffn_width=12288) > worth(kv_heads=4, heads=16, ffn_width=14336)


def test_four_bits_keep_the_most_at_one_size() -> None:
    sizes = (2, 2.5, 3, 3.5, 4, 5, 6, 8, 16)
    assert max(sizes, key=lambda bits: bits_factor(bits) / bits) == 4
    factors = [bits_factor(bits) for bits in sizes]
    assert factors == sorted(factors)
    assert factors[-1] == pytest.approx(1)
