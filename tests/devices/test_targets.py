from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dwindle.devices import host_probe, targets
from dwindle.devices.cost_model import METRIC_UNITS
from dwindle.devices.targets import BenchOptions, measure_host
from dwindle.errors import MissingExtra, RecipeError, UnsupportedModel

from .conftest import write_decoder

pytest.importorskip("onnxruntime")
QUICK = BenchOptions(prompt_tokens=8, decode_tokens=4, threads=1, repeats=2)


def test_measures_in_a_fresh_process(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "onnx")
    metrics = {m.name: m for m in measure_host(folder, QUICK)}
    assert set(metrics) == set(METRIC_UNITS) - {"tokens_per_second_sustained"}
    assert all(m.basis == "measured" and m.value is not None and m.value > 0 for m in metrics.values())
    assert metrics["package_bytes"].value == sum(p.stat().st_size for p in folder.iterdir())
    rate = metrics["tokens_per_second"]
    assert rate.low is not None
    assert rate.high is not None
    assert rate.low <= (rate.value or 0) <= rate.high
    assert (metrics["peak_memory_bytes"].value or 0) < 200e6


def test_probe_feeds_its_cache_back(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "onnx")
    decoder = host_probe._Decoder(folder / "model.onnx", 1)
    decoder.step([1, 2, 3])
    decoder.step([4])
    assert decoder.length == 4
    assert decoder.cache[0].shape() == [1, 2, 4, 4]
    decoder.reset()
    assert decoder.cache[0].shape() == [1, 2, 0, 4]


def test_prompt_is_cut_to_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_decoder(tmp_path / "onnx", context=10)
    seen: list[tuple[int, int]] = []

    def remember(folder: Path, prompt: int, decode: int, options: BenchOptions) -> dict[str, Any]:
        seen.append((prompt, decode))
        return {"token_seconds": [1.0], "first_token_seconds": [1.0], "load_seconds": 0.1, "peak_memory_bytes": 1}

    monkeypatch.setattr(targets, "_probe", remember)
    measure_host(folder)
    (folder / "manifest.json").write_text(json.dumps({"context_length": 200}))
    measure_host(folder)
    assert seen == [(5, 5), (100, 64)]


@pytest.mark.parametrize(("flaw", "said"), [({"extra_input": True}, "mystery"), ({"cache": False}, "past_key_values")])
def test_graphs_that_are_no_decoder(tmp_path: Path, flaw: dict[str, bool], said: str) -> None:
    folder = write_decoder(tmp_path / "onnx", **flaw)
    with pytest.raises(UnsupportedModel, match=said):
        measure_host(folder, QUICK)


def test_a_damaged_model(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "onnx")
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UnsupportedModel, match="ONNX Runtime cannot run it"):
        measure_host(folder, QUICK)


def test_folders_that_are_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"model\.onnx, config\.json not found"):
        measure_host(tmp_path)
    (tmp_path / "model.onnx").touch()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="not a JSON object"):
        measure_host(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="context length"):
        measure_host(tmp_path)


def test_a_process_that_dies_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_decoder(tmp_path / "onnx")
    dead = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(targets.subprocess, "run", lambda *a, **k: dead)
    with pytest.raises(UnsupportedModel, match="exit code -9"):
        measure_host(folder, QUICK)

    def hang(*arguments: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("probe", 1)

    monkeypatch.setattr(targets.subprocess, "run", hang)
    with pytest.raises(UnsupportedModel, match="did not end"):
        measure_host(folder, QUICK)


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_decoder(tmp_path / "onnx")
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"dwindle\[onnx\]"):
        measure_host(folder)


@pytest.mark.parametrize("name", ["prompt_tokens", "decode_tokens", "repeats", "threads", "timeout_seconds"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}=0"):
        BenchOptions(**{name: 0})


def test_main_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt-tokens", "4", "--decode-tokens", "2", "--repeats", "1", "--threads", "1"]
    assert host_probe.main([str(write_decoder(tmp_path / "onnx")), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["decode_tokens"] == 2
    assert host_probe.main([str(tmp_path / "none"), *flags]) == 1
    assert "error" in json.loads(capsys.readouterr().out)
