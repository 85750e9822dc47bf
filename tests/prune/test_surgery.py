from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.prune import KeepPlan, PruneOptions, apply, plan, run
from dwindle.prune.keep_plan import LayerKeep, weights_sha256
from dwindle.prune.shape import Shape
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(4))
HALF = PruneOptions(ffn_keep=0.5, method="magnitude")


def calibration_of(bundle: Any, windows: int = 6, tokens: int = 16) -> TokenSet:
    ids = torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(9))
    return TokenSet(ids, "calibration", "random", "0", 1, encoding_sha256(bundle.tokenizer))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_teacher_and_student_share_no_weights(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    pruned, _ = run(bundle, HALF)
    places = {p.data_ptr() for p in bundle.model.parameters()}
    assert not places & {p.data_ptr() for p in pruned.model.parameters()}
    head, embedding = pruned.model.get_output_embeddings(), pruned.model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert all(parameter.device.type == "cpu" for parameter in pruned.model.parameters())
    assert all(parameter.requires_grad for parameter in pruned.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "olmo2"])
def test_keeping_all_changes_nothing(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    layers = tuple(LayerKeep(layer) for layer in range(bundle.anatomy.layers))
    keep = KeepPlan("hand", weights_sha256(bundle), Shape.of(bundle.anatomy), layers, width=32)
    pruned, record = run(bundle, PruneOptions(), keep_plan=keep)
    assert torch.equal(logits_of(pruned.model), logits_of(bundle.model))
    assert record.skipped == ()
    assert record.details["removed"] == 0


def test_turning_all_of_the_width_changes_nothing_but_rounding(tiny_bundle: Any) -> None:
    bundle = tiny_bundle("qwen3", tie_word_embeddings=False)
    keep = KeepPlan(
        "hand", weights_sha256(bundle), Shape.of(bundle.anatomy), (LayerKeep(0), LayerKeep(1)), width=32, rotated=True
    )
    pruned, _ = run(bundle, PruneOptions(), calibration_of(bundle), keep_plan=keep)
    assert torch.allclose(logits_of(pruned.model), logits_of(bundle.model), atol=2e-5)


def test_the_result_equals_its_file(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = tiny_bundle(storage_dtype=torch.float16)
    pruned, record = run(bundle, PruneOptions(ffn_keep=0.5), calibration_of(bundle))
    pruned.save(tmp_path / "model")
    assert torch.equal(logits_of(ModelBundle.load(tmp_path / "model").model), logits_of(pruned.model))
    assert record.after.bytes == 2 * record.after.parameters
    assert pruned.lineage.steps[-1] == "prune"


def test_the_result_generates_and_trains(tiny_bundle: Any) -> None:
    bundle = tiny_bundle("gemma3_text", num_hidden_layers=2)
    options = PruneOptions(ffn_keep=0.5, heads_keep=0.5, layers_keep=0.5, width_keep=0.75, multiple=8)
    pruned, _ = run(bundle, options, calibration_of(bundle))
    made = pruned.model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    logits = logits_of(pruned.model)
    assert made.shape[1] > 20
    assert made[0, 20] == logits[0, -1].argmax()
    pruned.model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in pruned.model.parameters())


def test_a_quantized_model_is_refused(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle()
    keep = plan(bundle, HALF)
    monkeypatch.setattr(ModelBundle, "quantized", property(lambda _: True))
    with pytest.raises(RecipeError, match="Prune first, then quantize"):
        plan(bundle, HALF)
    with pytest.raises(RecipeError, match="Prune first, then quantize"):
        apply(bundle, keep)
    with pytest.raises(RecipeError, match="Prune first, then quantize"):
        run(bundle, HALF, keep_plan=keep)


def test_a_plan_of_another_model_is_refused(tiny_bundle: Any) -> None:
    keep = plan(tiny_bundle(), HALF)
    with pytest.raises(RecipeError, match=r"another model \(ffn_width 64 where the model has 96\)"):
        apply(tiny_bundle(intermediate_size=96), keep)
    with pytest.raises(RecipeError, match="another model"):
        apply(tiny_bundle("mistral"), keep)
    with pytest.raises(RecipeError, match="made for the model with the weights"):
        apply(tiny_bundle(seed=1), keep)
    with pytest.raises(RecipeError, match="made for the model with the weights"):
        run(tiny_bundle(seed=1), HALF, keep_plan=keep)


def test_a_turned_plan_needs_data(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    keep = plan(bundle, PruneOptions(width_keep=0.5, rotate=True, multiple=8), calibration_of(bundle))
    with pytest.raises(RecipeError, match="turns the hidden width, which needs calibration"):
        run(bundle, PruneOptions(), keep_plan=keep)
    with pytest.raises(RecipeError, match="turns the hidden width, which needs calibration"):
        apply(bundle, keep)
