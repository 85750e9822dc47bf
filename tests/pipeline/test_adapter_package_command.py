"""`dwindle export --adapter` and `dwindle adapters package`: what they print, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwindle.pipeline.cli import main

FAST = ["--set", "decode_steps=4", "--set", "prompts=1", "--set", "longest_tokens=8"]


def ended(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(str(end.value.code or 0))


def test_export_with_an_adapter_and_one_added_later(
    tiny_bundle: Callable[..., Any], write_adapter: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bundle = tiny_bundle()
    bundle.save(tmp_path / "model")
    first, later = (str(write_adapter(bundle, tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 2)))
    other = str(write_adapter(tiny_bundle(seed=5), tmp_path / "other"))
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    assert ended("export", "-m", model, "-o", out, "--format", "onnx", "--adapter", first, "--json", *FAST) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["artifacts"][0]["details"]["adapters"][0]["name"] == "a"
    package = ["adapters", "package", later, "--for", f"{out}/onnx", "-o", str(tmp_path / "late")]
    assert ended(*package) == 0
    assert "loaded, not compared (give -m)" in capsys.readouterr().out
    assert ended(*package, "-m", model) == 0
    assert "onnx: adapter.onnx_adapter" in capsys.readouterr().out
    assert ended("export", "-m", model, "-o", out, "--format", "onnx", "--adapter", other, "--adapter", first) == 2
    assert "trained on tiny" in capsys.readouterr().err
    assert ended("adapters", "package", other, "--for", f"{out}/onnx", "-o", str(tmp_path / "x")) == 2
    assert ended("adapters", "package", later, "--for", str(tmp_path), "-o", str(tmp_path / "x")) == 2
    assert "no readable manifest.json" in capsys.readouterr().err
