"""Frequencies against the buffers of stock models, to the last bit."""

from __future__ import annotations

import pytest
import torch

from dwindle.errors import UnsupportedModel
from dwindle.rope import Rope

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-options": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0,
                     "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
    "yarn-factor": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                    "attention_factor": 0.9},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_the_stock_model(tiny_bundle, name):
    bundle = tiny_bundle(head_dim=16, rope_scaling=SCALINGS[name], rope_theta=500.0)
    frequencies, factor = bundle.anatomy.traits.ropes[0].frequencies()
    stock = bundle.model.model.rotary_emb
    assert torch.equal(frequencies, stock.inv_freq)
    assert factor == pytest.approx(stock.attention_scaling, rel=1e-12)


def test_longrope_equals_the_stock_model_and_knows_its_reach(tiny_bundle):
    scaling = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    bundle = tiny_bundle("phi3", rope_scaling=scaling, original_max_position_embeddings=32)
    rope = bundle.anatomy.traits.ropes[0]
    frequencies, factor = rope.frequencies()
    stock = bundle.model.model.rotary_emb
    assert torch.equal(frequencies, stock.inv_freq)
    assert factor == pytest.approx(stock.attention_scaling, rel=1e-12)
    assert rope.longest_exact == 32


def test_tables_are_the_cosines_and_sines_of_the_angles():
    rope = Rope(theta=100.0, rotary_dim=4, context=8)
    cos, sin = rope.tables(3)
    assert cos.shape == sin.shape == (3, 2)
    assert torch.allclose(cos[2], torch.tensor([2.0, 0.2]).cos())
    assert torch.allclose(sin[2], torch.tensor([2.0, 0.2]).sin())


def test_unknown_and_incomplete_scalings_are_refused():
    with pytest.raises(UnsupportedModel, match="'spiral' is not supported; supported: default"):
        Rope(theta=100.0, rotary_dim=4, context=8, kind="spiral")
    with pytest.raises(UnsupportedModel, match="'linear' needs a number for 'factor', found None"):
        Rope(theta=100.0, rotary_dim=4, context=8, kind="linear").frequencies()
    with pytest.raises(UnsupportedModel, match="needs 2 numbers in 'short_factor'"):
        Rope(theta=100.0, rotary_dim=4, context=8, kind="longrope", scaling={"short_factor": [1.0]}).frequencies()
