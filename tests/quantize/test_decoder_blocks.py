from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dwindle.bundle import ModelBundle
from dwindle.decoder_blocks import InMemoryBlocks
from dwindle.families import FAMILIES

Factory = Callable[..., ModelBundle]


def text(length: int = 24) -> Tensor:
    return torch.randint(0, 256, (3, length), generator=torch.Generator().manual_seed(0))


def through(blocks: InMemoryBlocks, ids: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    hidden = blocks.embed(ids)
    for layer in range(blocks.anatomy.layers):
        with blocks.block(layer):
            path = f"{blocks.anatomy.layer_path(layer)}."
            chosen = {name: weight for name, weight in (weights or {}).items() if name.startswith(path)}
            hidden = blocks.forward(layer, hidden, chosen)
    with blocks.head():
        return blocks.logits(hidden)


@pytest.mark.parametrize("family", tuple(FAMILIES))
def test_block_by_block_is_the_whole_model(family: str, tiny_bundle: Factory) -> None:
    """At two window lengths, the second beyond the sliding window: what blocks are called with is caught anew."""
    bundle = tiny_bundle(family)
    blocks = InMemoryBlocks(bundle)
    with torch.no_grad():
        for length in (6, 24, 6):
            assert torch.equal(through(blocks, text(length)), bundle.model(text(length)).logits)


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_weights_take_the_place_of_the_blocks_own_and_get_gradients(family: str, tiny_bundle: Factory) -> None:
    bundle = tiny_bundle(family)
    before = {name: parameter.detach().clone() for name, parameter in bundle.model.named_parameters()}
    weights = {name: (before[f"{name}.weight"] * 0.5).requires_grad_() for name in bundle.anatomy.linear_names()}
    found = through(InMemoryBlocks(bundle), text(), weights)
    found.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in bundle.model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            bundle.model.get_submodule(name).weight.copy_(weight)
        assert torch.equal(found, bundle.model(text()).logits)


def test_blocks_are_themselves_again_after_a_failure(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("llama")
    blocks = InMemoryBlocks(bundle)
    with pytest.raises(IndexError):
        blocks.embed(text() + 10_000)
    with torch.no_grad():
        assert torch.equal(through(blocks, text()), bundle.model(text()).logits)
