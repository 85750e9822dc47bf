"""Moments of gradients against one linear at a time, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dwindle.adapters.linear_moments import gradient_moments, input_moments, weights_frozen
from dwindle.decoder_blocks import InMemoryBlocks

IDS = torch.randint(97, 123, (3, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_gradient_moments_are_those_of_each_linear_alone(
    family: str, layer: int, tiny_bundle: Callable[..., Any]
) -> None:
    bundle = tiny_bundle(family, initializer_range=0.2)
    blocks = InMemoryBlocks(bundle)
    names = list(bundle.anatomy.parts(layer).values())
    with torch.no_grad():
        states = blocks.embed(IDS)
        for before in range(layer):
            states = blocks.forward(before, states)
        logs = bundle.model(input_ids=IDS).logits.flatten(0, 1).log_softmax(-1)
    with weights_frozen(bundle.model), torch.no_grad():
        found = gradient_moments(blocks, layer, {name: bundle.model.get_submodule(name) for name in names}, [states], 5)
    assert sorted(found) == sorted(names)
    drawn = torch.multinomial(logs.exp(), 1, generator=torch.Generator().manual_seed(5))
    for name in names:
        kept: list[torch.Tensor] = []

        def move(module: Any, given: Any, out: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(torch.zeros_like(out, requires_grad=True))
            return out + kept[0]

        hook = bundle.model.get_submodule(name).register_forward_hook(move)
        loss = -bundle.model(input_ids=IDS).logits.flatten(0, 1).log_softmax(-1).gather(1, drawn).sum()
        hook.remove()
        gradient = torch.autograd.grad(loss, kept[0])[0].flatten(0, 1).double()
        expected = gradient.T @ gradient
        assert torch.allclose(found[name], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())), name


def test_weights_ask_for_gradients_again_as_they_did(tiny_bundle: Callable[..., Any]) -> None:
    model = tiny_bundle("llama").model
    first = next(model.parameters())
    first.requires_grad_(False)
    asked = [weight.requires_grad for weight in model.parameters()]
    with weights_frozen(model):
        assert not any(weight.requires_grad for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == asked


def test_linears_that_read_the_same_share_one_moment(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    parts = bundle.anatomy.parts(1)
    bundle.model.train()
    found = input_moments(bundle, set(parts.values()), IDS)
    assert bundle.model.training
    assert [row.names for row in found] == [[parts["q"], parts["k"], parts["v"]], [parts["o"]],
                                            [parts["gate"], parts["up"]], [parts["down"]]]  # fmt: skip
    assert input_moments(bundle, set(), IDS) == []
