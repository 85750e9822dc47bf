"""`dwindle quantize`: to a size, by a plan that is shown and can be edited, in memory or block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dwindle.bundle import ModelBundle
from dwindle.pipeline.cli import main


def invoke(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["quantize", *(str(word) for word in words)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(end.value.code or 0), captured.out, captured.err


@pytest.fixture
def words(workshop: Path, tmp_path: Path) -> list[object]:
    return ["-m", workshop / "teacher", "-o", tmp_path / "out", "--scheme", "palettize"]


@pytest.mark.parametrize("with_text", [False, True])
def test_a_target_is_reached_and_the_plan_is_shown(
    capsys: pytest.CaptureFixture[str], words: list[object], workshop: Path, tmp_path: Path, with_text: bool
) -> None:
    data = ["-d", workshop / "train.txt"] if with_text else []
    code, out, err = invoke(capsys, *words, "--target-bits-per-weight", "4", *data, "--json")
    assert code == 0, err
    after = json.loads(out)["after"]
    assert 3 < after["bits_per_weight_linear"] <= 4
    assert ModelBundle.load(tmp_path / "out").size().bytes == after["bytes"]
    assert "bits/weight" in err


def test_a_plan_is_written_edited_and_applied(
    capsys: pytest.CaptureFixture[str], words: list[object], tmp_path: Path
) -> None:
    code, out, _ = invoke(capsys, *words, "--target-bits-per-weight", "4", "--dry-run")
    assert code == 0
    assert not (tmp_path / "out").exists()
    plan = json.loads(out)
    for layer in plan["layers"]:
        layer["bits"] = 6 if layer["name"].endswith("q_proj") else 2
    (tmp_path / "bits.json").write_text(json.dumps(plan))
    code, out, err = invoke(capsys, *words, "--plan", tmp_path / "bits.json", "--json")
    assert code == 0, err
    layers = {layer["name"]: layer["bits"] for layer in json.loads(out)["details"]["layers"]}
    assert {bits for name, bits in layers.items() if name.endswith("q_proj")} == {6}
    assert {bits for name, bits in layers.items() if name.endswith("v_proj")} == {2}


def test_large_checkpoints_are_worked_on_block_by_block(
    capsys: pytest.CaptureFixture[str], words: list[object], workshop: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options: list[object] = ["--target-bits-per-weight", "4", "-d", workshop / "train.txt", "--json"]
    options += ["--set", "importance=fisher", "--method", "kmeans"]
    code, whole, _ = invoke(capsys, *words, *options)
    assert code == 0
    monkeypatch.setattr("dwindle.weight_source.STREAMED_PARAMETERS", 0)
    monkeypatch.setattr(ModelBundle, "load", None)
    other = [tmp_path / "streamed" if word == tmp_path / "out" else word for word in words]
    code, streamed, err = invoke(capsys, *other, *options)
    assert code == 0, err
    assert "block by block" in err
    assert json.loads(streamed)["after"] == json.loads(whole)["after"]


def test_a_device_sets_the_size(capsys: pytest.CaptureFixture[str], words: list[object]) -> None:
    code, out, err = invoke(capsys, *words, "--target", "iphone-15-pro", "--json")
    assert code == 0, err
    assert "iPhone 15 Pro" in err
    plan = json.loads(out)["details"]["plan"]
    assert any("asks for nothing" in note for note in plan["notes"])


def test_what_has_no_flag_is_set_by_name(
    capsys: pytest.CaptureFixture[str], words: list[object], workshop: Path, tmp_path: Path
) -> None:
    found = {}
    for windows in (2, 8):
        options: list[object] = ["-d", workshop / "train.txt", "--set", f"data.calibration_windows={windows}"]
        code, out, err = invoke(
            capsys, *words, *options, "--set", "data.context=32", "--set", "embedding_bits=4", "--json"
        )
        assert code == 0, err
        found[windows] = json.loads(out)
        assert found[windows]["after"]["bits_per_weight_embedding"] == 4.5
    assert found[2]["details"]["layers"] != found[8]["details"]["layers"]


REFUSED: dict[str, tuple[list[str], str]] = {
    "a runtime that cannot": (["--bits", "3", "--for", "coreai"], "palettes of 3 bits"),
    "no such runtime": (["--for", "toaster"], "toaster"),
    "palettes for ONNX": (["--for", "onnx"], "scheme=palettize"),
    "groups that do not divide": (["--group-size", "7"], "not divisible by group_size=7"),
    "an unreachable target": (["--target-bits-per-weight", "0.2"], "the least is"),
    "an unreachable size": (["--target-bytes", "10"], "no allocation reaches target_bytes"),
    "two targets": (["--target-bytes", "1MB", "--target-bits-per-weight", "3"], "one of the two"),
    "a device and a target": (["--target", "pixel-9", "--target-bytes", "1MB"], "sets a size itself"),
    "bits and a target": (["--bits", "4", "--target-bytes", "1MB"], "Give one of the two"),
    "bits and a device": (["--bits", "4", "--target", "pixel-9"], "Give one of the two"),
    "no such device": (["--target", "iphone-99"], "iphone-99"),
    "a method without its text": (["--method", "lnq"], "needs a calibration text"),
    "a method without its text, before a plan": (
        ["--method", "lnq", "--target-bits-per-weight", "3"],
        "needs a calibration text",
    ),
    "an option that the method does not look at": (["--set", "guided=true"], "and the method is kmeans"),
    "no such method": (["--method", "gptq"], "needed with palettize"),
    "no such key": (["--set", "embeding_bits=4"], "did you mean 'embedding_bits'?"),
    "no such key of the data": (["-d", "{short}", "--set", "data.windows=4"], "data.windows is unknown"),
    "a key given twice": (["--bits", "3", "--set", "bits=2"], "gives it already"),
    "too short a text": (["-d", "{short}"], "Add data"),
    "no such plan": (["--plan", "{tmp}/none.json"], "cannot be read"),
    "a plan that is none": (["--plan", "{short}"], "is not JSON"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], words: list[object], tmp_path: Path, case: str
) -> None:
    asked, told = REFUSED[case]
    (tmp_path / "short.txt").write_text("too short")
    code, _, err = invoke(capsys, *words, *(w.format(short=tmp_path / "short.txt", tmp=tmp_path) for w in asked))
    assert (code, told in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_a_place_in_other_use_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], words: list[object], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    code, _, err = invoke(capsys, *words)
    assert (code, "holds something else than a model (thesis.txt)" in err, "loading" in err) == (2, True, False)


def test_what_stays_float_is_said_block_by_block_too(
    capsys: pytest.CaptureFixture[str], words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwindle.weight_source.STREAMED_PARAMETERS", 0)
    code, out, err = invoke(capsys, *words, "--keep-float", "*.o_proj")
    assert code == 0, err
    assert "Not done: quantize model.layers.0.self_attn.o_proj: kept in" in out


def test_weights_that_are_no_numbers_are_named(
    capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(workshop / "teacher", tmp_path / "broken")
    tensors: dict[str, Any] = load_file(tmp_path / "broken" / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"):
        tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    for streamed in (False, True):
        if streamed:
            monkeypatch.setattr("dwindle.weight_source.STREAMED_PARAMETERS", 0)
        code, _, err = invoke(capsys, "-m", tmp_path / "broken", "-o", tmp_path / "out", "--scheme", "integer")
        assert code == 2
        assert "model.layers.0.mlp.up_proj" in err
        assert "model.layers.1.self_attn.v_proj" in err
        assert not (tmp_path / "out").exists()
