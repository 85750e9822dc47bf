from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dwindle.pipeline.cli import main
from dwindle.report import Artifact, Measurement, Report, StepRecord


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run folder whose recipe asks for one target and one budget."""
    layers = {"lm_head": {"bits": 4.5, "bytes": 9_000_000, "parameters": 16_000_000, "format": "int4"}}
    details = {"layers": layers, "kv_bytes_per_token": 1000, "context_length": 1024, "vocabulary": 1000}
    artifact = Artifact("onnx", "export/onnx", 9_100_000, "0" * 64, variant="onnx", details=details)
    after = Measurement(1, 1, 4.5, nats_per_token=1.0, kl_nats_per_token=0.1, top1_agreement=0.9)
    step = StepRecord("quantize", Measurement(1, 1, 32.0), after, variant="onnx")
    folder = tmp_path / "run; touch x"
    folder.mkdir()
    (folder / "report.json").write_text(Report(steps=(step,), artifacts=(artifact,)).dumps())
    (folder / "recipe.yaml").write_text(
        "version: 1\nsteps:\n- validate: {targets: [pixel-8], budgets: {tokens_per_second: 1, kl: 0.2}}\n"
    )
    return folder


def invoke(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in ("validate", *words)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(end.value.code or 0), captured.out, captured.err


def test_the_recipes_targets_and_budgets_hold(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, finished)
    assert code == 0
    assert out.startswith("pixel-8: passed  (export/onnx)")
    assert "tokens/s (estimated" in out
    assert re.search(r"peak_memory_bytes +[0-9.]+ [kM]B \(estimated, [0-9.]+ [kM]B to [0-9.]+ [kM]B\)  ok: <= ", out)
    assert "ok: >= 1 tokens/s" in out
    assert "kl_nats_per_token                0.1 nats/token (measured)  ok: <= 0.2 nats/token" in out
    kept = json.loads((finished / "validation.json").read_text())
    assert (kept["exit_code"], kept["targets"][0]["profile"]) == (0, "pixel-8")
    suite = ElementTree.fromstring((finished / "validation.xml").read_text())
    assert suite.get("failures") == "0"
    assert "budget.pixel-8" in {case.get("classname") for case in suite}


def test_flags_and_files_come_before_the_recipe(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished.parent / "budgets.yaml"
    file.write_text("top1_agreement: 95%\n")
    code, _, err = invoke(capsys, finished, "--target", "pixel-9", "--budgets", file, "--budget", "package <= 1GB")
    assert code == 1
    assert err == "FAILED budget: pixel-9 top1_agreement = 0.9 share (measured), needed >= 95 %\n"
    code, out, err = invoke(capsys, finished, "--require", "measured", "--json")
    assert code == 1
    assert "needed >= 1 tokens/s, measured" in err
    assert json.loads(out)["exit_code"] == 1
    code, _, _ = invoke(capsys, finished, "--junit", finished.parent / "here.xml")
    assert (finished.parent / "here.xml").read_bytes() == (finished / "validation.xml").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "memory <= 1.5"], "1.5 of what? Give a unit"),
        (["--budget", "tokns >= 3"], "no metric"),
        (["--budgets", "none.yaml"], "cannot be read"),
        (["--target", "pixel-99"], "pixel-9"),
        (["--require", "guessed"], "not one of measured"),
    ],
)
def test_bad_input(finished: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    code, _, err = invoke(capsys, finished, *words)
    assert code == 2
    assert said in err


def test_quick_and_without_torch(finished: Path) -> None:
    code = (
        "import sys\nfrom dwindle.pipeline.cli import main\n"
        f"try: main(['validate', {str(finished)!r}])\nexcept SystemExit as end: print('exit', end.code)\n"
        "print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        after = os.times()  # processor time: other load on the machine stays out of the figure
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert done.stdout.endswith("exit 0\n[]\n")
    assert min(seconds) < 2, seconds


def test_a_file_in_place_of_a_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = invoke(capsys, finished / "report.json")
    assert code == 2
    assert f"report.json is a file. Give the run's folder: {finished}" in err
