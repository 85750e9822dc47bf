from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.anatomy import module
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.prune import KeepPlan, PruneOptions, apply, plan, run
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"]
IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(4))


def calibration_of(bundle: Any, windows: int = 6, tokens: int = 16) -> TokenSet:
    ids = torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(9))
    return TokenSet(ids, "calibration", "random", "0", 1, encoding_sha256(bundle.tokenizer))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def masked_logits(bundle: Any, keep: KeepPlan) -> torch.Tensor:
    """Logits of the full model with the activations of the removed units set to zero."""
    hooks = []
    for layer, units in enumerate(keep.ffn_units):
        mask = torch.zeros(keep.ffn_width)
        mask[list(units)] = 1
        down = module(bundle.model, bundle.anatomy.parts(layer)["down"])
        hooks.append(down.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,)))
    try:
        return logits_of(bundle.model)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["activation", "magnitude"])
def test_the_pruned_model_is_the_masked_one(tiny_bundle: Any, tmp_path: Path, family: str, method: Any) -> None:
    from transformers import AutoModelForCausalLM

    bundle = tiny_bundle(family)
    before = logits_of(bundle.model)
    options = PruneOptions(ffn_keep=0.4, method=method, multiple=8)
    keep = plan(bundle, options, calibration_of(bundle))
    pruned, record = run(bundle, options, calibration_of(bundle))
    assert keep.kept_width == 24
    assert torch.allclose(logits_of(pruned.model), masked_logits(bundle, keep), atol=1e-5)
    assert torch.equal(logits_of(bundle.model), before)
    assert record.after.parameters == keep.parameters_after == pruned.size().parameters
    assert record.before.parameters == keep.parameters_before
    assert pruned.anatomy.ffn_width == (24, 24)
    pruned.save(tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation=bundle.model.config._attn_implementation
    ).eval()
    assert torch.equal(logits_of(stock), logits_of(pruned.model))


def test_biases_are_cut_and_counted(tiny_bundle: Any) -> None:
    bundle = tiny_bundle("llama", mlp_bias=True)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if "mlp" in name and name.endswith("bias"):
                parameter.normal_(std=0.3)
    keep = plan(bundle, PruneOptions(method="magnitude"))
    pruned, record = run(bundle, PruneOptions(), keep_plan=keep)
    assert torch.allclose(logits_of(pruned.model), masked_logits(bundle, keep), atol=1e-5)
    assert record.after.parameters == keep.parameters_after
    assert record.details["plan"]["method"] == "magnitude"


def test_teacher_and_student_share_no_weights(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    pruned, _ = run(bundle, PruneOptions(method="magnitude"))
    places = {p.data_ptr() for p in bundle.model.parameters()}
    assert not places & {p.data_ptr() for p in pruned.model.parameters()}
    head, embedding = pruned.model.get_output_embeddings(), pruned.model.get_input_embeddings()
    assert head.weight is embedding.weight


def test_keeping_all_changes_nothing(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    pruned, _ = run(bundle, PruneOptions(ffn_keep=1.0, method="magnitude"))
    assert torch.equal(logits_of(pruned.model), logits_of(bundle.model))


def test_the_result_equals_its_file(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = tiny_bundle(storage_dtype=torch.float16)
    pruned, record = run(bundle, PruneOptions(), calibration_of(bundle))
    pruned.save(tmp_path / "model")
    assert torch.equal(logits_of(ModelBundle.load(tmp_path / "model").model), logits_of(pruned.model))
    assert record.after.bytes == 2 * record.after.parameters
    assert pruned.lineage.steps[-1] == "prune"


def test_a_quantized_model_is_refused(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle()
    keep = plan(bundle, PruneOptions(method="magnitude"))
    monkeypatch.setattr(ModelBundle, "quantized", property(lambda _: True))
    with pytest.raises(RecipeError, match="Prune first, then quantize"):
        plan(bundle, PruneOptions(method="magnitude"))
    with pytest.raises(RecipeError, match="Prune first, then quantize"):
        apply(bundle, keep)


def test_a_plan_of_another_model_is_refused(tiny_bundle: Any) -> None:
    keep = plan(tiny_bundle(), PruneOptions(method="magnitude"))
    with pytest.raises(RecipeError, match=r"2 layers of 64 FFN units, the model has 2 of 96"):
        apply(tiny_bundle(intermediate_size=96), keep)
