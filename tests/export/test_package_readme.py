"""The README of an exported folder: its facts are the manifest's, its Python runs as it stands, its licence is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dwindle.bundle import ModelBundle
from dwindle.errors import OutputError
from dwindle.export.artefact import manifest_of, model_facts, write_companions
from dwindle.export.licence import licence_files, licence_lines
from dwindle.export.options import ExportOptions
from dwindle.export.package_readme import write_readme
from dwindle.lineage import Lineage
from dwindle.report import Parity, Skipped

_CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
_PARITY = Parity(1.5e-6, 2e-12, 1.0, 160, "the runtime of a test 1.0", True,
                 {"max_abs_logit_error": 1e-3, "kl_nats_per_token": 1e-8, "top1_agreement": 0.98}, 64)  # fmt: skip


def manifest_for(bundle: ModelBundle, kind: str, parity: Parity = _PARITY, **runtime: Any) -> dict[str, Any]:
    return manifest_of(
        kind, bundle, facts=model_facts(bundle, 64, 4), runtime=runtime, versions={"onnx": "1"}, parity=parity,
        not_executed=[Skipped("A phone", "there is none here")],
    )  # fmt: skip


def blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme.read_text(), re.DOTALL)


def run_python(readme: Path) -> str:
    (program,) = blocks(readme, "python")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=readme.parent, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("chat", [False, True])
def test_the_python_of_an_onnx_folder_runs(chat: bool, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    from dwindle.export.genai_config import genai_config
    from dwindle.export.onnx_graph import export_onnx
    from dwindle.storage import write_json

    bundle = tiny_bundle("llama", eos_token_id=None)
    bundle.model.generation_config.eos_token_id = 259
    if chat:
        bundle.tokenizer.chat_template = _CHAT
    options = ExportOptions(formats=("onnx",)).resolved(bundle.anatomy)
    export_onnx(bundle, tmp_path, options)
    write_json(tmp_path / "genai_config.json", genai_config(bundle, options))
    write_companions(bundle, tmp_path)
    readme = write_readme(tmp_path, manifest_for(bundle, "onnx"), licence_lines=licence_lines(bundle))
    printed, text = run_python(readme), readme.read_text()
    assert ("apply_chat_template" in text) is chat
    assert ("chat template in `" in text) is chat
    prompt = "user: Hello\n:" if chat else "Once upon a time"
    assert printed.startswith(prompt)
    assert len(printed.strip()) > len(prompt)
    (kotlin,) = blocks(readme, "kotlin")
    assert 'setSearchOption("max_length", 64.0)' in kotlin
    assert len(blocks(readme, "python")[0].strip().splitlines()) <= 14
    assert "not executed here" in text


def test_facts_are_those_of_the_manifest(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    (tmp_path / "model.onnx").write_bytes(b"x" * 1234)
    write_companions(bundle, tmp_path)
    manifest = manifest_for(
        bundle, "onnx", opsets={"ai.onnx": 23, "com.microsoft": 1}, minimum_runtime="onnxruntime 1.23"
    )
    text = write_readme(tmp_path, manifest, licence_lines=["Licence: made for a test."]).read_text()
    count = f"{manifest['parameters']:,}"
    for line in (
        f"# llama, {count} parameters, as ONNX",
        f"| Weights | {manifest['bytes']:,} bytes (32.00 bits each) |",
        "| Stored as | 20 x float32 |",
        "| Longest text | 64 tokens |",
        f"| KV cache | {manifest['kv_bytes_per_token']} bytes a token, {64 * manifest['kv_bytes_per_token']:,} at most |",
        "| Operator sets | ai.onnx 23, com.microsoft 1 |",
        "| Runs on | onnxruntime 1.23 |",
        "- Licence: made for a test.",
        "| model.onnx | 1,234 | the model |",
        "| largest error of an output | 1.5e-06 | at most 0.001 |",
        "| same first choice | 100.00% | at least 98.00% |",
        "Not executed: A phone (there is none here).",
    ):
        assert line in text.splitlines(), f"{line}\n{text}"
    assert "executed by the runtime of a test 1.0 on 160 tokens, the longest text being 64 tokens long" in text
    assert "{{" not in text
    assert "\n\n\n" not in text
    assert write_readme(tmp_path, manifest, licence_lines=["Licence: made for a test."]).read_text() == text


def test_a_failed_check_is_told_first(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    missed = replace(_PARITY, passed=False, max_abs_logit_error=7.0)
    text = write_readme(tmp_path, manifest_for(bundle, "onnx", missed), licence_lines=[]).read_text()
    assert "Do not ship it." in text
    assert "| largest error of an output | 7 | at most 0.001 |" in text


@pytest.mark.parametrize("static", [False, True])
def test_swift_of_core_ml_names_what_the_package_has(
    static: bool, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = tiny_bundle("llama")
    write_companions(bundle, tmp_path)
    (tmp_path / "model.mlpackage" / "Data").mkdir(parents=True)
    (tmp_path / "model.mlpackage" / "Data" / "weight.bin").write_bytes(b"x" * 2048)
    runtime = {"shapes": "static", "prefill_tokens": 16} if static else {"shapes": "dynamic"}
    text = write_readme(tmp_path, manifest_for(bundle, "coreml", **runtime), licence_lines=[]).read_text()
    (swift,) = blocks(tmp_path / "README.md", "swift")
    for name in (
        "input_ids",
        "causal_mask",
        "makeState()",
        "using: state",
        "model.mlpackage",
        "Float16",
        "[257].contains",
    ):
        assert name in swift, name
    assert ("position" in swift) is ("functionName" in swift) is ('function("prefill")' in swift) is static
    assert ("let slots = 64" in swift) is static
    assert "| model.mlpackage | 2,048 | the model |" in text
    assert "weight.bin" not in text
    assert "not executed here" in text


def test_a_cut_model_says_how_its_packages_follow(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    for number in (1, 2):
        (tmp_path / f"model_0{number}_of_02.mlpackage").mkdir()
    text = write_readme(tmp_path, manifest_for(bundle, "coreml"), licence_lines=[]).read_text()
    assert "The model is cut into 2 packages" in text
    assert "| model_02_of_02.mlpackage | 0 | a part of the model |" in text
    assert "`hidden_out`" in text


def test_the_interface_is_the_one_that_core_ml_and_core_ai_have() -> None:
    """The names in the templates are those of the exporters, so that a renamed input is found here."""
    folder = Path(__file__).resolve().parents[2] / "export"
    coreml = (folder / "coreml_convert.py").read_text() + (folder / "coreml_package.py").read_text()
    for name in ("input_ids", "causal_mask", "position", "logits", "hidden", "hidden_out", "prefill", "decode"):
        assert f'"{name}"' in coreml, name
    coreai = (folder / "coreai_asset.py").read_text()
    for name in ("input_ids", "position_ids", "key_cache", "value_cache", "logits", "prefill", "decode"):
        assert f'"{name}"' in coreai, name


@pytest.mark.parametrize("static", [False, True])
def test_swift_of_core_ai(static: bool, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("qwen3")
    write_companions(bundle, tmp_path)
    runtime = {"shapes": "static", "prefill_tokens": 16} if static else {"shapes": "dynamic"}
    text = write_readme(tmp_path, manifest_for(bundle, "coreai", **runtime), licence_lines=[]).read_text()
    (swift,) = blocks(tmp_path / "README.md", "swift")
    assert "let shape = [2, 1, 2, 64, 16]" in swift
    assert f"scalarType: .{'float16' if static else 'float32'}" in swift
    assert ("exactly 16 tokens" in text) is static
    assert "neither compiled nor executed here" in text
    assert "it ends at token 257" in text


def test_unknown_formats_are_refused(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    manifest = {**manifest_for(tiny_bundle("llama"), "onnx"), "format": "gguf"}
    with pytest.raises(OutputError, match="no README is known for format 'gguf'; known: onnx, coreml, coreai"):
        write_readme(tmp_path, manifest, licence_lines=[])


def test_licence_lines_say_what_the_source_says(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    made = tiny_bundle("llama")
    assert licence_lines(made) == [
        "Source: tiny-llama; hashes of its files are in manifest.json.",
        "Licence: not known; the folder it was loaded from is not there. Ask whoever made the model before you ship it.",
    ]
    assert licence_files(made) == []
    folder = tmp_path / "source"
    made.save(folder)
    (folder / "lineage.json").unlink()
    loaded = ModelBundle.load(folder)
    assert licence_lines(loaded) == [
        "Source: source; hashes of its files are in manifest.json.",
        "Licence: not known; its folder says nothing. Ask whoever made the model before you ship it.",
    ]
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-terms\ntags: [a]\n---\n# A model\n")
    (folder / "LICENSE.txt").write_text("\n  Terms of tiny models, version 2\nMore.\n")
    assert licence_lines(loaded)[1:] == [
        "Licence: other, tiny-terms, says the model card, README.md of the source.",
        "Licence file of the source: LICENSE.txt, which begins: Terms of tiny models, version 2",
    ]
    assert [path.name for path in licence_files(loaded)] == ["LICENSE.txt"]
    changed = replace(loaded, lineage=loaded.lineage.adding("quantize", {"bits": 4}, {}))
    assert licence_lines(changed)[1] == "Changed since by dwindle: quantize (`source.lineage` in manifest.json)."


@pytest.mark.parametrize(
    "card", ["# No front matter", "---\n: [\n---\n", "---\n- a list\n---\n", "---\ntags: [x]\n---\n"]
)
def test_a_card_without_a_licence(card: str, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    tiny_bundle("llama").save(folder)
    (folder / "README.md").write_text(card)
    (folder / "LICENSE").write_text("")
    lines = licence_lines(ModelBundle.load(folder))
    assert lines[1:] == ["Licence file of the source: LICENSE, which begins: (nothing)"]


def test_a_source_without_lineage_is_told(tiny_bundle: Callable[..., Any]) -> None:
    bundle = replace(tiny_bundle("llama"), lineage=Lineage(()))
    assert licence_lines(bundle)[0].startswith("Source: not known;")
    named = replace(bundle, lineage=Lineage.origin("org/name", {}, revision="abc"))
    assert licence_lines(named)[0].startswith("Source: org/name, revision abc;")
    bundle.model.config.license = "mit"
    assert licence_lines(bundle)[1] == "Licence: mit, says config.json of the source."


@pytest.mark.parametrize(
    ("task", "extra"),
    [
        ("feature-extraction", {"pooling": ["mean"], "normalized": True}),
        ("feature-extraction", {"pooling": None}),
        ("feature-extraction", {"pooling": ["cls"]}),
        ("feature-extraction", {"pooling": ["max"]}),
        ("feature-extraction", {"pooling": ["cls", "mean"]}),
        ("text-classification", {"labels": ["no", "yes"]}),
        ("fill-mask", {}),
        ("question-answering", {}),
    ],
)
def test_the_python_of_every_encoder_compiles(
    task: str, extra: dict[str, Any], tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = tiny_bundle("llama")
    parity = {**asdict(_PARITY), "cosine_min": 0.9, "cosine_mean": 0.95}
    manifest = {
        **manifest_for(bundle, "onnx"),
        "task": task,
        "parity": parity,
        "pooling": None,
        "labels": None,
        **extra,
    }
    manifest.pop("kv_bytes_per_token")
    text = write_readme(tmp_path, manifest, licence_lines=[]).read_text()
    (program,) = blocks(tmp_path / "README.md", "python")
    compile(program, "README.md", "exec")
    assert f"| Task | {task} |" in text
    assert "KV cache" not in text
    assert "| smallest cosine of embeddings | 0.90000 | none |" in text
    assert ("names no pooling" in text) is (task == "feature-extraction" and extra["pooling"] is None)
    assert json.loads(json.dumps(manifest))["task"] == task
