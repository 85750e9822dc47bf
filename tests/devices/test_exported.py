from __future__ import annotations

import json
from pathlib import Path

import pytest

from dwindle.devices import read_artifact, run_of
from dwindle.devices.exported import open_exported
from dwindle.errors import UnsupportedModel

from .conftest import write_decoder


def test_folders_that_are_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no exported decoder"):
        open_exported(tmp_path)
    (tmp_path / "model.onnx").touch()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="not a JSON object"):
        open_exported(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="context length"):
        open_exported(tmp_path)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8}')
    with pytest.raises(UnsupportedModel, match="a vocabulary of 1 or more"):
        open_exported(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 1, "task": "feature-extraction"}')
    with pytest.raises(UnsupportedModel, match="an encoder"):
        open_exported(tmp_path)


def test_what_a_folder_says(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "run" / "export" / "onnx")
    assert (open_exported(folder).context_length, open_exported(folder).name) == (32, "onnx")
    layers = {"lm_head": {"bits": 4, "bytes": 10, "parameters": 20, "format": "int4"}}
    manifest = {"schema": 1, "format": "onnx", "context_length": 16, "vocabulary": 11, "layers": layers}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "run" / "recipe.yaml").touch()
    opened = open_exported(folder)
    assert (opened.context_length, opened.name, opened.run) == (16, "export/onnx", run_of(folder))
    assert read_artifact(folder).details["layers"] == layers
    assert read_artifact(folder).sha256 == opened.identity()["sha256"]
