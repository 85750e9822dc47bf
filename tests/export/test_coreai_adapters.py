"""Adapters in Core AI: inputs of one asset, executed by Apple's runtime, swapped in any order and equal to PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dwindle import export
from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.export import ExportOptions
from dwindle.export.coreai_adapters import INPUTS_FILE, AdapterInputs, base_arrays, input_arrays
from dwindle.low_rank import Factors
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized

pytest.importorskip("coreai_torch")
pytestmark = pytest.mark.timeout(900)  # conversions share the machine with whatever else runs there
Factory = Callable[..., Any]
IDS = torch.arange(40, 60)[None]
FAST = {"decode_steps": 4, "prompts": 1, "longest_tokens": 8}


def peft_logits(bundle: Any, folder: Path | None) -> torch.Tensor:
    from dwindle.adapters import Adapter

    with torch.no_grad():
        found: torch.Tensor = (bundle if folder is None else Adapter.load(folder).on(bundle)).model(IDS).logits[0]
    return found


@pytest.fixture(scope="module")
def dynamic(tiny_bundle: Factory, write_adapter: Factory, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A palettized Qwen2, which has biases, exported with one adapter of each kind and rank: (bundle, place, artifact)."""
    place = tmp_path_factory.mktemp("coreai-adapters")
    bundle = quantized(tiny_bundle("qwen2"), QuantizeOptions(scheme="palettize", bits=4))[0]
    folders = [write_adapter(bundle, place / "a", rank=5),
               write_adapter(bundle, place / "b", rank=1, kind="rslora", targets=("q", "down"), seed=2),
               write_adapter(bundle, place / "c", rank=3, kind="dora", seed=3)]  # fmt: skip
    options = ExportOptions(formats=("coreai",), **FAST)
    (artifact,) = export.run(bundle, options, place / "out", adapters=folders)
    return bundle, place, artifact


@pytest.mark.slow
def test_one_asset_serves_adapters_of_every_rank(dynamic: Any) -> None:
    bundle, place, artifact = dynamic
    assert artifact.parity.passed
    assert [(row["name"], row["parity"]["passed"]) for row in artifact.details["adapters"]] == [
        ("a", True), ("b", True), ("c", True)]  # fmt: skip
    runner: Any = export.open_artifact(place / "out" / "coreai")
    for name in "abc":
        runner.load_adapter(place / "out" / "coreai" / "adapters" / name)
    wanted: dict[Any, torch.Tensor] = {name: peft_logits(bundle, place / name) for name in "abc"}
    wanted[None] = peft_logits(bundle, None)
    for name in ("a", "b", None, "a", "c", "b"):
        runner.activate(name)
        found = torch.cat([runner.step(IDS[:, :16]), *(runner.step(IDS[:, i : i + 1]) for i in range(16, 20))])
        assert (found - wanted[name]).abs().max() < 1e-4, name
    assert (wanted["a"] - wanted[None]).abs().max() > 0.1


@pytest.mark.slow
def test_a_board_measures_the_base_of_such_an_asset(dynamic: Any) -> None:
    from dwindle.devices.board_runner import CoreAIDecoder

    bundle, place, _ = dynamic
    decoder = CoreAIDecoder(place / "out" / "coreai", None, 64)
    assert decoder.step(IDS[0].tolist()) == int(peft_logits(bundle, None)[-1].argmax())
    assert decoder.step([7]) in range(bundle.anatomy.vocab)


