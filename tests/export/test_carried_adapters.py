"""Which adapters an export takes: those of its own base, whole, of modules and shapes that the base has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dwindle.errors import RecipeError
from dwindle.export import ExportOptions, run
from dwindle.export.carried_adapters import carried_adapters

pytest.importorskip("peft")
Factory = Callable[..., Any]


def rewritten(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Give an adapter other weights and a card that was written for them."""
    from dwindle.adapter_card import weights_sha256

    save_file(tensors, folder / "adapter_model.safetensors")
    card = json.loads((folder / "adapter_card.json").read_text())
    (folder / "adapter_card.json").write_text(json.dumps({**card, "sha256": weights_sha256(tensors)}))


def test_an_adapter_of_this_base_is_read_by_its_folders_name(
    tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path
) -> None:
    bundle = tiny_bundle()
    found = carried_adapters(bundle, [write_adapter(bundle, tmp_path / "stories", rank=3, kind="rslora"),
                                      write_adapter(bundle, tmp_path / "poems", kind="dora", targets=("q", "down"))])  # fmt: skip
    assert [(a.name, a.rank, a.scales_rows, len(a.changes)) for a in found] == [
        ("stories", 3, False, 14), ("poems", 4, True, 4)]  # fmt: skip
    assert found[0].card.task == "copying"
    assert found[0].changes["model.layers.0.self_attn.q_proj"].scale == pytest.approx(6 / 3**0.5)
    assert carried_adapters(bundle, []) == ()


def test_everything_that_does_not_fit_is_named_at_once(
    tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path
) -> None:
    bundle = tiny_bundle()
    other = write_adapter(bundle, tmp_path / "other", base_sha256="f" * 64)
    strange = write_adapter(bundle, tmp_path / "strange", targets=("q", "k"))
    renamed = {name.replace("layers.1.self_attn.k_proj", "layers.7.self_attn.k_proj"): tensor
               for name, tensor in load_file(strange / "adapter_model.safetensors").items()}  # fmt: skip
    renamed["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(31, 4)
    rewritten(strange, renamed)
    damaged = write_adapter(bundle, tmp_path / "damaged")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, damaged / "adapter_model.safetensors")
    named = write_adapter(bundle, tmp_path / "prefill")
    first, second = (write_adapter(bundle, tmp_path / place / "twice") for place in "ab")
    folders = [other, strange, damaged, tmp_path / "absent", named, first, second]
    with pytest.raises(RecipeError) as caught:
        run(bundle, ExportOptions(formats=("onnx",)), tmp_path / "out", adapters=folders)
    told = str(caught.value)
    for needed in (
        "other: trained on tiny (ffffffffffff), this base is", "1 of its modules are no linears",
        "model.layers.7.self_attn.k_proj", "model.layers.0.self_attn.q_proj (31 x 32, needed 32 x 32)",
        "damaged: adapter_model.safetensors is not what its card was written for", "absent: no adapter_card.json",
        "cannot be named 'prefill'", "twice (2 times)", "7 problems",
    ):  # fmt: skip
        assert needed in told, needed
    assert not (tmp_path / "out").exists()
