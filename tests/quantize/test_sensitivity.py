from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.decoder_blocks import InMemoryBlocks
from dwindle.quantize.allocation import Target, reachable_bits
from dwindle.quantize.bit_search import joint_curve, search_plan
from dwindle.quantize.joint_kl import JointCurve, JointKL
from dwindle.quantize.layer_plan import LayerFormat, ModelShapes, plan_layers
from dwindle.quantize.methods import layer_coder
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.sensitivity import (
    Sensitivities,
    error_sensitivities,
    fisher_sensitivities,
    kl_sensitivities,
    layer_choices,
)
from dwindle.streamed_blocks import StreamedBlocks

BITS = (2, 4, 8)


class Case:
    """A tiny model with ids [N, T], and RTN codes of every linear at three widths."""

    def __init__(self, bundle: Any, scheme: Any = "integer", bits: tuple[int, ...] = BITS) -> None:
        self.bundle, self.blocks = bundle, InMemoryBlocks(bundle)
        self.options = QuantizeOptions(scheme=scheme, method="rtn" if scheme == "integer" else "kmeans")
        code = layer_coder(self.options, self.options.method_used(False))
        self.coder = lambda form, dense: code(form, dense, None)
        self.plan, self.shapes = plan_layers(bundle, self.options), ModelShapes.of(bundle).shapes
        self.choices = layer_choices(self.plan, self.shapes, bundle.anatomy.linear_names(), bits)
        self.ids = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(5))
        self.codes = {
            name: {form: self.coder(form, self.weight(name)) for form in forms} for name, forms in self.choices.items()
        }

    def weight(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self.bundle.model.get_submodule(name).weight.detach()
        return found

    def uniform(self, bits: int) -> dict[str, LayerFormat]:
        return {name: next(form for form in forms if form.bits == bits) for name, forms in self.choices.items()}

    def codes_of(self, formats: dict[str, LayerFormat]) -> dict[str, Any]:
        return {name: self.codes[name][form] for name, form in formats.items()}

    def kl(self, weights: dict[str, Any], ids: torch.Tensor) -> float:
        """KL from whole runs of the model: the definition."""
        changed = copy.deepcopy(self.bundle.model)
        with torch.no_grad():
            for name, weight in weights.items():
                changed.get_submodule(name).weight.copy_(weight.dequantize())
            log_p, log_q = (model(input_ids=ids).logits.log_softmax(-1) for model in (self.bundle.model, changed))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.fixture
def case(tiny_bundle: Callable[..., Any]) -> Case:
    return Case(tiny_bundle(num_hidden_layers=3))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_measured_costs_are_the_kl_of_the_changed_model(family: str, tiny_bundle: Callable[..., Any]) -> None:
    case = Case(tiny_bundle(family))
    found = kl_sensitivities(JointKL(case.blocks, case.ids), case.codes)
    for name in (case.bundle.anatomy.linear_names()[0], case.bundle.anatomy.linear_names()[-1]):
        largest = case.choices[name][0]
        expected = case.kl({name: case.codes[name][largest]}, case.ids)
        assert found.costs[name][largest] == pytest.approx(expected, rel=1e-4)
    joint = case.codes_of(case.uniform(4))
    assert JointKL(case.blocks, case.ids).of(joint) == pytest.approx(case.kl(joint, case.ids), rel=1e-4)


def test_costs_around_a_plan_know_their_context(case: Case) -> None:
    probe, base = JointKL(case.blocks, case.ids), case.codes_of(case.uniform(4))
    name = case.bundle.anatomy.linear_names()[8]
    form = case.uniform(2)[name]
    around = probe.around({name: {form: case.codes[name][form]}}, base)
    assert around[name][form] == pytest.approx(case.kl({**base, name: case.codes[name][form]}, case.ids), rel=1e-4)


def test_small_costs_are_measured_on_fewer_windows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.quantize.joint_kl._BATCH_TOKENS", 64)
    tokens: list[int] = []
    sums = JointKL._sums
    monkeypatch.setattr(JointKL, "_sums", lambda self, behind, b: tokens.append(len(behind)) or sums(self, behind, b))
    probe = JointKL(case.blocks, case.ids)
    monkeypatch.setattr("dwindle.quantize.joint_kl._SMALL", 0.0)
    exact = probe.around(case.codes)
    whole = sum(tokens)
    tokens.clear()
    monkeypatch.setattr("dwindle.quantize.joint_kl._SMALL", 1.0)
    saved = probe.around(case.codes)
    assert sum(tokens) < 0.9 * whole
    for name, costs in exact.items():
        assert saved[name] == pytest.approx(costs, rel=0.5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_second_order_costs_approach_the_measured_ones(family: str, tiny_bundle: Callable[..., Any]) -> None:
    case = Case(tiny_bundle(family, initializer_range=0.05), bits=(3, 4))
    ids = torch.randint(0, 256, (256, 16), generator=torch.Generator().manual_seed(6))
    fisher = fisher_sensitivities(case.blocks, ids, case.choices, case.coder)
    measured = kl_sensitivities(JointKL(case.blocks, ids[:64]), case.codes)
    assert fisher.in_nats
    for bits in (3, 4):
        plan = case.uniform(bits)
        assert fisher.total(plan) == pytest.approx(measured.total(plan), rel=0.25)
    logs = torch.tensor([[found.costs[name][form] for name, forms in case.choices.items() for form in forms]
                         for found in (fisher, measured)]).log()  # fmt: skip
    assert torch.corrcoef(logs)[0, 1] > 0.95


def test_second_order_costs_are_products_with_the_gradient_of_a_window(case: Case) -> None:
    """By the definition, through autograd on the whole model and its weights."""
    ids, name = case.ids[:3], "model.layers.1.mlp.down_proj"
    found = fisher_sensitivities(case.blocks, ids, {name: case.choices[name]}, case.coder, seed=4)
    weight = case.bundle.model.get_submodule(name).weight
    with torch.no_grad():
        shares = case.bundle.model(input_ids=ids).logits.softmax(-1).flatten(0, 1)
    labels = torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(4)).view(ids.shape)
    expected = dict.fromkeys(case.choices[name], 0.0)
    for window, wanted in zip(ids, labels, strict=True):
        logits = case.bundle.model(input_ids=window[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        slope = torch.autograd.grad(loss, weight)[0]
        for form in expected:
            error = case.codes[name][form].dequantize() - case.weight(name)
            expected[form] += 0.5 * float((slope * error).sum()) ** 2 / ids.numel()
    assert found.costs[name] == pytest.approx(expected, rel=0.02)


def test_a_streamed_checkpoint_gives_the_same_costs(case: Case, tmp_path: Path) -> None:
    case.bundle.save(tmp_path / "model")
    streamed = StreamedBlocks(tmp_path / "model")
    found = fisher_sensitivities(streamed, case.ids, case.choices, case.coder)
    expected = fisher_sensitivities(case.blocks, case.ids, case.choices, case.coder)
    assert list(found.costs) == list(expected.costs)
    for name, costs in expected.costs.items():
        assert found.costs[name] == pytest.approx(costs, rel=1e-3)


@pytest.mark.parametrize("scheme", ["integer", "palettize"])
def test_errors_need_no_data_and_may_be_sampled(
    scheme: str, tiny_bundle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tiny_bundle(hidden_size=64, intermediate_size=128), scheme)
    found = error_sensitivities(case.choices, case.weight, case.coder)
    assert not found.in_nats
    for name, costs in found.costs.items():
        dense = case.weight(name)
        for form, cost in costs.items():
            error = (case.codes[name][form].dequantize() - dense).square().sum() / dense.square().sum()
            assert cost == pytest.approx(float(error), rel=1e-4)
    monkeypatch.setattr("dwindle.quantize.sensitivity._SAMPLED_FROM", 1)
    sampled = error_sensitivities(case.choices, case.weight, case.coder)
    for name, costs in found.costs.items():
        assert sampled.costs[name] == pytest.approx(costs, rel=0.5)
    assert sampled.costs != found.costs


def test_a_weight_of_zeros_costs_nothing(case: Case) -> None:
    name, forms = next(iter(case.choices.items()))
    found = error_sensitivities({name: forms}, lambda _: torch.zeros(case.shapes[name]), case.coder)
    assert set(found.costs[name].values()) == {0.0}


def test_choices_cover_bits_and_groups_that_divide(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle(intermediate_size=48)
    plan = plan_layers(bundle, QuantizeOptions(keep_float=("*.o_proj",)))
    shapes = ModelShapes.of(bundle).shapes
    found = layer_choices(plan, shapes, bundle.anatomy.linear_names(), (2, 4), (8, 32))
    assert not any("o_proj" in name for name in found)
    sizes = {name: {form.group_size for form in forms} for name, forms in found.items()}
    assert sizes["model.layers.0.self_attn.q_proj"] == {8, 16, 32}
    assert sizes["model.layers.0.mlp.up_proj"] == {8, 16}
    assert {form.bits for form in found["model.layers.0.mlp.up_proj"]} == {2, 4}


def test_the_curve_passes_its_anchors() -> None:
    anchors = [(0.01, 0.02), (0.1, 0.15), (1.0, 3.0)]
    curve = JointCurve.through([*reversed(anchors), (0.0, 0.0)])
    assert [curve.joint(total) for total, _ in anchors] == pytest.approx([joint for _, joint in anchors])
    assert curve.joint(0.005) == pytest.approx(0.01)
    assert 0.02 < curve.joint(0.03) < 0.15
    assert curve.joint(2.0) > 3.0
    assert JointCurve().joint(0.3) == 0.3
    assert JointCurve.through([(0.5, 1.0), (0.5, 1.0)]).joint(1.0) == 1.0


def test_the_plan_found_keeps_its_budget_and_beats_uniform_bits(case: Case) -> None:
    probe, judge = JointKL(case.blocks, case.ids[:8]), JointKL(case.blocks, case.ids[8:])
    measured = kl_sensitivities(probe, case.codes)
    choices = measured.choices(case.shapes)
    linears = sum(case.shapes[name][0] * case.shapes[name][1] for name in choices)
    uniform = case.uniform(4)
    budget = sum(form.stored_bits(case.shapes[name]) for name, form in uniform.items())
    Target(linears, bits_per_weight=budget / linears).require_reachable(*reachable_bits(choices))
    found = search_plan(measured, case.codes, case.shapes, budget, probe, judge)
    assert sum(form.stored_bits(case.shapes[name]) for name, form in found.formats.items()) <= budget
    assert found.measured_kl <= judge.of(case.codes_of(uniform)) * 1.01
    assert found.measured_kl == pytest.approx(case.kl(found.weights(case.codes), case.ids[8:]), rel=1e-4)
    assert found.predicted_kl == pytest.approx(found.measured_kl, rel=0.5)
    again = search_plan(measured, case.codes, case.shapes, budget, probe, judge)
    assert again == found


def test_the_curve_goes_through_uniform_plans(case: Case) -> None:
    judge = JointKL(case.blocks, case.ids)
    measured = kl_sensitivities(judge, case.codes)
    curve = joint_curve(measured, case.codes, judge)
    assert len(curve.anchors) == len(BITS)
    uniform = case.uniform(4)
    assert curve.joint(measured.total(uniform)) == pytest.approx(judge.of(case.codes_of(uniform)))


def test_a_total_sums_one_cost_per_linear() -> None:
    two, four = LayerFormat("a", "palettize", 2, 16), LayerFormat("a", "palettize", 4, 16)
    found = Sensitivities("fisher", {"a": {two: 3.0, four: 1.0}, "b": {two: 30.0}})
    assert found.total({"a": four, "b": two}) == 31.0
