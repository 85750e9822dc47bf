"""Moments of inputs and gradients against one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dwindle.adapters.linear_moments import divergence_moments, input_moments

IDS = torch.randint(97, 123, (3, 10), generator=torch.Generator().manual_seed(0))


def test_gradient_moments_are_those_of_each_linear_alone(tiny_bundle: Callable[..., Any]) -> None:
    """A row added to a linear's weight is what its gradient moves: d loss / d W = G^T X, so G G^T is found from it."""
    bundle = tiny_bundle("llama", initializer_range=0.2)
    parts = bundle.anatomy.parts(0)
    found = divergence_moments(bundle, set(parts.values()), IDS, seed=5)
    assert sorted(name for row in found for name in row.names) == sorted(parts.values())
    with torch.no_grad():
        logs = bundle.model(input_ids=IDS).logits.flatten(0, 1).log_softmax(-1)
    drawn = torch.multinomial(logs.exp(), 1, generator=torch.Generator().manual_seed(5))
    for row in found:
        for name in row.names:
            linear, kept = bundle.model.get_submodule(name), dict[str, torch.Tensor]()

            def move(module: Any, given: Any, out: torch.Tensor, kept: dict[str, torch.Tensor] = kept) -> torch.Tensor:
                kept["x"], kept["by"] = given[0].detach(), torch.zeros_like(out, requires_grad=True)
                return out + kept["by"]

            hook = linear.register_forward_hook(move)
            loss = -bundle.model(input_ids=IDS).logits.flatten(0, 1).log_softmax(-1).gather(1, drawn).sum()
            hook.remove()
            gradient = torch.autograd.grad(loss, kept["by"])[0].flatten(0, 1).double()
            assert torch.allclose(row.gradients[name], gradient.T @ gradient, rtol=1e-4, atol=1e-6), name
            read = kept["x"].flatten(0, 1).double()
            assert torch.allclose(row.inputs, read.T @ read, rtol=1e-4, atol=1e-6), name


def test_the_model_is_left_as_it_was(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("qwen2")
    bundle.model.train()
    asked = [weight.requires_grad for weight in bundle.model.parameters()]
    names = set(bundle.anatomy.parts(1).values())
    gathered = divergence_moments(bundle, names, IDS)
    assert bundle.model.training
    assert [weight.requires_grad for weight in bundle.model.parameters()] == asked
    assert all(weight.grad is None for weight in bundle.model.parameters())
    bundle.model.eval()
    for ours, theirs in zip(gathered, input_moments(bundle, names, IDS), strict=True):
        assert ours.names == theirs.names
        assert torch.equal(ours.inputs, theirs.inputs)


def test_nothing_is_gathered_of_no_linear(tiny_bundle: Callable[..., Any]) -> None:
    assert input_moments(tiny_bundle("llama"), set(), IDS) == divergence_moments(tiny_bundle("llama"), set(), IDS) == []
