from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dwindle.quantize.awq import LEAST_GAIN, Equalized, equalize
from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.layer_plan import LayerFormat
from dwindle.quantize.layer_statistics import LayerStatistics
from tests.conftest import TINY_FAMILIES

IDS = torch.arange(3, 51).view(2, 24)


def statistics_of(bundle: Any, loud: bool = True) -> dict[str, LayerStatistics]:
    """Statistics as if some inputs were much stronger than others."""
    generator = torch.Generator().manual_seed(0)
    found, by_width = {}, {}
    for name in bundle.anatomy.linear_names():
        width = bundle.model.get_submodule(name).in_features
        if width not in by_width:
            x = torch.randn(512, width, generator=generator)
            if loud:
                x = x * torch.randn(width, generator=generator).mul(1.5).exp()
            by_width[width] = x.T @ x / len(x)
        hessian = by_width[width]
        found[name] = LayerStatistics(512, hessian.diagonal().clone(), hessian[None])
    return found


def formats_of(bundle: Any, bits: int = 3) -> dict[str, LayerFormat]:
    return {name: LayerFormat(name, "integer", bits, 16) for name in bundle.anatomy.linear_names()}


def parameters(bundle: Any) -> dict[str, Tensor]:
    return dict(bundle.model.named_parameters())


def equalized(bundle: Any, layer: int, **changes: Any) -> Equalized:
    given = {"statistics": statistics_of(bundle), "formats": formats_of(bundle)} | changes
    return equalize(parameters(bundle), bundle.anatomy, layer, **given)


def applied(bundle: Any, tensors: dict[str, Tensor]) -> Any:
    model = copy.deepcopy(bundle.model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
    return model


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_float_model_is_unchanged(family: str, tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle(family)
    layers = [equalized(bundle, layer) for layer in range(2)]
    tensors = {name: tensor for layer in layers for name, tensor in layer.tensors.items()}
    assert tensors
    with torch.no_grad():
        before, after = bundle.model(IDS).logits, applied(bundle, tensors)(IDS).logits
    assert torch.allclose(before, after, atol=1e-5 * float(before.abs().max()) + 1e-5, rtol=0)
    reads = {name.split(".")[-1] for layer in layers for name in layer.input_scales}
    fused, post = bundle.anatomy.fused, bundle.anatomy.traits.norm_layout == "post"
    assert {"o_proj", "down_proj"} <= reads
    if not post:
        assert ({"qkv_proj", "gate_up_proj"} if fused else {"q_proj", "k_proj", "v_proj", "up_proj"}) <= reads


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_biases_of_scaled_rows_are_scaled(family: str, tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle(family, attention_bias=True, mlp_bias=True) if family == "llama" else tiny_bundle(family)
    found = equalized(bundle, 0)
    biases = [name for name in found.tensors if name.endswith(".bias")]
    assert bool(biases) == (family != "phi3")
    with torch.no_grad():
        before, after = bundle.model(IDS).logits, applied(bundle, found.tensors)(IDS).logits
    assert torch.allclose(before, after, atol=1e-5 * float(before.abs().max()) + 1e-5, rtol=0)


def test_families_without_a_norm_before_are_named(tiny_bundle: Callable[..., Any]) -> None:
    found = equalized(tiny_bundle("olmo2"), 1)
    assert [name.split(".")[-1] for name in found.left_alone] == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    assert not set(found.left_alone) & set(found.input_scales)
    assert equalized(tiny_bundle("gemma2"), 1).left_alone == ()


def test_the_rounding_error_falls_where_it_scales(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("qwen3")
    statistics = statistics_of(bundle)
    found = equalized(bundle, 0, statistics=statistics)
    for name, scale in found.input_scales.items():
        weight = bundle.model.get_submodule(name).weight.detach()
        hessian = statistics[name].hessian
        assert hessian is not None
        moved = found.statistics(name, statistics[name])
        plain = round_to_nearest(weight, 3, 16, importance=statistics[name].second_moment).dequantize() - weight
        scaled = round_to_nearest(weight * scale, 3, 16, importance=moved.second_moment).dequantize() / scale - weight
        assert found.gains[name] >= LEAST_GAIN
        if not name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            assert float(((scaled @ hessian[0]) * scaled).sum()) < float(((plain @ hessian[0]) * plain).sum())


def test_statistics_move_with_the_scales(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    name = bundle.anatomy.parts(0)["up"]
    found = equalized(bundle, 0)
    scale, rows = found.input_scales[name], found.output_scales[name]
    x, gradients = torch.randn(64, 32), torch.randn(64, 64)
    fisher = gradients.square().T @ x.square() / 64
    before = LayerStatistics(64, x.square().mean(0), (x.T @ x / 64)[None], fisher)
    moved = x / scale
    after = found.statistics(name, before)
    assert torch.allclose(after.second_moment, moved.square().mean(0), rtol=1e-4)
    assert after.hessian is not None
    assert after.fisher is not None
    assert torch.allclose(after.hessian[0], moved.T @ moved / 64, rtol=1e-3, atol=1e-4)
    wanted = (gradients / rows).square().T @ moved.square() / 64
    assert torch.allclose(after.fisher, wanted, rtol=1e-3)
    untouched = found.statistics("model.layers.1.mlp.up_proj", before)
    assert untouched.hessian is before.hessian
    assert untouched.fisher is before.fisher


def test_nothing_is_scaled_where_it_does_not_help(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    eight_bits = equalized(bundle, 0, formats={})
    assert eight_bits == Equalized()
    quiet = {name: LayerStatistics(1, torch.zeros(s.second_moment.shape), torch.zeros_like(s.hessian))
             for name, s in statistics_of(bundle).items() if s.hessian is not None}  # fmt: skip
    assert equalized(bundle, 0, statistics=quiet).tensors == {}


def test_second_moments_suffice(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    diagonal = {n: LayerStatistics(s.tokens, s.second_moment) for n, s in statistics_of(bundle).items()}
    found = equalized(bundle, 0, statistics=diagonal)
    assert found.input_scales
    name = next(iter(found.input_scales))
    assert found.statistics(name, diagonal[name]).hessian is None


def test_dtypes_and_inputs_are_kept(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    halves = {name: parameter.detach().half() for name, parameter in bundle.model.named_parameters()}
    kept = {name: tensor.clone() for name, tensor in halves.items()}
    found = equalize(halves, bundle.anatomy, 0, statistics_of(bundle), formats_of(bundle))
    assert all(tensor.dtype == torch.float16 for tensor in found.tensors.values())
    assert all(torch.equal(halves[name], kept[name]) for name in halves)
