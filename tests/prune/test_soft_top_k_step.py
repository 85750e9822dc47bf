"""`method: soft_top_k` as a step: masks are trained, the plan and the cut follow from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle import prune
from dwindle.errors import RecipeError
from dwindle.prune.masks import train_masks
from dwindle.prune.options import PruneOptions
from dwindle.prune.planning import plan, plan_by_masks
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

Factory = Callable[..., Any]
MASKS = prune.MaskOptions(steps=6, batch_size=4, checkpoint_every=2, log_every=1)


def options(**changes: Any) -> PruneOptions:
    return PruneOptions(**{"ffn_keep": 0.5, "method": "soft_top_k", "masks": MASKS} | changes)


def tokens_of(bundle: Any, role: Any = "train", windows: int = 24) -> TokenSet:
    seed = {"train": 9, "calibration": 10}[role]
    ids = torch.randint(0, 256, (windows, 17), generator=torch.Generator().manual_seed(seed))
    return TokenSet(ids, role, "random", role, 1, encoding_sha256(bundle.tokenizer))


def logits_of(bundle: Any) -> torch.Tensor:
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return bundle.model(input_ids=ids).logits


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_the_step_keeps_the_units_of_the_masks(tiny_bundle: Factory, family: str) -> None:
    bundle = tiny_bundle(family)
    train, calibration = tokens_of(bundle), tokens_of(bundle, "calibration")
    pruned, record = prune.run(bundle, options(), calibration, train=train)
    assert pruned.anatomy.ffn_width == (32, 32)
    learned = train_masks(bundle, {"ffn": 0.5}, train, MASKS)
    layers = record.details["plan"]["layers"]
    assert [list(layer["ffn_units"]) for layer in layers] == [units.tolist() for units in learned.units["ffn"]]
    assert record.details["method"] == "soft_top_k"
    assert (record.details["steps"], record.details["tokens"]) == (6, 6 * 4 * 17)
    assert record.details["refitted_linears"] == 2
    assert [line["step"] for line in record.details["history"]][-1] == 6
    assert 0.5 < layers[0]["ffn_score"] <= 1
    assert pruned.lineage.entries[-1].inputs["train"] == "train"
    json.dumps(record.to_json())


def test_a_plan_made_alone_is_the_step_s(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    train, calibration = tokens_of(bundle), tokens_of(bundle, "calibration")
    made = plan(bundle, options(), calibration, train)
    whole, _ = prune.run(bundle, options(), calibration, train=train)
    applied, record = prune.run(bundle, options(), calibration, keep_plan=prune.KeepPlan.from_json(made.to_json()))
    assert torch.equal(logits_of(whole), logits_of(applied))
    assert "steps" not in record.details


def test_weights_that_learn_along_are_what_is_cut(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    train, calibration = tokens_of(bundle), tokens_of(bundle, "calibration")
    chosen = options(masks=prune.MaskOptions(steps=6, batch_size=4, weight_rate=1e-2))
    before = logits_of(bundle)
    pruned, record = prune.run(bundle, chosen, calibration, train=train)
    assert record.details["refitted_linears"] == 0
    assert [skipped.what for skipped in record.skipped] == ["compensation"]
    assert torch.equal(logits_of(bundle), before)
    learned = plan_by_masks(bundle, chosen, calibration, train)
    units = torch.tensor(learned.plan.ffn_units[0])
    trained = learned.bundle.model.get_submodule("model.layers.0.mlp.down_proj").weight[:, units]
    assert torch.equal(pruned.model.get_submodule("model.layers.0.mlp.down_proj").weight, trained)
    assert not torch.equal(trained, bundle.model.get_submodule("model.layers.0.mlp.down_proj").weight[:, units])
    with pytest.raises(RecipeError, match=r"weight_rate=0\.01 trains weights that a plan cannot hold"):
        plan(bundle, chosen, calibration, train)


def test_groups_learn_too_and_the_rest_is_told(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)
    chosen = options(heads_keep=0.5, width_keep=0.5, layers_keep=0.67, multiple=16)
    pruned, record = prune.run(bundle, chosen, tokens_of(bundle, "calibration"), train=tokens_of(bundle))
    assert (pruned.anatomy.kv_heads, pruned.anatomy.layers, pruned.anatomy.width) == (2, 2, 16)
    learned = train_masks(bundle, {"ffn": 0.5, "kv_groups": 0.5}, tokens_of(bundle), MASKS)
    for layer in record.details["plan"]["layers"]:
        assert list(layer["kv_groups"]) == learned.units["kv_groups"][layer["layer"]].tolist()
    told = {skipped.what: skipped.why for skipped in record.skipped}
    assert "principal axes" in told["learned masks of the hidden width"]
    assert "depth_method" in told["learned masks of layers"]


def test_a_budget_says_how_many_the_masks_keep(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    size = bundle.size().parameters
    chosen = PruneOptions(method="soft_top_k", ffn_keep=0.75, parameters=round(0.8 * size), masks=MASKS, multiple=8)
    pruned, _ = prune.run(bundle, chosen, tokens_of(bundle, "calibration"), train=tokens_of(bundle))
    assert pruned.size().parameters <= 0.8 * size


def test_an_interrupted_training_goes_on(tiny_bundle: Factory, tmp_path: Path) -> None:
    bundle = tiny_bundle()
    train, calibration = tokens_of(bundle), tokens_of(bundle, "calibration")
    whole, _ = prune.run(bundle, options(), calibration, train=train)

    def stop(line: Any) -> None:
        if line.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune.run(bundle, options(), calibration, train=train, folder=tmp_path, on_step=stop)
    resumed, record = prune.run(bundle, options(), calibration, train=train, folder=tmp_path)
    assert torch.equal(logits_of(whole), logits_of(resumed))
    assert record.details["steps"] == 6


def test_without_calibration_the_masks_start_from_the_training_text(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    pruned, record = prune.run(bundle, options(), train=tokens_of(bundle))
    assert pruned.anatomy.ffn_width == (32, 32)
    assert [skipped.what for skipped in record.skipped] == ["compensation"]


def test_what_masks_cannot_choose_is_refused(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    calibration = tokens_of(bundle, "calibration")
    with pytest.raises(RecipeError, match="needs training data"):
        prune.run(bundle, options(), calibration)
    with pytest.raises(RecipeError, match="none are cut here"):
        prune.run(bundle, options(ffn_keep=1.0, layers_keep=0.5), calibration, train=tokens_of(bundle))
    with pytest.raises(RecipeError, match="masks beside method='activation'"):
        options(method="activation")
    assert PruneOptions(masks=prune.MaskOptions(seed=3)).method is None  # a recipe's seed is no request
