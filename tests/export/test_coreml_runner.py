"""Bare and foreign packages: found, recognized by their interface, fed; and what is refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.errors import OutputError, RecipeError
from dwindle.export.coreml_files import PACKAGE, SPECIFICATION_FILE, read_specification
from dwindle.export.coreml_package import export_coreml
from dwindle.export.coreml_runner import CoreMLEvaluatorRunner, CoreMLNativeRunner, open_package
from dwindle.export.options import ExportOptions


@pytest.fixture(scope="module")
def exported(tiny_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A one-layer Llama in float and the folder of its flexible package."""
    bundle, folder = tiny_bundle("llama", num_hidden_layers=1), tmp_path_factory.mktemp("exported")
    export_coreml(bundle, folder, ExportOptions(decode_steps=8))
    return bundle, folder


def _renamed(package: Path, names: dict[str, str]) -> None:
    """Give a flexible package's inputs other names, and no metadata, as another's converter would have."""
    message = read_specification(package)
    message.description.ClearField("metadata")
    body = message.mlProgram.functions["main"]
    for feature in (*message.description.input, *body.inputs):
        feature.name = names.get(feature.name, feature.name)
    for op in body.block_specializations[body.opset].operations:
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = names.get(binding.name, binding.name)
    (package / SPECIFICATION_FILE).write_bytes(message.SerializeToString())


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML itself would compile the package")
def test_a_bare_package_of_another_spelling_is_fed(exported: tuple[Any, Path], tmp_path: Path) -> None:
    bundle, folder = exported
    package = tmp_path / "Other.mlpackage"
    shutil.copytree(folder / PACKAGE, package)
    _renamed(package, {"input_ids": "inputIds", "causal_mask": "causalMask"})
    runner = open_package(package)
    assert isinstance(runner, CoreMLEvaluatorRunner)
    assert (runner.context, runner.vocabulary) == (64, 272)
    ids = torch.arange(20)[None]
    logits = torch.cat([runner.step(ids[:, :15]), runner.step(ids[:, 15:])])
    with torch.no_grad():
        wanted = bundle.model(ids).logits[0]
    assert (logits - wanted).abs().max() < 5e-3 * wanted.abs().max()


def test_a_place_without_packages_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no Core ML package\. Give a \.mlpackage"):
        CoreMLEvaluatorRunner(tmp_path)
    with pytest.raises(OutputError, match=r"gone\.mlpackage is no Core ML package"):
        CoreMLEvaluatorRunner(tmp_path / "gone.mlpackage")


@pytest.mark.skipif(sys.platform == "darwin", reason="says what is missing elsewhere")
def test_core_ml_itself_is_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Core ML runs on macOS"):
        CoreMLNativeRunner(tmp_path)


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="needs Core ML")
def test_core_ml_runs_a_bare_package(exported: tuple[Any, Path]) -> None:
    bundle, folder = exported
    runner = open_package(folder / PACKAGE)
    assert isinstance(runner, CoreMLNativeRunner)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = bundle.model(ids).logits[0]
    assert (runner.step(ids) - wanted).abs().max() < 0.05 * wanted.abs().max()
