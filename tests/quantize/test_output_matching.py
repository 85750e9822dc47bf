from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dwindle.decoder_blocks import InMemoryBlocks
from dwindle.errors import DataError
from dwindle.quantize.gptq import gptq
from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.layer_statistics import LayerStatistics
from dwindle.quantize.output_matching import DAMPING, match_outputs, target_weight
from dwindle.weights import AffineWeight, QuantizedWeight
from tests.conftest import TINY_FAMILIES

IDS = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))


def coarse(name: str, weight: Tensor, found: LayerStatistics) -> QuantizedWeight:
    return round_to_nearest(weight, 2, 16)


def statistics_of(x: Tensor) -> LayerStatistics:
    return LayerStatistics(len(x), x.square().mean(0), (x.T @ x / len(x))[None])


def test_the_target_is_the_damped_regression() -> None:
    x, noise = torch.randn(200, 12), torch.randn(200, 12)
    given, weight, lacking = x + 0.3 * noise, torch.randn(5, 12), torch.randn(200, 5)
    found = target_weight(weight, x.T @ given / 200, statistics_of(given), lacking.T @ given / 200)
    ridge = (200 * DAMPING * given.square().mean()).sqrt()
    rows = torch.cat([given, ridge * torch.eye(12)])
    wanted = torch.linalg.lstsq(rows, torch.cat([x @ weight.T + lacking, ridge * weight.T])).solution.T
    assert torch.allclose(found, wanted, atol=1e-4)


def test_nothing_lost_leaves_the_weight() -> None:
    x, weight = torch.randn(64, 8), torch.randn(3, 8)
    assert torch.allclose(target_weight(weight, x.T @ x / 64, statistics_of(x)), weight, atol=1e-5)
    dead = LayerStatistics(64, torch.zeros(8), torch.zeros(1, 8, 8))
    assert torch.allclose(target_weight(weight, torch.zeros(8, 8), dead), weight)


def walked(bundle: Any, code: Any, names: Any = None) -> tuple[InMemoryBlocks, Tensor, Tensor, dict[str, Any]]:
    """Block 1 behind a coarsely rounded block 0: blocks, inputs, float inputs, codes."""
    blocks = InMemoryBlocks(bundle)
    hidden = blocks.embed(IDS)
    rounded = {n: coarse(n, bundle.model.get_submodule(n).weight.detach(), None).dequantize()  # type: ignore[arg-type]
               for n in bundle.anatomy.parts(0).values()}  # fmt: skip
    with torch.no_grad(), blocks.block(0):
        inputs, floats = blocks.forward(0, hidden, rounded), blocks.forward(0, hidden)
    with blocks.block(1) as block:
        wanted = names if names is not None else list(bundle.anatomy.parts(1).values())
        found = match_outputs(blocks, 1, block, inputs.split(8), floats.split(8), wanted, code)
    return blocks, inputs, floats, found


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_linear_is_coded_in_its_stage(family: str, tiny_bundle: Callable[..., Any]) -> None:
    bundle, order = tiny_bundle(family), []

    def code(name: str, weight: Tensor, found: LayerStatistics) -> QuantizedWeight:
        linear = bundle.model.get_submodule(name)
        assert weight.shape == linear.weight.shape
        assert found.hessian is not None
        assert found.hessian.shape == (1, weight.shape[1], weight.shape[1])
        assert found.tokens == IDS.numel()
        order.append(name)
        return coarse(name, weight, found)

    *_, found = walked(bundle, code)
    assert order == list(bundle.anatomy.parts(1).values())
    assert list(found) == order


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "phi3"])
def test_the_block_comes_nearer_to_the_unquantized_model(family: str, tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle(family)

    def code(name: str, weight: Tensor, found: LayerStatistics) -> AffineWeight:
        assert found.hessian is not None
        return gptq(weight, 4, 16, False, found.hessian, rounds=1)

    def unmatched(name: str, weight: Tensor, found: LayerStatistics) -> AffineWeight:
        return code(name, bundle.model.get_submodule(name).weight.detach(), found)

    errors = []
    for coder in (code, unmatched):
        blocks, inputs, floats, found = walked(bundle, coder)
        with torch.no_grad(), blocks.block(1):
            after = blocks.forward(1, inputs, {name: w.dequantize() for name, w in found.items()})
            errors.append(float((after - blocks.forward(1, floats)).square().mean()))
    assert errors[0] < 0.98 * errors[1]


def test_only_the_named_linears_are_coded(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    names = [bundle.anatomy.parts(1)["k"], bundle.anatomy.parts(1)["down"]]
    *_, found = walked(bundle, coarse, names)
    assert list(found) == names


def test_activations_that_are_not_finite_are_refused(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    blocks = InMemoryBlocks(bundle)
    hidden = blocks.embed(IDS)
    with blocks.block(0) as block, pytest.raises(DataError, match="q_proj"):
        match_outputs(blocks, 0, block, [hidden * torch.inf], [hidden], bundle.anatomy.linear_names(), coarse)
