"""Bundles: save and load bit by bit, sizes, hashes, and every refusal of a place or a weight."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dwindle.anatomy import FAMILIES
from dwindle.bundle import ModelBundle
from dwindle.errors import GateFailed, OutputError, UnsupportedModel
from dwindle.storage import hash_file

IDS = torch.arange(40).reshape(2, 20) * 5 % 256


def _logits(bundle):
    with torch.no_grad():
        return bundle.model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_bundle_loads_bit_by_bit(tiny_bundle, tmp_path, family):
    bundle = tiny_bundle(family, storage_dtype=torch.float16)
    bundle.save(tmp_path / "m")
    loaded = ModelBundle.load(tmp_path / "m")
    assert torch.equal(_logits(loaded), _logits(bundle))
    assert loaded.content_sha256 == bundle.content_sha256
    assert loaded.anatomy == bundle.anatomy
    assert loaded.lineage == bundle.lineage
    assert loaded.storage_dtype == torch.float16
    assert loaded.size() == bundle.size()
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert not loaded.model.training
    text = "Tom saw a dog.\n\tÖl"
    assert loaded.tokenizer(text).input_ids == bundle.tokenizer(text).input_ids
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, attn_implementation="eager")
    assert torch.allclose(stock(IDS).logits, _logits(bundle), atol=1e-5)


def test_the_folder_is_a_plain_hugging_face_folder(tiny_bundle, tmp_path):
    bundle = tiny_bundle()
    bundle.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bundle.save(tmp_path / "m")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "lineage.json"} <= names
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("float32", ["LlamaForCausalLM"])
    assert str(tmp_path) not in (tmp_path / "m" / "config.json").read_text()
    assert ModelBundle.load(tmp_path / "m").tokenizer.chat_template == bundle.tokenizer.chat_template
    tokenizer = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]


def test_real_models_load_in_either_spelling_of_rope(assets, tmp_path):
    source = assets / "models" / "pycode-6m"
    bundle = ModelBundle.load(source)
    assert bundle.storage_dtype == torch.float16
    assert bundle.size().parameters == 5_770_496
    assert bundle.size().bits_per_weight == 16.0
    entry = bundle.lineage.entries[0]
    assert entry.options == {"model": "pycode-6m"}
    assert entry.inputs["model.safetensors"] == hash_file(source / "model.safetensors")
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert torch.allclose(stock(IDS).logits, _logits(bundle), atol=1e-5)
    bundle.save(tmp_path / "m")
    assert torch.equal(_logits(ModelBundle.load(tmp_path / "m")), _logits(bundle))


def test_derive_adds_one_entry_and_rereads_the_anatomy(tiny_bundle):
    bundle = tiny_bundle()
    other = tiny_bundle(intermediate_size=32)
    derived = bundle.derive(other.model, "prune", {"ffn_keep": 0.5}, {"calibration": "ab"})
    assert derived.lineage.steps == ("origin", "prune")
    assert derived.anatomy.ffn_width == (32, 32)
    assert bundle.lineage.steps == ("origin",)


def test_rounding_makes_the_model_equal_its_file(tiny_bundle):
    bundle = tiny_bundle(storage_dtype=torch.bfloat16)
    weight = bundle.model.model.norm.weight
    with torch.no_grad():
        weight.fill_(1.0 + 2**-12)
    assert bundle.stored_dtype_rounded() is bundle
    assert torch.equal(weight, torch.ones(32))


def test_a_weight_out_of_range_or_nan_fails_loudly(tiny_bundle, tmp_path):
    bundle = tiny_bundle(storage_dtype=torch.float16)
    with torch.no_grad():
        bundle.model.model.norm.weight[0] = 1e6
        bundle.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(GateFailed, match=r"2 tensors do not fit.*up_proj\.weight, model\.norm\.weight"):
        bundle.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_sizes_by_hand(tiny_bundle):
    size = tiny_bundle(storage_dtype=torch.float16).size()
    attention, ffn, norms = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 64, 2 * 32
    assert size.parameters == 272 * 32 + 2 * (attention + ffn + norms) + 32
    assert size.bytes == 2 * size.parameters
    assert (size.bits_per_weight_linear, size.bits_per_weight_embedding) == (16.0, 16.0)
    untied = tiny_bundle(tie_word_embeddings=False).size()
    assert untied.parameters == size.parameters + 272 * 32


def test_the_hash_changes_with_weights_config_and_tokenizer(tiny_bundle):
    bundle = tiny_bundle()
    before = bundle.content_sha256
    assert tiny_bundle().content_sha256 == before
    assert tiny_bundle(seed=1).content_sha256 != before
    assert tiny_bundle(rope_theta=20_000.0).content_sha256 != before
    bundle.tokenizer.chat_template = "x"
    assert bundle.content_sha256 != before


def test_saving_replaces_a_model_and_nothing_else(tiny_bundle, tmp_path):
    bundle, place = tiny_bundle(), tmp_path / "m"
    bundle.save(place)
    tiny_bundle(seed=1).save(place)
    assert ModelBundle.load(place).content_sha256 == tiny_bundle(seed=1).content_sha256
    (place / "notes").mkdir()
    with pytest.raises(OutputError, match=r"something else than a model \(notes\)"):
        bundle.save(place)
    shutil.rmtree(place)
    place.mkdir()
    (place / "data.json").write_text("{}")
    with pytest.raises(OutputError, match=r"something else than a model \(data\.json\)"):
        bundle.save(place)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        bundle.save(tmp_path / "file")


def test_no_space_is_said_before_a_byte_is_written(tiny_bundle, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OutputError, match="1,000 are free"):
        tiny_bundle().save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_bundle_saves_loads_and_counts(tiny_bundle, tmp_path):
    from dwindle.quantized_model import apply_quantized_weights
    from dwindle.weights import AffineWeight

    bundle = tiny_bundle(storage_dtype=torch.bfloat16)
    weights = {
        name: AffineWeight(
            codes=torch.randint(0, 16, module.weight.shape, dtype=torch.uint8),
            scales=torch.rand(module.weight.shape[0], module.weight.shape[1] // 16).half() * 0.05,
            zero_points=None, bits=4, group_size=16,
        )
        for name, module in bundle.model.named_modules()
        if name in {*bundle.anatomy.linear_names(), bundle.anatomy.embedding}
    }  # fmt: skip
    assert not bundle.quantized
    apply_quantized_weights(bundle.model, weights, {bundle.anatomy.head: bundle.anatomy.embedding})
    assert bundle.quantized
    assert bundle.size().bits_per_weight_linear == 5.0
    bundle.save(tmp_path / "m")
    loaded = ModelBundle.load(tmp_path / "m")
    assert torch.equal(_logits(loaded), _logits(bundle))
    assert loaded.content_sha256 == bundle.content_sha256
    assert (loaded.quantized, loaded.storage_dtype) == (True, torch.bfloat16)
    assert loaded.size() == bundle.size()
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.scales")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"1 tensors: model\.layers\.1\.mlp\.up_proj\.scales is missing"):
        ModelBundle.load(tmp_path / "m")
