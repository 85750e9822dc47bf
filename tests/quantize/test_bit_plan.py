from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dwindle.errors import RecipeError
from dwindle.quantize.bit_plan import BitPlan, rest_of
from dwindle.quantize.bit_search import allocated_formats, search_plan
from dwindle.quantize.layer_plan import LayerFormat, LayerPlan, ModelShapes, plan_layers
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.sensitivity import Sensitivities, layer_choices
from dwindle.quantize.step import run

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


class Known:
    """A tiny model's layer plan, and a bit plan made from costs that fall with the bits."""

    def __init__(self, bundle: Any, scheme: Any = "palettize", **fields: Any) -> None:
        self.bundle = bundle
        self.layers: LayerPlan = plan_layers(bundle, QuantizeOptions(scheme=scheme))
        self.shapes = ModelShapes.of(bundle).shapes
        self.linears = set(bundle.anatomy.linear_names())
        choices = layer_choices(self.layers, self.shapes, bundle.anatomy.linear_names(), (2, 4, 8))
        costs = {name: {f: (1 + n) * 4.0**-f.bits for f in forms} for n, (name, forms) in enumerate(choices.items())}
        budget = 5 * sum(self.shapes[name][0] * self.shapes[name][1] for name in self.linears)
        formats = allocated_formats(costs, self.shapes, budget)
        rest = rest_of(((n, p.numel()) for n, p in bundle.model.named_parameters()), self.layers, self.shapes,
                       self.linears, 32)  # fmt: skip
        self.plan = BitPlan.from_formats(formats, self.shapes, Sensitivities("kl", costs), rest=rest,
                                         predicted_kl=0.25, target_bits_per_weight=5.0, **fields)  # fmt: skip

    def read(self, data: Any) -> BitPlan:
        return BitPlan.from_json(data, self.layers, self.shapes, self.linears)


@pytest.fixture
def known(tiny_bundle: Callable[..., Any]) -> Known:
    return Known(tiny_bundle(), model_sha256="ab", notes=("a note",), measured_kl=0.26)


def row(data: Any, name: str) -> Any:
    return next(entry for entry in data["layers"] if entry["name"] == name)


def test_round_trip(known: Known, tmp_path: Path) -> None:
    known.plan.write(tmp_path / "bits.json")
    back = BitPlan.read(tmp_path / "bits.json", known.layers, known.shapes, known.linears)
    assert back.to_json() == known.plan.to_json()
    assert back.layer_plan(known.layers) == known.plan.layer_plan(known.layers)


def test_the_expected_kl_follows_an_edit_along_the_curve(tiny_bundle: Callable[..., Any]) -> None:
    known = Known(tiny_bundle(), joint_curve=((0.01, 0.02), (10.0, 40.0)))
    data = known.plan.to_json()
    changed = row(data, UP)
    changed["bits"] = 2
    edited = known.read(data)
    before, after = known.plan.expected_kl, edited.expected_kl
    assert before is not None
    assert after is not None
    assert after > before
    total = sum(layer.predicted_kl or 0.0 for layer in edited.layers)
    assert after == pytest.approx(0.02 * (total / 0.01) ** (math.log(2000) / math.log(1000)))
    changed["bits"] = 6  # nobody measured it
    assert known.read(data).expected_kl is None
    assert edited.predicted_kl is None
    data["joint_curve"] = [[1, "two"]]
    with pytest.raises(RecipeError, match="joint_curve is not a list"):
        known.read(data)


def test_costs_that_are_no_nats_are_not_written_as_kl(known: Known) -> None:
    costs = {name: {form: 0.5} for name, form in known.plan.formats.items()}
    plan = BitPlan.from_formats(known.plan.formats, known.shapes, Sensitivities("error", costs))
    assert plan.grade == "error"
    assert all(layer.predicted_kl is None and not layer.alternatives for layer in plan.layers)


