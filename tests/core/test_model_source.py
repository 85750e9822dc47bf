"""From a name to a model: what is found, what is mended, and every refusal."""

from __future__ import annotations

import json
import logging

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from dwindle.bundle import ModelBundle
from dwindle.errors import UnsupportedModel
from dwindle.model_source import find_folder, separate_rope


@pytest.fixture
def saved(tiny_bundle, tmp_path):
    tiny_bundle().save(tmp_path / "m")
    return tmp_path / "m"


def _edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "~/nowhere", "~nobody-here/m", "a b", "a/b/"])
def test_a_path_that_is_not_there_is_no_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"does not exist\. Give a model folder or a Hugging Face id"):
        ModelBundle.load(name)


def test_a_file_is_no_folder(saved):
    with pytest.raises(UnsupportedModel, match="is a file"):
        ModelBundle.load(saved / "config.json")


def test_hub_failures_are_explained(monkeypatch):
    def fails(*_, **__):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UnsupportedModel, match=r"org/name is no folder here.*no route to host\).*HF_HUB_OFFLINE"):
        ModelBundle.load("org/name")


def test_offline_hub_ids_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnsupportedModel, match="could not be had from Hugging Face"):
        find_folder("dwindle-tests/does-not-exist")


def test_a_hub_snapshot_is_loaded_with_its_revision(saved, monkeypatch):
    (saved / "lineage.json").unlink()
    snapshot = saved.rename(saved.with_name("0123abcd"))
    asked = {}

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.update(name=name, patterns=allow_patterns, ignored=ignore_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    bundle = ModelBundle.load("org/name")
    assert bundle.lineage.entries[0].options == {"model": "org/name", "revision": "0123abcd"}
    assert "*.safetensors" in asked["patterns"]
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["patterns"])


def test_unknown_family_multimodal_and_foreign_quantization_are_refused(saved):
    _edit_config(saved, model_type="qwen9")
    with pytest.raises(UnsupportedModel, match="'qwen9' is not supported"):
        ModelBundle.load(saved)
    _edit_config(saved, model_type="gemma3", text_config={"model_type": "gemma3_text"})
    with pytest.raises(UnsupportedModel, match=r"multimodal 'gemma3'.*'gemma3_text'"):
        ModelBundle.load(saved)
    _edit_config(saved, model_type="llama", text_config=..., quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModel, match="already quantized \\('gptq'\\)"):
        ModelBundle.load(saved)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"num_attention_heads": 0}, "config"),
        ({"rope_parameters": 3}, "config"),
        ({"initializer_range": -1.0}, "cannot be loaded|config"),
        ({"hidden_size": 10**9}, "hidden_size=1000000000"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"intermediate_size": 48}, r"disagree in 6 tensors: model\.layers\.0\.mlp\.down_proj\.weight is \[32, 64\]"),
        ({"num_hidden_layers": 3}, r"disagree in 9 tensors.*layers\.2\.\S+ is missing"),
        ({"num_hidden_layers": 1}, r"disagree in 9 tensors.*layers\.1\.\S+ has no place in the model"),
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(saved, changes, found):
    _edit_config(saved, **changes)
    with pytest.raises(UnsupportedModel, match=found):
        ModelBundle.load(saved)


def test_nan_weights_are_named(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"1 tensors hold NaN or infinity: model\.norm\.weight"):
        ModelBundle.load(saved)


def test_a_stored_copy_of_a_tied_head_and_old_rope_buffers_are_accepted(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    assert ModelBundle.load(saved).anatomy.tied
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        ModelBundle.load(saved)


def test_what_transformers_refuses_is_passed_on(saved, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
    with pytest.raises(UnsupportedModel, match=r"cannot be loaded \(RuntimeError: no such kernel\)"):
        ModelBundle.load(saved)


def test_remote_code_is_announced(saved, caplog):
    with caplog.at_level(logging.WARNING, logger="dwindle"):
        ModelBundle.load(saved, trust_remote_code=True)
    assert "Python code that comes with" in caplog.text


def test_the_model_goes_to_the_device_asked_for(saved):
    assert ModelBundle.load(saved, torch_device=torch.device("cpu")).model.device.type == "cpu"


def test_a_rope_in_the_spelling_of_transformers_5_is_not_lost(tiny_bundle, tmp_path):
    bundle = tiny_bundle(rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 2.0})
    bundle.save(tmp_path / "m")
    both = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
    _edit_config(tmp_path / "m", rope_theta=..., rope_scaling=..., rope_parameters=both)
    loaded = ModelBundle.load(tmp_path / "m")
    ids = torch.arange(30)[None]
    assert torch.equal(loaded.model(ids).logits, bundle.model(ids).logits)
    assert loaded.anatomy.traits.ropes == bundle.anatomy.traits.ropes


def test_separate_rope_of_the_unusual_families():
    layers = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
              "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}  # fmt: skip
    gemma = separate_rope({"model_type": "gemma3_text", "rope_parameters": layers})
    assert gemma["rope_local_base_freq"] == 1e4
    assert (gemma["rope_theta"], gemma["rope_scaling"]) == (1e6, {"rope_type": "linear", "factor": 8.0})
    layers["sliding_attention"]["rope_type"] = "linear"
    with pytest.raises(UnsupportedModel, match="transformers>=5"):
        separate_rope({"model_type": "gemma3_text", "rope_parameters": layers})
    long = {"rope_theta": 1e4, "rope_type": "longrope", "partial_rotary_factor": 0.75, "short_factor": [1.0],
            "long_factor": [2.0], "original_max_position_embeddings": 32}  # fmt: skip
    phi = separate_rope({"model_type": "phi3", "rope_parameters": long})
    assert phi["partial_rotary_factor"] == 0.75
    assert phi["rope_scaling"] == {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    olmo = {"model_type": "olmo2", "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5e5}}
    assert separate_rope(olmo)["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert separate_rope({"rope_theta": 1e4}) == {"rope_theta": 1e4}
