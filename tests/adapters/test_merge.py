"""Merging equals PEFT: LoRA, rsLoRA, DoRA; everything else is refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.adapter_card import weights_sha256
from dwindle.adapters import merge, read_adapter
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError, UnsupportedModel


def peft_adapter(bundle: Any, folder: Path, **options: Any) -> torch.Tensor:
    """Write a random adapter with PEFT and return the logits of base plus adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        import copy

        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options
        )
        model = peft.get_peft_model(copy.deepcopy(bundle.model), config).eval()
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data + torch.randn_like(parameter) * 0.05
        model.save_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=IDS).logits


IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"q_proj": 3}},
                                     {"alpha_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 30}}])  # fmt: skip
def test_merged_logits_equal_base_plus_adapter(
    tiny_bundle: Callable[..., Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    bundle = tiny_bundle("llama")
    before = bundle.content_sha256
    wanted = peft_adapter(bundle, tmp_path, **options)
    merged, record = merge(bundle, tmp_path)
    with torch.no_grad():
        found = merged.model(input_ids=IDS).logits
        plain = bundle.model(input_ids=IDS).logits
    assert (found - wanted).abs().max() < 1e-5
    assert (found - plain).abs().max() > 1e-2
    assert bundle.content_sha256 == before
    assert len(record.details["modules"]) == 4
    assert merged.lineage.steps[-1] == "merge"


def test_a_foreign_adapter_is_refused_with_every_module(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    peft_adapter(tiny_bundle("llama", intermediate_size=96), tmp_path)
    with pytest.raises(UnsupportedModel, match=r"2 of 4 modules.*layers\.0\.mlp\.down_proj.*layers\.1"):
        merge(tiny_bundle("llama"), tmp_path)


def test_a_quantized_base_is_refused(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    from dwindle import quantize

    base, _ = quantize.run(tiny_bundle("llama"), quantize.QuantizeOptions(scheme="integer"))
    with pytest.raises(RecipeError, match="without rounding them again"):
        merge(base, tmp_path)


def test_a_base_in_float16_is_merged_exactly_unless_its_type_is_kept(
    tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = tiny_bundle("llama", storage_dtype=torch.float16)
    wanted = peft_adapter(bundle, tmp_path / "a")
    errors = []
    for exact in (True, False):
        merge(bundle, tmp_path / "a", exact=exact)[0].save(tmp_path / f"merged-{exact}")
        merged = ModelBundle.load(tmp_path / f"merged-{exact}")
        assert merged.storage_dtype == (torch.float32 if exact else torch.float16)
        with torch.no_grad():
            errors.append(float((merged.model(input_ids=IDS).logits - wanted).abs().max()))
    assert errors[0] < 1e-5 < errors[1]


@pytest.mark.parametrize("options", [{"scheme": "integer", "bits": 4}, {"scheme": "integer", "bits": 4,
    "symmetric": False}, {"scheme": "palettize", "bits": 4}])  # fmt: skip
def test_a_quantized_base_is_merged_by_rounding_again_and_it_is_said(
    tiny_bundle: Callable[..., Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    from dwindle import quantize
    from dwindle.low_rank import changed
    from dwindle.quantize.recode import recoded

    bundle = tiny_bundle("llama")
    peft_adapter(bundle, tmp_path)
    base, _ = quantize.run(bundle, quantize.QuantizeOptions(**options))
    merged, record = merge(base, tmp_path, recode=recoded)
    assert "4 quantized linears were rounded again" in record.skipped[0].why
    assert merged.size() == base.size()
    with torch.no_grad(), changed(base, read_adapter(tmp_path)):
        wanted = base.model(input_ids=IDS).logits
    with torch.no_grad():
        near, far = ((b.model(input_ids=IDS).logits - wanted).abs().mean() for b in (merged, base))
    assert 0 < near < 0.8 * far
    untouched = "model.layers.0.self_attn.k_proj"
    assert torch.equal(merged.model.get_submodule(untouched).weight, base.model.get_submodule(untouched).weight)


def test_a_card_that_names_another_base_is_refused(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    peft_adapter(tiny_bundle("llama"), tmp_path)
    sha = weights_sha256(load_file(tmp_path / "adapter_model.safetensors"))
    card = {"schema": 1, "base_name": "other", "base_sha256": "0" * 64, "task": "a", "sha256": sha}
    (tmp_path / "adapter_card.json").write_text(json.dumps(card))
    with pytest.raises(RecipeError, match=r"was trained on other \(000000000000\), this base is"):
        merge(tiny_bundle("llama"), tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"peft_type": "LOHA"}, "peft_type='LOHA'"), ({"bias": "all"}, "bias='all'"), ({"fan_in_fan_out": True}, "fan_in_fan_out"),
     ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
     ({"init_lora_weights": "pissa_niter_4"}, "changes the base as well"),
     ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens=\[5\]")],
)  # fmt: skip
def test_other_kinds_are_refused(
    tiny_bundle: Callable[..., Any], tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    peft_adapter(tiny_bundle("llama"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=told):
        read_adapter(tmp_path)


def test_damaged_folders_are_refused(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no PEFT adapter"):
        read_adapter(tmp_path)
    peft_adapter(tiny_bundle("llama"), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UnsupportedModel, match="cannot be read as safetensors"):
        read_adapter(tmp_path)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match="never loaded"):
        read_adapter(tmp_path)


def test_strange_tensors_are_named(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    peft_adapter(tiny_bundle("llama"), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = next(n for n in tensors if "lora_B" in n)
    tensors.pop(lost)
    save_file({**tensors, "base_model.model.other": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"2 tensors.*other.*lora_A or lora_B is missing"):
        read_adapter(tmp_path)


def test_of_several_patterns_the_first_counts_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    from dwindle.peft_folder import _scale

    patterns, name = {"q_proj": 3, "layers.0.self_attn.q_proj": 8}, "model.layers.0.self_attn.q_proj"
    assert _scale({"lora_alpha": 1, "alpha_pattern": patterns}, name, rank=4) == 3 / 4
    assert patterns[get_pattern_key(list(patterns), name)] == 3


def test_a_change_of_a_tied_head_is_refused_since_it_would_change_the_embedding(
    tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    peft_adapter(tiny_bundle("llama"), tmp_path)
    head = "base_model.model.lm_head.lora_"
    save_file({f"{head}A.weight": torch.ones(4, 32), f"{head}B.weight": torch.ones(272, 4)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"it changes lm_head, whose weight is the embedding's"):
        merge(tiny_bundle("llama"), tmp_path)
    untied = tiny_bundle("llama", tie_word_embeddings=False)
    merged, _ = merge(untied, tmp_path)
    assert not torch.equal(merged.model.lm_head.weight, untied.model.lm_head.weight)