@pytest.mark.slow
def test_the_packages_hold_the_inputs(dynamic: Any) -> None:
    bundle, place, _ = dynamic
    folder = place / "out" / "coreai"
    held = load_file(folder / "adapters" / "b" / INPUTS_FILE)
    assert held["model.layers.0.self_attn.q_proj.lora_a"].shape == (2, 32)
    assert held["model.layers.0.self_attn.k_proj.lora_b"].abs().max() == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["adapter_inputs"]["inputs"] == "dora"
    assert set(held) == {f"{name}.{leaf}" for name in bundle.anatomy.linear_names()
                         for leaf in ("lora_a", "lora_b", "row_scale")}  # fmt: skip
    assert INPUTS_FILE in (folder / "adapters" / "a" / "README.md").read_text()
    assert "row_scale" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_one_is_added_later_and_others_are_refused(
    dynamic: Any, tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path
) -> None:
    bundle, place, _ = dynamic
    asset = place / "out" / "coreai"
    folder = write_adapter(bundle, tmp_path / "trained", rank=4, seed=9)
    export.package_adapter(folder, [asset], tmp_path / "late")
    runner: Any = export.open_artifact(asset)
    runner.activate(runner.load_adapter(tmp_path / "late"))
    assert (runner.step(IDS) - peft_logits(bundle, folder)).abs().max() < 1e-4
    other = write_adapter(tiny_bundle(), tmp_path / "other")
    with pytest.raises(RecipeError, match="An adapter fits the very codes"):
        runner.load_adapter(other)
    path = tmp_path / "late" / INPUTS_FILE
    held = load_file(path)
    save_file({**held, "model.layers.0.self_attn.q_proj.lora_a": torch.zeros(4, 31)}, path,
              metadata={"base_sha256": bundle.content_sha256})  # fmt: skip
    with pytest.raises(UnsupportedModel, match="1 arrays are not what this asset takes"):
        runner.load_adapter(tmp_path / "late")
    save_file(held, path, metadata={"base_sha256": "0" * 64})
    with pytest.raises(UnsupportedModel, match="packaged for another export"):
        runner.load_adapter(tmp_path / "late")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        runner.load_adapter(tmp_path / "late")


@pytest.mark.slow
def test_the_static_layout_has_a_fixed_rank(tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path) -> None:
    bundle = quantized(tiny_bundle("llama"), QuantizeOptions(scheme="palettize", bits=4, row_scales=False))[0]
    options = ExportOptions(formats=("coreai",), shapes="static", prefill_tokens=8, adapter_rank=2, **FAST)
    folders = [write_adapter(bundle, tmp_path / "a", rank=4), write_adapter(bundle, tmp_path / "b", rank=2, seed=2)]
    (artifact,) = export.run(bundle, options, tmp_path / "out", adapters=folders)
    assert [row["parity"]["passed"] for row in artifact.details["adapters"]] == [True, True]
    held = load_file(tmp_path / "out" / "coreai" / "adapters" / "b" / INPUTS_FILE)
    assert held["model.layers.0.mlp.up_proj.lora_a"].shape == (4, 32)
    assert held["model.layers.0.mlp.up_proj.lora_a"].dtype == torch.float16
    wide = write_adapter(bundle, tmp_path / "wide", rank=6)
    with pytest.raises(RecipeError, match=r"rank 6 does not fit.*exported for rank 4.*adapter_rank=6"):
        export.package_adapter(wide, [tmp_path / "out" / "coreai"], tmp_path / "late")


def test_arrays_share_one_rank_and_change_nothing_elsewhere() -> None:
    inputs = AdapterInputs("dora", {"q": (3, 4), "k": (2, 4)}, None, torch.float32)
    facts = inputs.facts()
    one = Factors(torch.ones(1, 4), torch.full((3, 1), 2.0), torch.tensor([1.0, 2.0, 3.0]))
    found = input_arrays(facts, {"q": one})
    assert list(found) == inputs.names
    assert found["q.lora_a"].tolist() == [[1.0] * 4, [0.0] * 4]
    assert found["q.lora_b"].tolist() == [[2.0, 0.0]] * 3
    assert found["q.row_scale"].tolist() == [1.0, 2.0, 3.0]
    assert found["k.row_scale"].tolist() == [1.0, 1.0]
    unchanged = base_arrays(facts)
    assert all(not array.any() for name, array in unchanged.items() if "lora" in name)
    told = {name: torch.full(shape, float(value)) for name, shape, value in inputs.of_base()}
    assert told.keys() == unchanged.keys()
    assert all(torch.equal(told[name], array) for name, array in unchanged.items())
