from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.anatomy import module
from dwindle.errors import DoesNotFit, RecipeError
from dwindle.prune import KeepPlan, PruneOptions, plan
from dwindle.prune.keep_plan import LayerKeep, weights_sha256
from dwindle.prune.plan_table import plan_table
from dwindle.prune.planning import plan_from_scores
from dwindle.prune.scores import AxisScores, activation_scores
from dwindle.prune.shape import Shape
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

SHAPE = Shape("llama", 3, 8, 4, 4, 2, 2, 100, True, 2, "none", False, False, False)
EXAMPLE = KeepPlan(
    "magnitude", "ab", SHAPE, (LayerKeep(0, (0, 2), (1,), 0.7, 0.6), LayerKeep(2, (1, 3), (0,), 0.8, 0.5)), width=6,
    channels=(0, 1, 2, 4, 5, 7), width_score=0.9, layer_scores=(0.5, 0.1, 0.4),
)  # fmt: skip


def calibration_of(bundle: Any, windows: int = 5, tokens: int = 12) -> TokenSet:
    ids = torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(9))
    return TokenSet(ids, "calibration", "random", "0", 1, encoding_sha256(bundle.tokenizer))


def test_without_a_method_each_axis_goes_by_its_own_best(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    calibration = calibration_of(bundle)
    both = plan(bundle, PruneOptions(ffn_keep=0.5, heads_keep=0.5), calibration)
    assert both.method == "fisher (FFN), activation"
    units = plan(bundle, PruneOptions(ffn_keep=0.5, method="fisher"), calibration)
    groups = plan(bundle, PruneOptions(heads_keep=0.5, method="activation"), calibration)
    assert [k.ffn_units for k in both.layers] == [k.ffn_units for k in units.layers]
    assert [k.kv_groups for k in both.layers] == [k.kv_groups for k in groups.layers]
    budget = plan(bundle, PruneOptions(parameters=bundle.size().parameters * 4 // 5), calibration)
    assert groups.method == budget.method == "activation"


def test_the_highest_scores_stay(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    keep = plan(bundle, PruneOptions(ffn_keep=0.5, method="activation"), calibration_of(bundle))
    for layer, scores in enumerate(activation_scores(bundle, calibration_of(bundle))):
        units = list(keep.ffn_units[layer])
        assert units == sorted(scores.topk(32).indices.tolist())
        assert keep.kept_score[layer] == pytest.approx(float(scores[units].sum() / scores.sum()))


def test_given_scores_decide(tiny_bundle: Any) -> None:
    bundle = tiny_bundle(num_hidden_layers=3)
    first = torch.arange(64).double()
    scores = AxisScores(
        ffn=[first, first.flip(0), first], groups=[torch.tensor([1.0, 2.0]).double()] * 3,
        channels=torch.arange(32).double().flip(0), layers=torch.tensor([1.0, 3.0, 1.0]).double(),
    )  # fmt: skip
    shares = {"ffn_keep": 0.5, "heads_keep": 0.5, "width_keep": 0.5, "layers_keep": 0.6}
    keep = plan_from_scores(bundle, PruneOptions(**shares, multiple=16), scores)  # type: ignore[arg-type]
    assert [one.layer for one in keep.layers] == [0, 1]
    assert keep.ffn_units == (tuple(range(32, 64)), tuple(range(32)))
    assert keep.kv_groups == ((1,), (1,))
    assert keep.channels == tuple(range(16))
    assert keep.layers[0].kv_score == pytest.approx(2 / 3)
    assert keep.layer_scores == (1.0, 3.0, 1.0)


def test_a_dead_layer_loses_nothing(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    with torch.no_grad():
        module(bundle.model, bundle.anatomy.parts(0)["up"]).weight.zero_()
    keep = plan(bundle, PruneOptions(ffn_keep=0.5), calibration_of(bundle))
    assert keep.kept_score[0] == 1.0
    assert keep.ffn_units[0] == tuple(range(32))


@pytest.mark.parametrize(
    ("keep", "multiple", "width", "expected"),
    [
        (0.5, 32, 172, 96),
        (0.34, 32, 768, 256),
        (0.01, 32, 768, 32),
        (0.9, 32, 20, 20),
        (0.5, 1, 9, 4),
        (1.0, 32, 172, 172),
    ],
)
def test_widths_are_rounded(keep: float, multiple: int, width: int, expected: int) -> None:
    assert PruneOptions(multiple=multiple).rounded(keep, width) == expected


def test_json_round_trip(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["kind"] == "keep_plan"
    assert data["parameters_after"] == EXAMPLE.parameters_after
    assert KeepPlan.from_json(data) == EXAMPLE
    assert EXAMPLE.kept_width == 2


def test_an_edited_plan_is_counted_again() -> None:
    data = json.loads(json.dumps(EXAMPLE.to_json()))
    for layer in data["layers"]:
        layer["ffn_units"] = [0, 1, 3]
    edited = KeepPlan.from_json(data)
    assert edited.kept_width == 3
    assert edited.parameters_after == EXAMPLE.parameters_after + 2 * 3 * 6  # 2 layers, 3 weights a unit per channel


def test_the_table_shows_every_layer() -> None:
    first, header, *rows = plan_table(EXAMPLE).splitlines()
    assert "layers 3 -> 2, hidden width 8 -> 6 (90.0%)" in first
    assert f"{EXAMPLE.parameters_before:,} -> {EXAMPLE.parameters_after:,}" in first
    assert header.split() == ["layer", "FFN", "units", "KV", "groups", "layer", "score"]
    assert rows[0].split() == ["0", "4", "->", "2", "(70.0%)", "2", "->", "1", "(60.0%)", "0.5"]
    assert rows[1].split() == ["1", "dropped", "dropped", "0.1"]
    assert len(rows) == 3


def test_the_table_of_a_turned_width() -> None:
    turned = KeepPlan("activation", "ab", SHAPE, (LayerKeep(0), LayerKeep(1), LayerKeep(2)), width=4, rotated=True)
    first, _, row, *_ = plan_table(turned).splitlines()
    assert "along principal axes" in first
    assert row.split() == ["0", "4", "2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "bit_plan"}, "no keep plan"),
        ({"schema": 1}, "no keep plan of schema 2"),
        ({"extra": 1}, "no keep plan"),
        ({"layers": [{"layer": 0, "ffn_units": [2, 0]}]}, r"layer 0 ffn_units \(not ascending"),
        ({"layers": [{"layer": 0, "kv_groups": [0, 2]}]}, r"layer 0 kv_groups \(index 2 of 2\)"),
        ({"layers": [{"layer": 0, "kv_groups": [-1]}]}, r"index -1 of 2"),
        ({"layers": [{"layer": 0, "kv_groups": ["a"]}]}, "no whole numbers"),
        ({"layers": [{"layer": 0, "ffn_units": [0]}, {"layer": 1}]}, r"different numbers of ffn_units \[1, 4\]"),
        ({"layers": [{"layer": 0, "ffn_units": []}]}, "keeps nothing"),
        ({"layers": []}, r"layers \(keeps nothing\)"),
        ({"layers": [{"layer": 1}, {"layer": 0}]}, r"layers \(not ascending"),
        ({"layers": [{"layer": 3}]}, r"layers \(index 3 of 3\)"),
        ({"channels": [0, 1]}, "width=6 and rotated=False beside 2 channels"),
        ({"channels": None}, "width=6 of 8 without channels"),
        ({"channels": None, "rotated": True, "width": 9}, "width=9 of 8"),
        ({"layers": [{"leyer": 1}]}, "damaged"),
        ({"shape": {}}, "damaged"),
    ],
)
def test_damaged_plans_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        KeepPlan.from_json({**EXAMPLE.to_json(), **change})


def test_an_incomplete_plan_is_refused() -> None:
    data = EXAMPLE.to_json()
    del data["width"]
    with pytest.raises(RecipeError, match="incomplete"):
        KeepPlan.from_json(data)
    with pytest.raises(RecipeError, match=r"no keep plan.*list"):
        KeepPlan.from_json([])  # type: ignore[arg-type]


def test_bad_options_are_named_at_once() -> None:
    wrong: dict[str, Any] = {
        "ffn_keep": 0, "heads_keep": 1.5, "width_keep": -1, "layers_keep": 2, "parameters": 0, "bytes": -3,
        "method": "best", "depth_method": "worst", "damping": 1.0, "multiple": 0,
    }  # fmt: skip
    with pytest.raises(RecipeError) as found:
        PruneOptions(**wrong)
    for name in wrong:
        assert f"{name}=" in str(found.value)


def test_plans_that_cannot_be_meant(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    with pytest.raises(RecipeError, match="method='activation' needs calibration data"):
        plan(bundle, PruneOptions(ffn_keep=0.5))
    with pytest.raises(RecipeError, match=r"layers_keep=0.5, rotate, a budget needs calibration"):
        plan(bundle, PruneOptions(method="magnitude", layers_keep=0.5, width_keep=0.5, rotate=True, parameters=9))
    with pytest.raises(RecipeError, match=r"ffn_keep=0.9 of 64, heads_keep=0.9 of 2, rounded.*removes nothing"):
        plan(bundle, PruneOptions(ffn_keep=0.9, heads_keep=0.9), calibration_of(bundle))
    with pytest.raises(RecipeError, match=r"prune: heads_keep=0.9 of 2, rounded.*removes nothing"):
        plan(bundle, PruneOptions(ffn_keep=0.5, heads_keep=0.9), calibration_of(bundle))
    with pytest.raises(RecipeError, match="nothing to cut is named"):
        plan(bundle, PruneOptions(), calibration_of(bundle))


def test_the_hash_is_that_of_the_weights(tiny_bundle: Any, tmp_path: Path) -> None:
    from dwindle.bundle import ModelBundle

    bundle = tiny_bundle(storage_dtype=torch.bfloat16)
    bundle.save(tmp_path / "model")
    assert weights_sha256(ModelBundle.load(tmp_path / "model")) == weights_sha256(bundle)
    assert weights_sha256(tiny_bundle(seed=1)) != weights_sha256(tiny_bundle())


@pytest.mark.parametrize("unit", ["parameters", "bytes"])
def test_a_budget_is_met_by_the_cheapest_steps(tiny_bundle: Any, unit: str) -> None:
    bundle = tiny_bundle(num_hidden_layers=4, storage_dtype=torch.float16)
    calibration = calibration_of(bundle)
    whole = bundle.size().parameters
    limit = whole * 2 // 3
    budget: dict[str, Any] = {unit: limit if unit == "parameters" else 2 * limit}
    keep = plan(bundle, PruneOptions(**budget, multiple=8), calibration)
    assert whole * 0.5 < keep.parameters_after <= limit
    assert keep == plan(bundle, PruneOptions(**budget, multiple=8), calibration)
    with pytest.raises(DoesNotFit, match=r"cannot be reached; the smallest is .* 8 FFN units, 1 KV groups, 1 layers"):
        plan(bundle, PruneOptions(parameters=100, multiple=8), calibration)


def test_a_budget_spares_the_axis_that_scores(tiny_bundle: Any) -> None:
    """With all FFN score in a few units, units go before groups and layers."""
    bundle = tiny_bundle()
    ffn = torch.zeros(64).double()
    ffn[:8] = 1
    scores = AxisScores([ffn, ffn], [torch.ones(2).double()] * 2, None, torch.ones(2).double())
    limit = bundle.size().parameters - 2 * 3 * 32 * 50
    keep = plan_from_scores(bundle, PruneOptions(parameters=limit, multiple=8), scores)
    assert keep.after.ffn_width == 8
    assert (keep.after.kv_heads, keep.after.layers) == (2, 2)
    assert keep.parameters_after <= limit
