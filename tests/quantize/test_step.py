from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.bundle import ModelBundle
from dwindle.errors import DataError, RecipeError
from dwindle.quantize import QuantizeOptions, run
from dwindle.quantized_model import TiedHead, quantized_weights
from dwindle.report import StepRecord
from dwindle.token_set import TokenSet
from dwindle.weights import AffineWeight, PalettizedWeight

Factory = Callable[..., ModelBundle]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2")


def logits(bundle: ModelBundle) -> torch.Tensor:
    ids = torch.arange(40).view(2, 20) * 7 % bundle.anatomy.vocab
    with torch.inference_mode():
        return bundle.model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["palettize", "integer"])
def test_a_reload_gives_the_logits_of_the_measured_model(
    family: str, scheme: Any, tiny_bundle: Factory, tmp_path: Path
) -> None:
    bundle = tiny_bundle(family, storage_dtype=torch.float16 if scheme == "integer" else torch.bfloat16)
    before = logits(bundle)
    quantized, record = run(bundle, QuantizeOptions(scheme=scheme))
    quantized.save(tmp_path / "model")
    again = ModelBundle.load(tmp_path / "model")
    assert torch.equal(logits(again), logits(quantized))
    assert torch.equal(logits(bundle), before)
    assert again.content_sha256 == quantized.content_sha256
    assert again.storage_dtype == bundle.storage_dtype
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    assert again.size() == record.after
    assert quantized.lineage.steps == (*bundle.lineage.steps, "quantize")


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_every_linear_the_embedding_and_the_head_are_coded_once(family: str, tiny_bundle: Factory) -> None:
    bundle = tiny_bundle(family)
    quantized, record = run(bundle, QuantizeOptions())
    weights = quantized_weights(quantized.model)
    anatomy = bundle.anatomy
    ends = [anatomy.embedding] if anatomy.tied else [anatomy.embedding, anatomy.head]
    assert set(weights) == {*anatomy.linear_names(), *ends}
    assert all(isinstance(weights[name], PalettizedWeight) for name in anatomy.linear_names())
    for name in ends:
        weight = weights[name]
        assert isinstance(weight, AffineWeight)
        assert (weight.bits, weight.group_size, weight.symmetric) == (8, anatomy.width, True)
    assert isinstance(quantized.model.lm_head, TiedHead) is anatomy.tied
    assert record.after.bytes == quantized.size().bytes < record.before.bytes / 4


