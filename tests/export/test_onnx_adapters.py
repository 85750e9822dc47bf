"""Adapters in ONNX Runtime: swapped in one session in any order, equal to PEFT's layers, and refused where they must."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwindle import export
from dwindle.errors import OutputError, RecipeError, UnsupportedModel
from dwindle.export import ExportOptions
from dwindle.export.onnx_adapters import packed_arrays, read_adapter_file
from dwindle.export.onnx_runner import OnnxRunner
from dwindle.low_rank import Factors
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized

Factory = Callable[..., Any]
ONNX = ExportOptions(formats=("onnx",), decode_steps=4, prompts=1, longest_tokens=8)
IDS = torch.arange(40, 60)[None]


def peft_logits(bundle: Any, folder: Path | None) -> torch.Tensor:
    """Return the logits of PEFT's own layers over the base."""
    from dwindle.adapters import Adapter

    with torch.no_grad():
        found: torch.Tensor = (bundle if folder is None else Adapter.load(folder).on(bundle)).model(IDS).logits[0]
    return found


def base_of(tiny_bundle: Factory, family: str, bits: int | None) -> Any:
    bundle = tiny_bundle(family)
    return bundle if bits is None else quantized(bundle, QuantizeOptions(scheme="integer", bits=bits))[0]


@pytest.mark.parametrize("operators", ["fused", "plain"])
@pytest.mark.parametrize(
    ("family", "bits"), [("llama", None), ("llama", 4), ("qwen2", 4), ("phi3", None), ("gemma2", 8)]
)
def test_swaps_in_any_order_equal_peft(
    family: str, bits: int | None, operators: Any, tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path
) -> None:
    from dataclasses import replace

    bundle = base_of(tiny_bundle, family, bits)
    folders = {
        "a": write_adapter(bundle, tmp_path / "a", rank=5),
        "b": write_adapter(bundle, tmp_path / "b", rank=2, kind="rslora", targets=("o", "down"), seed=2),
        "c": write_adapter(bundle, tmp_path / "c", rank=3, kind="dora", seed=3),
    }
    options = replace(ONNX, operators=operators)
    (artifact,) = export.run(bundle, options, tmp_path / "out", adapters=list(folders.values()))
    wanted = {name: peft_logits(bundle, folder) for name, folder in folders.items()} | {None: peft_logits(bundle, None)}
    assert artifact.parity is not None
    assert artifact.parity.passed
    assert [row["name"] for row in artifact.details["adapters"]] == ["a", "b", "c"]
    for row in artifact.details["adapters"]:
        assert row["parity"]["passed"]
        assert row["parity"]["max_abs_logit_error"] < 1e-4
        assert f"adapter {row['name']}" in row["parity"]["executed_by"]
    runner: Any = export.open_artifact(tmp_path / "out" / "onnx")
    for name in folders:
        assert runner.load_adapter(tmp_path / "out" / "onnx" / "adapters" / name) == name
    seen: dict[Any, torch.Tensor] = {}
    for name in ("a", "b", None, "a", "c", "a", None, "c", "b"):
        runner.activate(name)
        found = torch.cat([runner.step(IDS[:, :12]), *(runner.step(IDS[:, i : i + 1]) for i in range(12, 20))])
        assert (found - wanted[name]).abs().max() < 1e-4, name
        assert torch.equal(seen.setdefault(name, found), found)
    assert (wanted["a"] - wanted[None]).abs().max() > 0.1
    assert (wanted["a"] - wanted["b"]).abs().max() > 0.1


def test_the_folder_of_an_adapter_is_complete(tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path) -> None:
    bundle = tiny_bundle()
    folder = write_adapter(bundle, tmp_path / "stories", task="telling stories")
    export.run(bundle, ONNX, tmp_path, adapters=[folder])
    place = tmp_path / "onnx" / "adapters" / "stories"
    assert {path.name for path in place.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "adapter_card.json", "adapter.onnx_adapter",
        "package.json", "README.md"}  # fmt: skip
    package = json.loads((place / "package.json").read_text())
    assert package["base_sha256"] == bundle.content_sha256
    assert (package["task"], package["licence"], package["metrics"]) == ("telling stories", "MIT", {"accuracy": 0.5})
    assert package["runtimes"]["onnx"]["parity"]["passed"]
    assert package["runtimes"]["onnx"]["bytes"] == (place / "adapter.onnx_adapter").stat().st_size
    manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
    assert [row["name"] for row in manifest["adapters"]] == ["stories"]
    assert manifest["adapter_inputs"]["inputs"] == "lora"
    assert "adapters/stories/adapter.onnx_adapter" in {row["path"] for row in manifest["files"]}
    assert 'adapter.Load("adapter.onnx_adapter")' in (place / "README.md").read_text()


