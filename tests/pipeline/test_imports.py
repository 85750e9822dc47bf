"""One broken vendor package costs the one feature that needs it, and doctor says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwindle.pipeline.doctor import Diagnosis
from dwindle.pipeline.imports import broken_packages, package_at_fault


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment in which two installed packages fail in their import, each in its own way."""
    for name, body in (("coremltools", "raise RuntimeError('libmilstoragepython.so is missing')"),
                       ("coreai_torch", "undefined_name"), ("optimum", "import a_package_that_is_gone")):  # fmt: skip
        (tmp_path / "vendor" / name).mkdir(parents=True)
        (tmp_path / "vendor" / name / "__init__.py").write_text(body + "\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "vendor")}


def run(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dwindle.pipeline.cli", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")


@pytest.mark.slow
def test_the_rest_works_and_the_feature_says_what_is_broken(
    broken: dict[str, str], recipe_of: Callable[..., Any], workshop: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    steps = [{"quantize": {"scheme": "integer"}}, {"export": {"formats": ["onnx"], "prompts": 1}}]
    recipe.write_text(recipe_of(steps=steps).to_yaml())
    done = run(broken, "run", recipe, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    refused = run(broken, "export", "-m", workshop / "teacher", "-o", tmp_path / "coreml", "--format", "coreml")
    assert refused.returncode == 2, refused.stderr
    assert "coremltools is installed but cannot be imported (RuntimeError: libmil" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_broken_packages_are_found(broken: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", broken["PYTHONPATH"])
    found = broken_packages(["coremltools", "coreai_torch", "optimum", "click", "not_installed_at_all"])
    assert found == {
        "coremltools": "RuntimeError: libmilstoragepython.so is missing",
        "coreai_torch": "NameError: name 'undefined_name' is not defined",
        "optimum": "ModuleNotFoundError: No module named 'a_package_that_is_gone'",
    }
    problems = Diagnosis({}, {}, (), (), (), {"coremltools": found["coremltools"]}).problems
    assert problems == ("coremltools is installed but cannot be imported (RuntimeError: libmilstoragepython.so is "
                        "missing), so there is no export to Core ML. Run: pip install --force-reinstall coremltools",)  # fmt: skip


def test_errors_of_our_own_are_nobodys_fault() -> None:
    with pytest.raises(ValueError, match="x") as caught:
        raise ValueError("x")
    assert package_at_fault(caught.value) is None