def test_the_model_computes_with_exactly_the_codes(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("qwen2")
    quantized, _ = run(bundle, QuantizeOptions())
    for name, weight in quantized_weights(quantized.model).items():
        bundle.model.get_submodule(name).weight.data = weight.dequantize()
    bundle.model.tie_weights()
    assert torch.equal(logits(bundle), logits(quantized))


def test_record_has_a_line_per_layer(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("llama")
    _, record = run(bundle, QuantizeOptions(bits=2))
    layers = record.details["layers"]
    assert [layer["name"] for layer in layers] == [*bundle.anatomy.linear_names(), bundle.anatomy.embedding]
    first = layers[0]
    assert first["kind"] == "palettized"
    assert first["bytes"] == 32 * 32 * 2 // 8 + 2 * 4 * 2
    assert first["bits_per_weight"] == pytest.approx(8 * first["bytes"] / 1024)
    assert 0.01 < first["relative_mse"] < 0.2
    assert layers[-1]["relative_mse"] < 1e-3
    assert StepRecord.from_json(json.loads(json.dumps(record.to_json()))).to_json() == record.to_json()


def test_every_layer_that_does_not_divide_is_named(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("llama", intermediate_size=44)
    with pytest.raises(RecipeError) as caught:
        run(bundle, QuantizeOptions(group_size=16))
    assert str(caught.value) == (
        "quantize: 4 of 14 layers have a number of output rows not divisible by group_size=16: "
        "model.layers.0.mlp.gate_proj (44), model.layers.0.mlp.up_proj (44), model.layers.1.mlp.gate_proj (44), "
        "model.layers.1.mlp.up_proj (44). Set group_size to one of 2, 4, tensor, leave it out (each layer then takes "
        "the nearest size that divides it), or list them under quantize.keep_float."
    )
    with pytest.raises(RecipeError, match=r"2 of 14 layers have an input width .* model.layers.1.mlp.down_proj \(44\)"):
        run(bundle, QuantizeOptions(scheme="integer", group_size=32))
    run(bundle, QuantizeOptions())
    run(bundle, QuantizeOptions(group_size="tensor"))
    run(bundle, QuantizeOptions(scheme="integer", group_size="channel"))


def test_keep_float_leaves_a_line_each(tiny_bundle: Factory, tmp_path: Path) -> None:
    bundle = tiny_bundle("llama", intermediate_size=44, storage_dtype=torch.float16)
    quantized, record = run(bundle, QuantizeOptions(keep_float=("*.gate_proj", "model.layers.?.mlp.up_proj")))
    assert len(record.skipped) == 4
    assert record.skipped[0].what == "quantize model.layers.0.mlp.gate_proj"
    assert record.skipped[0].why == "kept in float16: keep_float lists *.gate_proj"
    kept = quantized.model.get_submodule("model.layers.0.mlp.gate_proj").weight
    assert torch.equal(kept, bundle.model.get_submodule("model.layers.0.mlp.gate_proj").weight)
    quantized.save(tmp_path / "model")
    assert torch.equal(logits(ModelBundle.load(tmp_path / "model")), logits(quantized))


@pytest.mark.parametrize("pattern", ["lm_head", "model.embed_tokens"])
def test_a_tied_pair_is_kept_together(pattern: str, tiny_bundle: Factory, tmp_path: Path) -> None:
    quantized, record = run(tiny_bundle("llama"), QuantizeOptions(keep_float=(pattern,)))
    assert quantized.model.lm_head.weight is quantized.model.model.embed_tokens.weight
    assert [line.what for line in record.skipped] == ["quantize model.embed_tokens"]
    quantized.save(tmp_path / "model")
    assert torch.equal(logits(ModelBundle.load(tmp_path / "model")), logits(quantized))


def test_an_untied_head_may_be_kept_alone(tiny_bundle: Factory) -> None:
    quantized, record = run(tiny_bundle("phi3"), QuantizeOptions(keep_float=("lm_head",)))
    assert isinstance(quantized.model.lm_head, torch.nn.Linear)
    assert [line.what for line in record.skipped] == ["quantize lm_head"]
    assert "model.embed_tokens" in quantized_weights(quantized.model)


def test_patterns_that_match_nothing_are_refused_with_the_nearest_name(tiny_bundle: Factory) -> None:
    options = QuantizeOptions(keep_float=("model.layers.0.mlp.down_prj", "nonsense-?"))
    with pytest.raises(RecipeError, match=r"near: model.layers.0.mlp.down_proj\), 'nonsense-\?'"):
        run(tiny_bundle("llama"), options)


def test_codes_are_rounded_once(tiny_bundle: Factory) -> None:
    quantized, _ = run(tiny_bundle("llama"), QuantizeOptions())
    with pytest.raises(RecipeError, match="quantized already"):
        run(quantized, QuantizeOptions())


def test_weights_beyond_fp16_are_named(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("llama")
    bundle.model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = 1e5
    bundle.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RecipeError, match=r"2 of 20 tensors .*q_proj.weight \(1e\+05\), .*up_proj.weight \(not fini"):
        run(bundle, QuantizeOptions())


def test_the_record_of_awq_holds_codes_to_the_weights_that_it_scaled(tiny_bundle: Factory) -> None:
    ids = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(0))
    tokens = TokenSet(ids, "calibration", "x", "0" * 64, 8, "0")
    _, record = run(tiny_bundle("llama"), QuantizeOptions(scheme="integer", bits=8, method="awq"), tokens)
    assert record.details["equalized"]
    assert max(layer["relative_mse"] for layer in record.details["layers"]) < 1e-3


@pytest.mark.parametrize(("values", "told"), [
    ({"importance": "magnitude", "method": "lnq"}, "importance=magnitude is of method=kmeans, and the method is lnq"),
    ({"guided": True, "scope": "block"}, "one of the two"),
    ({"guided": True}, "guided=True is of method=lnq or gptq"),
    ({"scope": "block", "own_windows": 3}, "scope=block is of method=learned; own_windows=3"),
    ({"tokens": 100, "learning_rate": 1e-3}, "tokens=100 is of method=qat; learning_rate=0.001"),
])  # fmt: skip
def test_options_that_the_method_does_not_look_at_are_refused(
    tiny_bundle: Factory, values: dict[str, Any], told: str
) -> None:
    tokens = TokenSet(torch.zeros(4, 32, dtype=torch.int64), "calibration", "x", "0" * 64, 8, "0")
    with pytest.raises(RecipeError, match=told):
        run(tiny_bundle("llama"), QuantizeOptions(**values), tokens if values.get("method") else None)


def test_calibration_data_must_be_calibration_data(tiny_bundle: Factory) -> None:
    tokens = TokenSet(torch.zeros(1, 8, dtype=torch.int64), "evaluation", "x", "0", 8, "0")
    with pytest.raises(DataError, match="role"):
        run(tiny_bundle("llama"), QuantizeOptions(), tokens)


def test_float_weights_that_are_replaced_are_not_copied(tiny_bundle: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle("llama")
    replaced = {id(bundle.model.get_submodule(name).weight) for name in bundle.anatomy.linear_names()}
    copied = []
    original = torch.nn.Parameter.__deepcopy__
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__",
                        lambda self, memo: (copied.append(id(self)), original(self, memo))[1])  # fmt: skip
    run(bundle, QuantizeOptions())
    assert copied
    assert not replaced & set(copied)
