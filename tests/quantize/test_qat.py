from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.bundle import ModelBundle
from dwindle.errors import DataError, RecipeError
from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.layer_plan import LayerFormat, LayerPlan
from dwindle.quantize.matching import Matching
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.palettize import palettize
from dwindle.quantize.qat import quantization_aware_training, starting_point
from dwindle.token_set import TokenSet
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

Factory = Callable[..., ModelBundle]


def windows(role: Any = "calibration") -> TokenSet:
    ids = torch.randint(0, 256, (24, 32), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, role, "windows", "0" * 64, 1, "1" * 64)


def options(**changes: Any) -> QuantizeOptions:
    return replace(QuantizeOptions(bits=2, tokens=12 * 4 * 32, batch_size=4), **changes)


def plan_of(bundle: ModelBundle, scheme: Any = "palettize", bits: int = 2, **kept: Any) -> LayerPlan:
    group = 16 if scheme == "palettize" else 32
    linears = [LayerFormat(name, scheme, bits, group, **kept) for name in bundle.anatomy.linear_names()]
    embedding = LayerFormat(bundle.anatomy.embedding, "integer", 4, bundle.anatomy.width)
    tied = {bundle.anatomy.head: bundle.anatomy.embedding} if bundle.anatomy.tied else {}
    return LayerPlan((*linears, embedding), tied, ())


def dense(bundle: ModelBundle, layer: LayerFormat) -> torch.Tensor:
    weight: torch.Tensor = bundle.model.get_submodule(layer.name).weight.detach()
    return weight


def divergence(bundle: ModelBundle, weights: dict[str, QuantizedWeight]) -> float:
    from copy import deepcopy

    model: Any = deepcopy(bundle.model)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight.dequantize())
        return float(Matching(bundle).divergence(model, windows().ids))


@pytest.mark.parametrize("scheme", ["palettize", "integer"])
@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_training_lowers_the_divergence_of_what_is_stored(family: str, scheme: Any, tiny_bundle: Factory) -> None:
    bundle = tiny_bundle(family)
    before = {name: value.clone() for name, value in bundle.model.named_parameters()}
    plan = plan_of(bundle, scheme)
    start = {layer.name: starting_point(dense(bundle, layer), layer, options()) for layer in plan.layers}
    trained = quantization_aware_training(bundle, plan, windows(), options(scheme=scheme))
    assert divergence(bundle, trained) < 0.95 * divergence(bundle, start)
    assert list(trained) == [layer.name for layer in plan.layers]
    assert all(weight.spec() == start[name].spec() for name, weight in trained.items())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in bundle.model.named_parameters())


def test_two_bit_integers_are_the_balanced_set(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    trained = quantization_aware_training(bundle, plan_of(bundle, "integer"), windows(), options(scheme="integer"))
    weight = trained[bundle.anatomy.linear_names()[0]]
    assert isinstance(weight, AffineWeight)
    levels = weight.dequantize().view(-1, 32) / weight.scales.float().view(-1, 1)
    assert set(levels.unique().tolist()) == {-1.5, -0.5, 0.5, 1.5}


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, True), (4, False)])
@pytest.mark.parametrize("group", [16, 256])
def test_the_first_scales_are_no_worse_than_those_of_rtn(bits: int, symmetric: bool, group: int) -> None:
    weight = torch.distributions.Laplace(0.0, 0.1).sample((32, 256))
    layer = LayerFormat("layer", "integer", bits, group, symmetric)
    start = starting_point(weight, layer, options(scheme="integer"))
    assert isinstance(start, AffineWeight)
    rtn = round_to_nearest(weight, bits, group, symmetric, balanced=bits == 2)
    errors = [(w.dequantize() - weight).square().view(-1, group).sum(1) for w in (start, rtn)]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert start.spec() == rtn.spec()


def test_training_begins_at_the_codes_of_a_better_quantizer(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    plan = plan_of(bundle, bits=2)
    start: dict[str, QuantizedWeight] = {}
    for layer in plan.layers:
        weight = dense(bundle, layer)
        if layer.scheme == "palettize":
            found = palettize(weight, 2, 16)
            shuffled = found.indices.clone()
            shuffled[0] = 3 - shuffled[0]
            start[layer.name] = PalettizedWeight(shuffled, found.palettes, 2, 16)
        else:
            start[layer.name] = round_to_nearest(weight, layer.bits, layer.group_size)
    still = quantization_aware_training(bundle, plan, windows(), options(learning_rate=1e-12), start=start)
    assert all(torch.equal(w.dequantize(), start[n].dequantize()) for n, w in still.items())
    moved = quantization_aware_training(bundle, plan, windows(), options(), start=start)
    assert divergence(bundle, moved) < divergence(bundle, start)


def test_a_stopped_run_goes_on_to_the_same_bits(
    tiny_bundle: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle()
    plan, chosen = plan_of(bundle), options()
    whole = quantization_aware_training(bundle, plan, windows(), chosen)
    calls = 0
    loss = Matching.loss

    def stop(self: Matching, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    monkeypatch.setattr("dwindle.quantize.qat.CHECKPOINT_EVERY", 4)
    with monkeypatch.context() as patched:
        patched.setattr(Matching, "loss", stop)
        with pytest.raises(KeyboardInterrupt):
            quantization_aware_training(bundle, plan, windows(), chosen, tmp_path)
    resumed = quantization_aware_training(bundle, plan, windows(), chosen, tmp_path)
    assert all(torch.equal(w.dequantize(), whole[n].dequantize()) for n, w in resumed.items())
    with pytest.raises(RecipeError, match="another"):
        quantization_aware_training(bundle, plan_of(bundle, bits=3), windows(), options(bits=3), tmp_path)


def test_a_start_that_does_not_fit_the_plan_is_refused(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    plan = plan_of(bundle)
    start = {layer.name: starting_point(dense(bundle, layer), layer, options()) for layer in plan.layers}
    first, second = list(start)[:2]
    del start[first]
    start[second] = palettize(dense(bundle, plan.layers[1]), 3, 16)
    with pytest.raises(RecipeError, match=rf"(?s)2 of 15 layers.*{first} \(missing\).*{second} \(.*3.*\)"):
        quantization_aware_training(bundle, plan, windows(), options(), start=start)


def test_evaluation_text_is_refused(tiny_bundle: Factory) -> None:
    with pytest.raises(DataError, match=r"method=qat trains on this text, and its role is 'evaluation'"):
        quantization_aware_training(tiny_bundle(), plan_of(tiny_bundle()), windows("evaluation"), options())
