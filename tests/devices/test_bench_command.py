from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import dwindle.devices as room
from dwindle.devices import host_process, read_artifact
from dwindle.pipeline.cli import main
from dwindle.pipeline.commands import targets as commands
from dwindle.report import Report

from .conftest import write_decoder

pytest.importorskip("onnxruntime")
QUICK = ("--prompt-tokens", "8", "--decode-tokens", "4", "--repeats", "2", "--threads", "1")


def invoke(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in ("bench", *words)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(end.value.code or 0), captured.out, captured.err


def test_measured_and_kept_in_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_decoder(tmp_path / "run" / "export" / "onnx")
    (tmp_path / "run" / "recipe.yaml").touch()
    code, out, err = invoke(capsys, folder, *QUICK, "--set", "context=20", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["on"], found["artifact"], found["complete"]) == ("host", "export/onnx", True)
    assert found["protocol"]["context"] == 20
    assert {m["name"] for m in found["metrics"]} >= {"tokens_per_second", "peak_memory_bytes"}
    assert "repeat 2:" in err
    kept = json.loads(Path(found["written"]).read_text())
    assert kept["repeats"] == found["repeats"]
    assert Path(found["written"]).parent == tmp_path / "run" / "measurements"
    code, out, _ = invoke(capsys, folder, *QUICK)
    assert code == 0
    assert "tokens/s (measured" in out
    assert re.search(r"package_bytes +[0-9.]+ [kM]?B \(measured\)", out)
    assert re.search(r"time_to_first_token_seconds +[0-9.]+ ms \(measured", out)
    assert "Written:" in out


def test_partial_results_are_kept_and_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    event = {"event": "repeat", "index": 0, "first_token_seconds": 0.5, "token_seconds": [0.25, 0.25]}
    place = tmp_path / "runner.py"
    place.write_text(f"print({json.dumps(event)!r})")
    monkeypatch.setattr(host_process, "RUNNER", place)
    folder = write_decoder(tmp_path / "run" / "export" / "onnx")
    (tmp_path / "run" / "recipe.yaml").touch()
    code, out, err = invoke(capsys, folder, *QUICK, "--json")
    assert code == 2
    assert json.loads(out)["complete"] is False
    assert json.loads(out)["written"].endswith("-partial.json")
    assert "INCOMPLETE: 1 of 2 repeats" in err


def test_an_interrupted_measurement_is_kept_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(event: Any) -> None:
        if event["event"] == "repeat":
            raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_tell", interrupt)
    code, out, err = invoke(capsys, write_decoder(tmp_path / "onnx"), *QUICK, "--json")
    assert code == 130
    assert json.loads(out)["complete"] is False
    assert "INCOMPLETE: 1 of 2 repeats: interrupted" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--on", "sssh://board"], "did you mean 'ssh'"),
        (["--on", "ssh://-oProxyCommand=touch x"], "needed ssh://user@board"),
        (["--profile", "iphone-15pro"], "did you mean 'iphone-15-pro'"),
        (["--repeats", "0"], "repeats=0"),
        (["--set", "promt_tokens=3"], "did you mean 'prompt_tokens'"),
        (["--set", "repeats=3", "--repeats", "3"], "gives it already"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    code, _, err = invoke(capsys, write_decoder(tmp_path / "onnx"), *words)
    assert code == 2
    assert said in err


def test_no_torch_for_a_measurement(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys\nfrom dwindle.pipeline.cli import main\n"
        f"try: main(['bench', {str(write_decoder(tmp_path / 'onnx'))!r}, '--prompt-tokens', '4', '--repeats', '1'])\n"
        "except SystemExit as end: print('exit', end.code)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("exit 0\n[]\n")


def test_a_report_shows_what_was_measured_since(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The record of the run stays; the page, the tables, Markdown, JSON and the exit code follow the measurement."""
    run = tmp_path / "run"
    folder = write_decoder(run / "export" / "onnx")
    layers = {"lm_head": {"bits": 32, "bytes": 352, "parameters": 88, "format": "float32"}}
    facts = {"context_length": 32, "vocabulary": 11, "kv_bytes_per_token": 64, "layers": layers}
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "format": "onnx", **facts}))
    options = {"targets": ["pixel-9"], "budgets": ["tokens_per_second >= 1"], "require": "measured", "prompt_tokens": 8}
    (run / "recipe.yaml").write_text(json.dumps({"steps": [{"validate": options}]}))
    artifact = dataclasses.replace(read_artifact(folder), path="export/onnx")
    verdicts, _ = room.run(room.ValidateOptions(("pixel-9",), ("tokens_per_second >= 1",), "measured",
                                                prompt_tokens=8), [(artifact, folder)])  # fmt: skip
    recorded = Report(artifacts=(artifact,), targets=verdicts).dumps()
    (run / "report.json").write_text(recorded)

    def report(*words: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["report", str(run), *(str(word) for word in words)])
        return int(end.value.code or 0), capsys.readouterr().out

    assert report()[0] == 1
    assert not (run / "report.html").exists()
    assert invoke(capsys, folder, *QUICK, "--profile", "pixel-9")[0] == 0
    code, out = report("--markdown")
    assert code == 0
    assert "(measured)" in out
    page = (run / "report.html").read_text()
    assert page.count('<span class="basis measured">') > 2
    (target,) = json.loads(report("--json")[1])["targets"]
    assert {m["name"]: m["basis"] for m in target["metrics"]}["tokens_per_second"] == "measured"
    assert (run / "report.json").read_text() == recorded


def test_what_has_a_flag_can_be_set_by_name_too(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = invoke(capsys, "none", "--set", "repeats=0")
    assert (code, "repeats=0: must be at least 1" in err) == (2, True)