def test_parts_of_one_product_share_an_input() -> None:
    change = Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), None)
    products = {"qkv": {"inputs": 2, "parts": {"q": 1, "k": 2, "v": 1}}, "o": {"inputs": 2, "parts": {"o": 2}}}
    found = packed_arrays(products, {"q": change, "v": Factors(change.a * 2, change.b, torch.tensor([0.5]))})
    assert sorted(found) == ["k.lora_b", "q.lora_b", "qkv.lora_a", "qkv.row_scale", "v.lora_b"]
    assert found["qkv.lora_a"].tolist() == [[1.0, 0.0, 2.0], [2.0, 0.0, 4.0]]
    assert [found[f"{part}.lora_b"].tolist() for part in "qkv"] == [[[3.0]], [[0.0, 0.0]], [[3.0]]]
    assert found["qkv.row_scale"].tolist() == [1.0, 1.0, 1.0, 0.5]


def test_a_wrong_adapter_file_fails_the_gate(
    tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dwindle.export import onnx_adapters

    right = onnx_adapters.packed_arrays
    monkeypatch.setattr(onnx_adapters, "packed_arrays",
                        lambda *given: {name: 1.01 * array for name, array in right(*given).items()})  # fmt: skip
    bundle = tiny_bundle()
    (artifact,) = export.run(bundle, ONNX, tmp_path, adapters=[write_adapter(bundle, tmp_path / "a")])
    assert artifact.parity is not None
    assert not artifact.parity.passed
    assert "adapter a" in artifact.parity.executed_by
    with pytest.raises(Exception, match="1 of 1 artifacts differ"):
        export.require_parity([artifact])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_added_to_a_shipped_base_that_stays_as_it_is(
    kind: str, tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path
) -> None:
    from dataclasses import replace

    from dwindle.storage import hash_folder

    bundle = base_of(tiny_bundle, "llama", 4)
    inputs: Any = kind
    export.run(bundle, replace(ONNX, adapter_inputs=inputs), tmp_path)
    before = hash_folder(tmp_path / "onnx")
    folder = write_adapter(bundle, tmp_path / "trained", kind=kind)
    found = export.package_adapter(folder, [tmp_path / "onnx"], tmp_path / "late", bundle)
    assert found["name"] == "late"
    assert found["runtimes"]["onnx"]["parity"]["max_abs_logit_error"] < 1e-4
    assert hash_folder(tmp_path / "onnx") == before
    runner: Any = export.open_artifact(tmp_path / "onnx")
    runner.activate(runner.load_adapter(tmp_path / "late"))
    assert (runner.step(IDS) - peft_logits(bundle, folder)).abs().max() < 1e-4
    if kind == "lora":
        export.package_adapter(folder, [tmp_path / "onnx"], tmp_path / "late")  # again, without the base
        assert "parity" not in json.loads((tmp_path / "late" / "package.json").read_text())["runtimes"]["onnx"]
    else:
        with pytest.raises(RecipeError, match="Give the base with -m"):
            export.package_adapter(folder, [tmp_path / "onnx"], tmp_path / "late")


def test_packaging_for_another_format_keeps_what_the_package_held(
    tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path
) -> None:
    from dataclasses import replace

    bundle = tiny_bundle()
    first, second = (write_adapter(bundle, tmp_path / name, seed=seed) for name, seed in (("one", 1), ("two", 2)))
    export.run(bundle, replace(ONNX, adapter_inputs="lora"), tmp_path)
    place = tmp_path / "late"
    export.package_adapter(first, [tmp_path / "onnx"], place)
    package = json.loads((place / "package.json").read_text())
    (place / "adapter_inputs.safetensors").write_bytes(b"of Core AI")
    package["runtimes"]["coreai"] = {"file": "adapter_inputs.safetensors", "bytes": 10, "sha256": "0" * 64}
    (place / "package.json").write_text(json.dumps(package))
    again = export.package_adapter(first, [tmp_path / "onnx"], place)
    assert sorted(again["runtimes"]) == ["coreai", "onnx"]
    assert (place / "adapter_inputs.safetensors").read_bytes() == b"of Core AI"
    assert sorted(export.package_adapter(second, [tmp_path / "onnx"], place)["runtimes"]) == ["onnx"]
    assert not (place / "adapter_inputs.safetensors").exists()


def test_what_cannot_be_packaged_is_refused(tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path) -> None:
    from dataclasses import replace

    bundle, other = tiny_bundle(), tiny_bundle(seed=1)
    export.run(bundle, ONNX, tmp_path / "bare")
    export.run(bundle, replace(ONNX, adapter_inputs="lora"), tmp_path / "ready")
    mine, dora = write_adapter(bundle, tmp_path / "mine"), write_adapter(bundle, tmp_path / "dora", kind="dora")
    foreign = write_adapter(other, tmp_path / "foreign")
    ready, bare, out = tmp_path / "ready" / "onnx", tmp_path / "bare" / "onnx", tmp_path / "out"
    for adapter, artefacts, base, told in (
        (mine, [bare], None, "it has no inputs for adapters"),
        (mine, [ready, ready], None, "two artifacts have one format"),
        (mine, [], None, "no artifact was named"),
        (mine, [ready], other, "the base that was given is"),
        (dora, [ready], bundle, "no inputs for scales of rows"),
        (foreign, [ready], None, "trained on tiny"),
    ):
        with pytest.raises(RecipeError, match=told):
            export.package_adapter(adapter, artefacts if len(artefacts) != 2 else [ready, shutil.copytree(
                ready, tmp_path / "copy")], out, base)  # fmt: skip
    assert not out.exists()
    with pytest.raises(OutputError, match="holds something else"):
        export.package_adapter(mine, [ready], mine)
    (ready / "manifest.json").write_text((ready / "manifest.json").read_text().replace('"onnx"', '"coreml"', 1))
    with pytest.raises(RecipeError, match="cannot be added later"):
        export.package_adapter(mine, [ready], out)


def test_a_session_refuses_adapters_that_are_not_its_own(
    tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path
) -> None:
    from dataclasses import replace

    bundle, other = tiny_bundle(), tiny_bundle(seed=1)
    narrow = tiny_bundle(intermediate_size=48)
    for place, one in (("mine", bundle), ("other", other), ("narrow", narrow)):
        export.run(one, ONNX, tmp_path / place, adapters=[write_adapter(one, tmp_path / place / "a")])
    export.run(bundle, replace(ONNX, adapter_inputs="none"), tmp_path / "bare")
    own = tmp_path / "mine" / "onnx" / "adapters" / "a"
    with pytest.raises(RecipeError, match="not ready for adapters"):
        OnnxRunner(tmp_path / "bare" / "onnx").load_adapter(own)
    runner = OnnxRunner(tmp_path / "mine" / "onnx")
    with pytest.raises(RecipeError, match="An adapter fits the very codes"):
        runner.load_adapter(tmp_path / "other" / "onnx" / "adapters" / "a")
    with pytest.raises(UnsupportedModel, match=r"holds no adapter\.onnx_adapter.*dwindle adapters package"):
        runner.load_adapter(tmp_path / "mine" / "a")
    with pytest.raises(RecipeError, match=r"no adapter is named 'a'\. It has none"):
        runner.activate("a")
    runner.load_adapter(own)
    with pytest.raises(RecipeError, match=r"no adapter is named 'aa' \(did you mean 'a'\?\)"):
        runner.activate("aa")
    shutil.copyfile(
        tmp_path / "narrow" / "onnx" / "adapters" / "a" / "adapter.onnx_adapter", own / "adapter.onnx_adapter"
    )
    with pytest.raises(UnsupportedModel, match="packaged for another export: 6 of its 22 arrays"):
        runner.load_adapter(own)
    (own / "adapter.onnx_adapter").write_bytes(b"nothing of the kind")
    with pytest.raises(UnsupportedModel, match="cannot be read by ONNX Runtime"):
        runner.load_adapter(own)


@pytest.mark.parametrize("operators", ["fused", "plain"])
def test_onnxruntime_genai_swaps_them(
    operators: Any, tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path
) -> None:
    from dataclasses import replace

    og = pytest.importorskip("onnxruntime_genai")
    bundle = base_of(tiny_bundle, "llama", 4)
    folders = [write_adapter(bundle, tmp_path / "a"), write_adapter(bundle, tmp_path / "b", rank=2, seed=2)]
    export.run(bundle, replace(ONNX, operators=operators), tmp_path, adapters=folders)
    model = og.Model(str(tmp_path / "onnx"))
    held = og.Adapters(model)
    for folder in folders:
        held.load(str(tmp_path / "onnx" / "adapters" / folder.name / "adapter.onnx_adapter"), folder.name)
    wanted = {folder.name: peft_logits(bundle, folder) for folder in folders} | {None: peft_logits(bundle, None)}
    for name in ("a", "b", None, "a"):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=IDS.shape[1] + 1)
        generator = og.Generator(model, parameters)
        if name is not None:
            generator.set_active_adapter(held, name)
        generator.append_tokens(IDS.numpy().astype(np.int32))
        logits = np.asarray(generator.get_logits()).reshape(-1, bundle.anatomy.vocab)[-1]
        assert np.abs(logits - wanted[name][-1].numpy()).max() < 1e-4, name


def test_the_file_is_onnx_runtimes_own(tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path) -> None:
    bundle = tiny_bundle()
    export.run(bundle, ONNX, tmp_path, adapters=[write_adapter(bundle, tmp_path / "a", rank=3)])
    values, _ = read_adapter_file(tmp_path / "onnx" / "adapters" / "a" / "adapter.onnx_adapter")
    assert values["model.layers.0.self_attn.qkv_proj.lora_a"].shape() == [32, 9]
    assert values["model.layers.1.mlp.down_proj.lora_b"].shape() == [3, 32]
    assert values["model.layers.0.self_attn.k_proj.lora_b"].shape() == [3, 16]
    assert len(values) == 22
