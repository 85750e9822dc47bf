from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from dwindle.devices import BenchOptions, host_process, measure
from dwindle.devices.cost_model import METRIC_UNITS
from dwindle.errors import MissingExtra, TargetError, UnsupportedModel

from .conftest import write_decoder

pytest.importorskip("onnxruntime")
QUICK = BenchOptions(prompt_tokens=8, decode_tokens=4, threads=1, repeats=2)


def test_measures_in_a_fresh_process(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "onnx; touch x")
    heard: list[str] = []
    found = measure(folder, options=QUICK, heard=lambda event: heard.append(event["event"]))
    assert heard == ["start", "loaded", "warm_up", "repeat", "repeat", "end"]
    metrics = found.metrics()
    assert set(metrics) == set(METRIC_UNITS) - {"tokens_per_second_sustained"}
    assert all(m.basis == "measured" and m.value is not None and m.value > 0 for m in metrics.values())
    assert metrics["package_bytes"].value == sum(p.stat().st_size for p in folder.iterdir())
    rate = metrics["tokens_per_second"]
    assert rate.low is not None
    assert rate.high is not None
    assert rate.low <= (rate.value or 0) <= rate.high
    assert (metrics["peak_memory_bytes"].value or 0) < 200e6
    assert (found.complete, found.profile, found.stopped) == (True, "host", None)


@pytest.mark.parametrize(("flaw", "said"), [({"extra_input": True}, "mystery"), ({"cache": False}, "past_key_values")])
def test_graphs_that_are_no_decoder(tmp_path: Path, flaw: dict[str, bool], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        measure(write_decoder(tmp_path / "onnx", **flaw), options=QUICK)


def test_a_damaged_model(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "onnx")
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UnsupportedModel, match="the runtime there cannot run it"):
        measure(folder, options=QUICK)


def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Path:
    """Put another program in the runner's place; return a folder to measure."""
    place = tmp_path / "runner.py"
    place.write_text(code)
    monkeypatch.setattr(host_process, "RUNNER", place)
    return write_decoder(tmp_path / "onnx")


def test_a_process_that_dies_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runner(tmp_path, monkeypatch, "import os, sys; print('bye', file=sys.stderr); os._exit(7)")
    with pytest.raises(TargetError, match=r"without an answer \(bye\)"):
        measure(folder, options=QUICK)
    folder = runner(tmp_path, monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(TargetError, match=r"nothing was heard for 0\.5 s"):
        measure(folder, options=BenchOptions(timeout_seconds=0.5))


REPEAT = '{"event": "repeat", "index": 0, "first_token_seconds": 0.5, "token_seconds": [0.25, 0.25]}'


def test_what_came_before_the_end_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runner(tmp_path, monkeypatch, f"print('hello'); print('''{REPEAT}''')")
    found = measure(folder, options=QUICK)
    assert not found.complete
    assert "without an answer" in (found.stopped or "")
    assert found.metrics()["tokens_per_second"].value == 4.0


@pytest.mark.parametrize(
    ("event", "error", "said"),
    [
        ('{"event": "error", "kind": "missing", "error": "onnxruntime"}', MissingExtra, r"dwindle\[onnx\]"),
        ('{"event": "error", "kind": "memory", "error": "9 GB"}', TargetError, "not enough memory: 9 GB"),
        ('{"event": "error", "kind": "refused", "error": "no"}', UnsupportedModel, "cannot run it: no"),
        ('{"event": "surprise"}', TargetError, "'surprise', which is no event"),
    ],
)
def test_errors_of_the_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        measure(runner(tmp_path, monkeypatch, f"print('''{event}''')"), options=QUICK)


def test_the_runner_stands_alone(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.py"
    copy.write_bytes(host_process.RUNNER.read_bytes())
    code = f"import sys; sys.path = [p for p in sys.path if 'dwindle' not in p]; exec(open({str(copy)!r}).read())"
    done = subprocess.run(["/usr/bin/env", "python3", "-S", "-c", f"import sys; sys.argv=['r','--help']; {code}"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert "--prompt-tokens" in done.stdout
    text = copy.read_text()
    assert "dwindle" not in text.replace("nothing of dwindle", "").replace('"dwindle.', "")


def test_ids_and_caches_of_both_forms(tmp_path: Path) -> None:
    from dwindle.devices.board_runner import OnnxDecoder

    decoder: Any = OnnxDecoder(write_decoder(tmp_path / "onnx"), 1, 32)
    decoder.step([1, 2, 3])
    decoder.step([4])
    assert decoder.length == 4
    assert decoder.cache[0].shape() == [1, 2, 4, 4]
    decoder.reset()
    assert decoder.cache[0].shape() == [1, 2, 0, 4]
