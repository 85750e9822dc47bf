from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from dwindle.pipeline import doctor
from dwindle.pipeline.doctor import CONFLICTS, Diagnosis, conflicts_in, examine, installed_versions

GOOD = {"dwindle": "0.1.0", "coremltools": "9.0", "numpy": "2.3.5", "transformers": "4.57.6", "optimum-onnx": "0.1.0",
        "huggingface-hub": "0.36.2", "onnxruntime-genai": "0.15.2", "torch": "2.13.0+cpu"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "pairs"),
    [
        ({}, []),
        ({"numpy": "2.4.6"}, [("coremltools", "numpy")]),
        ({"numpy": "2.4.6", "coremltools": None}, []),
        ({"transformers": "5.2.0", "huggingface-hub": "1.2.0"}, [("optimum-onnx", "transformers")]),
        ({"onnxruntime-genai": "0.16.1"}, [("onnxruntime-genai", "transformers")]),
        ({"coreai-core": "1.0.0b3", "numpy": "2.2.0"}, [("coreai-core", "numpy")]),
        ({"huggingface-hub": "1.0.0"}, [("transformers", "huggingface-hub")]),
        ({"transformers": "4.40.0"}, [("dwindle", "transformers")]),
        ({"trl": "0.9"}, [("dwindle", "trl")]),
        ({"numpy": "no version"}, []),
    ],
)
def test_known_conflicts(change: dict[str, str | None], pairs: list[tuple[str, str]]) -> None:
    found = conflicts_in({**GOOD, **change})
    assert [(c.package, c.other) for c in found] == pairs


def test_every_row_can_be_read_and_mended() -> None:
    for row in CONFLICTS:
        assert SpecifierSet(row.when)
        assert SpecifierSet(row.needs)
        assert row.remedy.startswith("pip install ")


def test_problems_name_versions_and_remedy() -> None:
    versions = {**GOOD, "numpy": "2.4.6"}
    found = Diagnosis(versions, {}, conflicts_in(versions), (), ("torch",))
    assert found.problems[0] == "torch is not installed. Run: pip install torch"
    assert "coremltools 9.0 with numpy 2.4.6 (needed numpy <2.4)" in found.problems[1]
    assert "2 problem(s)" in found.text()


def test_this_machine() -> None:
    found = examine(tries_imports=False)
    assert found.versions["torch"]
    json.dumps(found.to_json(), allow_nan=False)
    assert "What can run here" in found.text()
    assert any(a.name == "run Core ML packages" and a.available == (sys.platform == "darwin") for a in found.abilities)


def test_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "coremltools", "numpy")
    code = "import sys\nfrom dwindle.pipeline.doctor import examine\nexamine(tries_imports=False)\n"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_missing_packages_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", gone)
    assert set(installed_versions().values()) == {None}
    assert not any(a.available for a in doctor._abilities(installed_versions(), is_mac=False))
    assert "torch is not installed" in examine(tries_imports=False).problems[0]


@pytest.mark.parametrize(
    ("driver", "version", "available"),
    [(False, "2.13.0", False), (True, "2.13.0+cpu", False), (True, None, False), (True, "2.13.0", True)],
)
def test_cuda(monkeypatch: pytest.MonkeyPatch, driver: bool, version: str | None, available: bool) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    assert doctor._cuda(version).available is available
