"""Apple's tools and AI Hub cannot run here; what can be checked is how they refuse, and shapes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dwindle.devices import BenchOptions, measure
from dwindle.devices.exported import open_exported
from dwindle.devices.hosted_phone import input_specs
from dwindle.errors import MissingExtra, TargetError, UnsupportedModel

from .conftest import write_decoder


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
@pytest.mark.parametrize("on", ["apple:mac", "apple:Anna's iPhone; touch x"])
def test_apple_only_from_a_mac(tmp_path: Path, on: str) -> None:
    with pytest.raises(TargetError, match="from a Mac only"):
        measure(write_decoder(tmp_path / "onnx"), on, BenchOptions())


def test_hosted_phones_need_their_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.devices.hosted_phone.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"dwindle\[aihub\]"):
        measure(write_decoder(tmp_path / "onnx"), "aihub:Samsung Galaxy S24", BenchOptions())


def test_fixed_shapes_for_hosted_phones(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "onnx")
    with pytest.raises(UnsupportedModel, match="fixed shapes"):
        input_specs(open_exported(folder), 4, 0)
    config = {"vocab_size": 11, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
              "hidden_size": 16}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    runtime = {"operators": "fused", "kv_cache": "float16"}
    (folder / "manifest.json").write_text(json.dumps({"format": "onnx", "context_length": 32, "runtime": runtime}))
    specs = input_specs(open_exported(folder), 1, 4)
    assert specs == {
        "input_ids": ((1, 1), "int64"),
        "attention_mask": ((1, 5), "int64"),
        "past_key_values.0.key": ((1, 2, 5, 4), "float16"),
        "past_key_values.0.value": ((1, 2, 5, 4), "float16"),
    }
