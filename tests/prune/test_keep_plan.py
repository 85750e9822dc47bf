from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.anatomy import module
from dwindle.errors import DataError, RecipeError
from dwindle.prune import KeepPlan, PruneOptions, plan
from dwindle.prune.scores import activation_scores, magnitude_scores
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

EXAMPLE = KeepPlan("magnitude", 4, ((0, 2), (1, 3)), parameters_before=100, parameters_after=60, kept_score=(0.7, 0.8))


def calibration_of(bundle: Any, windows: int = 5, tokens: int = 12, role: Any = "calibration") -> TokenSet:
    ids = torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(9))
    return TokenSet(ids, role, "random", "0", 1, encoding_sha256(bundle.tokenizer))


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_activation_scores_are_the_formula(tiny_bundle: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle(family)
    calibration = calibration_of(bundle)
    seen: list[torch.Tensor] = []
    down = module(bundle.model, bundle.anatomy.parts(1)["down"])
    hook = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        bundle.model(calibration.ids)
    hook.remove()
    expected = seen[0].abs().mean(dim=1).norm(p=2, dim=0)
    monkeypatch.setattr("dwindle.prune.scores._BATCH_TOKENS", 24)
    found = activation_scores(bundle, calibration)
    assert len(found) == 2
    assert torch.allclose(found[1], expected, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_magnitude_scores_are_the_norm_of_a_units_weights(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    parts = bundle.anatomy.parts(0)
    down = module(bundle.model, parts["down"]).weight.double()
    if family == "phi3":
        gate, up = module(bundle.model, parts["gate_up"]).weight.double().chunk(2)
    else:
        gate, up = (module(bundle.model, parts[p]).weight.double() for p in ("gate", "up"))
    expected = torch.stack([torch.cat([gate[j], up[j], down[:, j]]).norm() for j in range(64)])
    assert torch.allclose(magnitude_scores(bundle)[0], expected)


def test_the_highest_scores_stay(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    keep = plan(bundle, PruneOptions(ffn_keep=0.5), calibration_of(bundle))
    for layer, scores in enumerate(activation_scores(bundle, calibration_of(bundle))):
        units = list(keep.ffn_units[layer])
        assert units == sorted(scores.topk(32).indices.tolist())
        assert keep.kept_score[layer] == pytest.approx(float(scores[units].sum() / scores.sum()))


def test_a_dead_layer_loses_nothing(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    with torch.no_grad():
        module(bundle.model, bundle.anatomy.parts(0)["up"]).weight.zero_()
    keep = plan(bundle, PruneOptions(), calibration_of(bundle))
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
    assert PruneOptions(ffn_keep=keep, multiple=multiple).width(width) == expected


def test_json_round_trip(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["kind"] == "keep_plan"
    assert KeepPlan.from_json(data) == EXAMPLE
    assert EXAMPLE.kept_width == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "bit_plan"}, "no keep plan"),
        ({"extra": 1}, "no keep plan"),
        ({"ffn_units": [[0, 2], [3, 1]]}, r"layer 1 \(not ascending"),
        ({"ffn_units": [[0, 4], [-1, 1]]}, r"layer 0 \(index 4 of 4\), layer 1"),
        ({"ffn_units": [[0, 1], [1]]}, "different numbers"),
        ({"ffn_units": [[], []]}, "keeps nothing"),
    ],
)
def test_damaged_plans_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        KeepPlan.from_json({**EXAMPLE.to_json(), **change})


def test_an_incomplete_plan_is_refused() -> None:
    data = EXAMPLE.to_json()
    del data["ffn_width"]
    with pytest.raises(RecipeError, match="incomplete"):
        KeepPlan.from_json(data)


def test_bad_options_are_named_at_once() -> None:
    with pytest.raises(RecipeError, match=r"ffn_keep=0.*method='best'.*multiple=0"):
        PruneOptions(ffn_keep=0, method="best", multiple=0)  # type: ignore[arg-type]


def test_plans_that_cannot_be_meant(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    with pytest.raises(RecipeError, match="needs calibration data"):
        plan(bundle, PruneOptions())
    with pytest.raises(RecipeError, match="removes nothing"):
        plan(bundle, PruneOptions(ffn_keep=0.9), calibration_of(bundle))


def test_calibration_data_that_does_not_fit_the_model(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    with pytest.raises(DataError, match="role 'train'"):
        plan(bundle, PruneOptions(), calibration_of(bundle, role="train"))
    with pytest.raises(DataError, match="context is 64"):
        plan(bundle, PruneOptions(), calibration_of(bundle, tokens=65))
    tokens = calibration_of(bundle)
    bundle.tokenizer.add_tokens(["<new>"])
    with pytest.raises(DataError, match="another tokenizer"):
        plan(bundle, PruneOptions(), tokens)