def test_sizes_are_those_of_the_packed_model(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("qwen2", tie_word_embeddings=False)
    options = QuantizeOptions(bits=4)
    layers = plan_layers(bundle, options)
    shapes, linears = ModelShapes.of(bundle).shapes, set(bundle.anatomy.linear_names())
    rest = rest_of(((n, p.numel()) for n, p in bundle.model.named_parameters()), layers, shapes, linears, 32)
    plan = BitPlan.from_layer_plan(layers, shapes, linears)
    size = run(bundle, options)[1].after
    found = BitPlan(plan.scheme, plan.layers, rest=rest)
    assert found.model_bytes == size.bytes
    assert found.model_bits_per_weight == pytest.approx(size.bits_per_weight)
    assert found.linear_bits_per_weight == pytest.approx(size.bits_per_weight_linear)


def test_an_edited_file_is_applied_as_it_is(known: Known) -> None:
    data = json.loads(json.dumps(known.plan.to_json()))
    row(data, Q).update(bits=2 if row(data, Q)["bits"] != 2 else 8)
    row(data, UP).update(bits=6, group_size=32)
    plan = known.read(data)
    assert (plan.formats[UP].bits, plan.formats[UP].group_size) == (6, 32)
    q = next(layer for layer in plan.layers if layer.format.name == Q)
    assert q.predicted_kl == next(a["predicted_kl"] for a in row(data, Q)["alternatives"] if a["bits"] == q.format.bits)
    assert next(layer for layer in plan.layers if layer.format.name == UP).predicted_kl is None
    assert plan.predicted_kl is None
    assert plan.measured_kl is None
    assert plan.linear_bits != known.plan.linear_bits


def test_a_file_needs_no_more_than_names_and_bits(known: Known) -> None:
    rows = [{"name": layer.format.name, "bits": 3} for layer in known.plan.layers]
    plan = known.read({"schema": 1, "scheme": "palettize", "layers": rows})
    assert {f.bits for f in plan.formats.values()} == {3}
    assert plan.grade == "none"


def test_every_mistake_is_named_at_once(known: Known) -> None:
    data = json.loads(json.dumps(known.plan.to_json()))
    data["schema"] = 7
    data["scheme"] = "integer"
    row(data, Q).update(bits=5, group_size=7, row_scales="yes", symmetric=False)
    row(data, UP)["name"] = "model.layers.1.mlp.upp_proj"
    data["layers"] += [{"name": "lm_head", "bits": 4}, {"bits": 4}, row(data, Q)]
    with pytest.raises(RecipeError) as error:
        known.read(data)
    for said in (
        "schema is 7 (needed: 1)", "scheme is 'integer' (needed: 'palettize'", f"{Q}: bits is 5 (needed: 1, 2, 3",
        f"{Q}: group_size is 7 (needed: a divisor of its 32 output rows)", f"{Q}: row_scales is 'yes'",
        f"{Q}: symmetric is false, which palettize does not have", f"upp_proj is not a linear that is quantized (did you "
        f"mean '{UP}'?)", "lm_head is not a linear", "layer number 15 has no name", f"{Q} stands there 2 times",
        f"1 layers are missing: {UP}",
    ):  # fmt: skip
        assert said in str(error.value)


@pytest.mark.parametrize("data", [[], {"schema": 1, "scheme": "palettize"}])
def test_what_is_no_plan_is_refused(data: Any, known: Known) -> None:
    with pytest.raises(RecipeError, match=r"no JSON object|layers is not a list"):
        known.read(data)


def test_files_that_cannot_be_read(known: Known, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"bits\.json: cannot be read"):
        BitPlan.read(tmp_path / "bits.json", known.layers, known.shapes, known.linears)
    (tmp_path / "bits.json").write_text("{")
    with pytest.raises(RecipeError, match="is not JSON"):
        BitPlan.read(tmp_path / "bits.json", known.layers, known.shapes, known.linears)
    (tmp_path / "bits.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"bits\.json: 3 mistake"):
        BitPlan.read(tmp_path / "bits.json", known.layers, known.shapes, known.linears)


def test_integers_have_their_own_rules(tiny_bundle: Callable[..., Any]) -> None:
    known = Known(tiny_bundle(), "integer")
    data = known.plan.to_json()
    row(data, Q).update(bits=6, group_size=5, row_scales=True)
    row(data, UP).update(symmetric=False)
    with pytest.raises(RecipeError) as error:
        known.read(data)
    for said in ("3 mistake(s)", "bits is 6 (needed: 2, 3, 4, 8)", "a divisor of its 32 inputs", "row_scales is true"):
        assert said in str(error.value)


def test_the_table_shows_blocks_parts_and_totals(known: Known) -> None:
    lines = known.plan.table().splitlines()
    assert lines[0].split() == ["block", "q", "k", "v", "o", "gate", "up", "down", "bits/weight", "KL", "share"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert int(lines[1].split()[1]) == known.plan.formats[Q].bits
    assert sum(float(line.split()[-1].rstrip("%")) for line in lines[1:3]) == pytest.approx(100, abs=0.2)
    totals = "\n".join(lines[3:])
    for said in ("(target 5)", f"{known.plan.linear_bits_per_weight:.3f} bits per weight",
                 f"{known.plan.model_bytes:,} bytes", "predicted 0.25, measured on held-apart text 0.26", "a note"):  # fmt: skip
        assert said in totals


def test_the_table_names_group_sizes_where_they_differ(known: Known) -> None:
    data = known.plan.to_json()
    row(data, Q).update(bits=4, group_size=32)
    assert " 4/32 " in known.read(data).table()
    by_hand = {"schema": 1, "scheme": "palettize",
               "layers": [{"name": layer.format.name, "bits": 3} for layer in known.plan.layers]}  # fmt: skip
    assert "KL" not in known.read(by_hand).table()


def test_a_plan_that_loses_nothing_is_not_searched_around() -> None:
    forms = [LayerFormat("a", "integer", bits, 32) for bits in (4, 8)]
    costs = Sensitivities("kl", {"a": {forms[0]: 0.2, forms[1]: 0.1}})
    kl = SimpleNamespace(of=lambda _: 0.0, around=lambda near, _: {name: dict.fromkeys(found, 0.0)
                                                                   for name, found in near.items()})  # fmt: skip
    candidates: Any = {"a": dict.fromkeys(forms)}
    found = search_plan(costs, candidates, {"a": (8, 32)}, 10**6, kl, kl)  # type: ignore[arg-type]
    assert (found.formats["a"].bits, found.measured_kl) == (8, 0.0)
