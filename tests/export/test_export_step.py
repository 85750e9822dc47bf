"""The step: whole folders or none, everything accounted for, refusals before any work, readable by other runtimes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from dwindle import export
from dwindle.bundle import ModelBundle
from dwindle.errors import MissingExtra, OutputError, RecipeError
from dwindle.export import ExportOptions, backends
from dwindle.export import step as export_step
from dwindle.export.artefact import read_manifest
from dwindle.quantized_model import apply_quantized_weights
from dwindle.storage import folder_bytes, hash_file, hash_folder
from dwindle.token_set import TokenSet
from dwindle.weights import AffineWeight, PalettizedWeight

ONNX = ExportOptions(formats=("onnx",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"formats": ("onyx",)}, "formats names 'onyx'; known: onnx, coreml, coreai"),
        ({"formats": ()}, "formats is empty"),
        ({"formats": ("onnx", "onnx")}, "twice"),
        ({"prompts": 0, "decode_steps": -1}, "prompts=0 must .*; decode_steps=-1 must"),
        ({"prompt_tokens": 1.5}, "prompt_tokens=1.5 must be a whole number"),
        ({"context_length": 1}, "context_length=1 must be a whole number, at least 2"),
        ({"activations": "int4"}, "activations='int4'; known: float32, int8"),
    ],
)
def test_options_are_validated(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ExportOptions(**values)


def test_the_context_is_the_one_the_positions_are_exact_for(tiny_bundle: Callable[..., Any]) -> None:
    anatomy = tiny_bundle("llama").anatomy
    assert ExportOptions().resolved(anatomy).context_length == 64
    assert ExportOptions(context_length=40).resolved(anatomy).context_length == 40
    with pytest.raises(RecipeError, match="context_length=65 is more than the 64 tokens this llama is exact for"):
        ExportOptions(context_length=65).resolved(anatomy)
    longrope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    stretched = tiny_bundle("phi3", rope_scaling=longrope, original_max_position_embeddings=48).anatomy
    assert ExportOptions().resolved(stretched).context_length == 48
    with pytest.raises(ValueError, match="resolved"):
        ExportOptions().parity_lengths()


def test_the_folder_is_whole_checked_and_accounted_for(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    (artifact,) = export.run(bundle, ONNX, tmp_path)
    place = tmp_path / "onnx"
    export.require_parity([artifact])
    assert artifact.parity is not None
    assert artifact.parity.tokens_checked == 2 * 64 + 64
    assert artifact.parity.longest_tokens == 64
    assert artifact.parity.executed_by.startswith("onnxruntime ")
    assert (artifact.path, artifact.bytes, artifact.sha256) == (str(place), folder_bytes(place), hash_folder(place))
    assert set(artifact.versions) == {"dwindle", "onnx", "onnxruntime", "torch", "transformers"}
    manifest = read_manifest(place)
    on_disk = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
    assert [f["path"] for f in manifest["files"]] == [p for p in on_disk if p != "manifest.json"]
    for file in manifest["files"]:
        assert (place / file["path"]).stat().st_size == file["bytes"]
        assert hash_file(place / file["path"]) == file["sha256"]
    assert {"model.onnx", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "genai_config.json"} <= set(on_disk)  # fmt: skip
    assert manifest["format"] == "onnx"
    assert manifest["source"]["sha256"] == bundle.content_sha256
    assert manifest["source"]["lineage"][0]["step"] == "origin"
    assert manifest["runtime"]["opsets"] == {"ai.onnx": 23, "com.microsoft": 1}
    assert (manifest["context_length"], manifest["vocabulary"]) == (64, 272)
    assert manifest["parity"]["passed"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"]


def test_an_evaluation_text_shorter_than_the_context_is_read_whole(
    tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    ids = torch.arange(40)[None] + 10
    short = TokenSet(ids, "evaluation", "text.txt", "0" * 64, 40, "1" * 64)
    (artifact,) = export.run(tiny_bundle("llama"), ONNX, tmp_path, evaluation=short)
    assert artifact.parity is not None
    assert artifact.parity.passed
    assert artifact.parity.longest_tokens == 40


def test_details_carry_what_a_cost_model_needs(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    from dwindle.devices.workload import Workload

    bundle = tiny_bundle("llama", storage_dtype=torch.float16)
    (artifact,) = export.run(bundle, ONNX, tmp_path)
    details = artifact.details
    assert details["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert details["layers"]["model.layers.1.mlp.down_proj"] == {
        "parameters": 2048, "bits": 16.0, "bytes": 4096, "format": "float16"}  # fmt: skip
    assert sum(row["bytes"] for row in details["layers"].values()) == bundle.size().bytes == details["bytes"]
    workload = Workload.from_artifact(artifact)
    assert workload.weight_bytes == workload.streamed_bytes == bundle.size().bytes


def test_both_formats_of_one_bundle(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    bundle = tiny_bundle("llama", num_hidden_layers=1)
    artifacts = export.run(bundle, ExportOptions(prompts=1), tmp_path)
    export.require_parity(artifacts)
    assert [a.format for a in artifacts] == ["onnx", "coreml"]
    coreml = read_manifest(tmp_path / "coreml")
    assert artifacts[1].minimum_os == coreml["runtime"]["minimum_os"] == "iOS 18 / macOS 15"
    assert coreml["runtime"]["fp16_peak"] < 65504
    assert coreml["kv_bytes_per_token"] * 2 == artifacts[0].details["kv_bytes_per_token"]
    assert any(f["path"].startswith("model.mlpackage/") for f in coreml["files"])
    ids = torch.arange(12)[None]
    logits = [export.open_artifact(tmp_path / name).step(ids) for name in ("onnx", "coreml")]
    torch.testing.assert_close(*logits, rtol=0, atol=0.05)


def test_an_overflow_of_float16_is_told(caplog: pytest.LogCaptureFixture) -> None:
    runner: Any = SimpleNamespace(fp16_peak=7e4)
    assert export_step._observed(runner) == {"fp16_peak": 7e4}
    assert "exceeds float16's largest" in caplog.text


def test_the_same_bundle_exports_to_the_same_folder(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    first, second = (export.run(tiny_bundle("qwen3"), ONNX, tmp_path / name)[0] for name in "ab")
    assert first.sha256 == second.sha256


def test_a_reopened_artifact_runs_and_anything_else_is_refused(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    export.run(bundle, ONNX, tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = bundle.model(ids).logits[0]
    torch.testing.assert_close(export.open_artifact(tmp_path / "onnx").step(ids), expected, rtol=0, atol=1e-4)
    with pytest.raises(OutputError, match="no readable manifest"):
        export.open_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 90_000)
    with pytest.raises(OutputError, match="nested too deeply"):
        export.open_artifact(tmp_path)
    (tmp_path / "onnx" / "model.onnx").unlink()
    with pytest.raises(OutputError, match=r"holds no model\.onnx"):
        export.open_artifact(tmp_path / "onnx")
    (tmp_path / "manifest.json").write_text('{"schema": 1, "format": "tflite"}')
    with pytest.raises(RecipeError, match="format 'tflite' cannot be executed here"):
        export.open_artifact(tmp_path)


def test_places_that_hold_something_else_are_refused(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    place = tmp_path / "onnx"
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds something else \(no artifact of dwindle\)"):
        export.run(bundle, ONNX, tmp_path)
    assert (place / "thesis.txt").exists()
    (place / "thesis.txt").unlink()
    (place / "manifest.json").write_text('{"schema": 1, "format": "coreml"}')
    with pytest.raises(OutputError, match=r"holds something else \(coreml\)"):
        export.run(bundle, ONNX, tmp_path)
    (place / "manifest.json").unlink()
    export.run(bundle, ONNX, tmp_path)
    export.run(bundle, ONNX, tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "onnx").write_text("a file")
    with pytest.raises(OutputError, match="is a file, a folder is needed"):
        export.run(bundle, ONNX, tmp_path / "b")


def test_what_a_format_cannot_carry_is_refused_before_any_work(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    weight = PalettizedWeight(torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(1, 16).half(), 4, 64)
    apply_quantized_weights(bundle.model, {"model.layers.0.mlp.up_proj": weight})
    with pytest.raises(RecipeError, match="1 weights are palettes"):
        export.run(bundle, ONNX, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_int8_activations_have_limits_of_their_own(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    name = "model.layers.0.mlp.up_proj"
    codes = torch.randint(0, 16, (64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    apply_quantized_weights(bundle.model, {name: AffineWeight(codes, torch.full((64, 1), 0.02).half(), None, 4, 32)})
    strict, wide = (export.run(bundle, ExportOptions(formats=("onnx",), activations=kind), tmp_path)[0].parity
                    for kind in ("float32", "int8"))  # fmt: skip
    assert strict is not None
    assert wide is not None
    assert strict.passed
    assert wide.passed
    assert wide.max_abs_logit_error > strict.limits["max_abs_logit_error"]


def test_a_chat_template_travels_along(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    bundle.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    export.run(bundle, ONNX, tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    assert reloaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_prompts_that_do_not_fit_are_refused(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    prompts = [torch.zeros(1, 17, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)]
    with pytest.raises(RecipeError, match=r"2 prompts have the shapes \[\[1, 17\], \[4\]\]; .* 1 to 16 tokens"):
        export.run(bundle, ONNX, tmp_path, prompts=prompts)


def test_a_miss_is_told_kept_and_not_raised(
    tiny_bundle: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, other = tiny_bundle("llama"), tiny_bundle("llama", seed=1)
    original = backends.BACKENDS["onnx"].write
    wrong = dataclasses.replace(
        backends.BACKENDS["onnx"], write=lambda _, folder, options, adapters: original(other, folder, options, adapters)
    )
    monkeypatch.setitem(backends.BACKENDS, "onnx", wrong)
    (artifact,) = export.run(bundle, ONNX, tmp_path)
    assert artifact.parity is not None
    assert not artifact.parity.passed
    assert read_manifest(tmp_path / "onnx")["parity"]["passed"] is False


def test_a_crash_leaves_the_earlier_export(
    tiny_bundle: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle("llama")
    (artifact,) = export.run(bundle, ONNX, tmp_path)

    def crash(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(export_step, "decode_parity", crash)
    with pytest.raises(RuntimeError, match="killed"):
        export.run(bundle, ONNX, tmp_path)
    assert hash_folder(tmp_path / "onnx") == artifact.sha256
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"]


def test_a_missing_library_names_the_pip_line(
    tiny_bundle: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle("llama")
    export.run(bundle, ONNX, tmp_path)
    for name in [n for n in sys.modules if n.startswith("dwindle.export.onnx_")]:
        # Set to what it is, so that the package, too, has this very module again afterwards and not a second one.
        monkeypatch.setattr(export, name.rpartition(".")[2], sys.modules[name])
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dwindle\[onnx\]'"):
        export.run(bundle, ONNX, tmp_path / "b")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dwindle\[onnx\]'"):
        export.open_artifact(tmp_path / "onnx")


def test_a_missing_module_of_ours_is_not_a_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"dwindle\.export\.absent"):
        backends._module("absent", "onnx")


def greedy(bundle: ModelBundle, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, bundle.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma3_text"])
def test_onnxruntime_genai_runs_the_folder(family: str, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    bundle = tiny_bundle(family, eos_token_id=None)
    bundle.model.generation_config.eos_token_id = 259
    export.run(bundle, ExportOptions(formats=("onnx",), prompts=1), tmp_path)
    prompt = [256, *range(40, 52)]
    model = genai.Model(str(tmp_path / "onnx"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 8)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert [int(i) for i in generator.get_sequence(0)] == greedy(bundle, prompt, 8)


@pytest.mark.filterwarnings("ignore")
def test_optimum_loads_the_folder(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("optimum.onnxruntime")
    bundle = tiny_bundle("llama")
    export.run(bundle, ExportOptions(formats=("onnx",), prompts=1), tmp_path)
    model = onnxruntime.ORTModelForCausalLM.from_pretrained(tmp_path / "onnx")
    ids = torch.tensor([[256, *range(40, 52)]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = bundle.model(ids).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-4)
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=259,
                           pad_token_id=258)  # fmt: skip
    assert found[0].tolist() == greedy(bundle, ids[0].tolist(), 8)


def test_the_genai_config_knows_ends_and_padding(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    bundle.model.generation_config.eos_token_id = [257, 259]
    export.run(bundle, ExportOptions(formats=("onnx",), prompts=1), tmp_path)
    model = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (256, [257, 259], 258)


@pytest.mark.parametrize("name", ["stories260K", "babyllama-105", "pycode-6m"])
def test_real_models(name: str, assets: Path, tmp_path: Path) -> None:
    bundle = ModelBundle.load(assets / "models" / name)
    (artifact,) = export.run(bundle, ONNX, tmp_path)
    export.require_parity([artifact])
    assert artifact.bytes <= 1.1 * bundle.size().bytes + 600_000
