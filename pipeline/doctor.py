"""What is installed, which of it is known not to go together, and what can run on this machine.

Versions come from the packages' metadata, and whether an optional package can be imported is tried in a process of its
own (`imports`): nothing is imported here. The conflicts are a table, each row a case that was met: when `package`
satisfies `when`, `other` must satisfy `needs`.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dwindle.pipeline.environment import package_versions
from dwindle.pipeline.imports import OPTIONAL, broken_packages

__all__ = ["CONFLICTS", "Ability", "Conflict", "Diagnosis", "conflicts_in", "examine", "installed_versions"]

PACKAGES = (
    "dwindle", "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "datasets", "pyarrow",
    "peft", "onnx", "onnxruntime", "onnxscript", "onnxruntime-genai", "optimum", "optimum-onnx", "coremltools",
    "coreai-core", "coreai-torch", "coreai-opt", "torchao", "protobuf", "scikit-learn", "trl",
)  # fmt: skip
_REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "pyarrow")


@dataclass(frozen=True)
class Conflict:
    """A pair of packages that fails together: if `package` is `when`, then `other` must be `needs`."""

    package: str
    when: str
    other: str
    needs: str
    why: str
    remedy: str


CONFLICTS: tuple[Conflict, ...] = (
    Conflict("coremltools", "<=9.0", "numpy", "<2.4",
             "Core ML conversion ends in 'only 0-dimensional arrays can be converted to Python scalars'",
             "pip install 'numpy>=2.0,<2.4'"),
    Conflict("optimum-onnx", "<=0.1.0", "transformers", "<4.58", "optimum-onnx does not import with transformers 5",
             "pip install 'transformers>=4.57,<4.58', or uninstall optimum-onnx"),
    Conflict("onnxruntime-genai", ">=0.16", "transformers", ">=5",
             "the model builder of onnxruntime-genai 0.16 and later needs transformers 5 (its runtime does not)",
             "pip install 'onnxruntime-genai<0.16'"),
    Conflict("coreai-core", ">=1.0.0b1", "numpy", ">=2.3", "Core AI's packages need a newer numpy",
             "pip install 'numpy>=2.3,<2.4'"),
    Conflict("transformers", ">=5", "huggingface-hub", ">=1", "transformers 5 uses the hub client's new interface",
             "pip install -U huggingface-hub"),
    Conflict("transformers", "<5", "huggingface-hub", "<1", "transformers 4 refuses the hub client 1.0 and later",
             "pip install 'huggingface-hub<1'"),
    Conflict("dwindle", ">=0", "transformers", ">=4.57,<6", "dwindle was never tested with other versions",
             "pip install 'transformers>=4.57,<6'"),
    Conflict("dwindle", ">=0", "datasets", ">=4.7", "older versions do not resolve beside pyarrow's present ones",
             "pip install 'datasets>=4.7'"),
    Conflict("dwindle", ">=0", "trl", ">=1.0", "resolvers fall back to versions that do not install here",
             "pip install 'trl>=1.0'"),
)  # fmt: skip


@dataclass(frozen=True)
class Ability:
    """Something that can or cannot be done on this machine."""

    name: str
    available: bool
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """Versions, conflicts and abilities; `problems` is what needs mending."""

    versions: Mapping[str, str | None]
    machine: Mapping[str, Any]
    conflicts: tuple[Conflict, ...]
    abilities: tuple[Ability, ...]
    missing: tuple[str, ...]
    broken: Mapping[str, str] = field(default_factory=dict)
    """Import name of an installed package -> why it cannot be imported."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Return one line per conflict or missing requirement, each with its remedy."""
        lines = [f"{name} is not installed. Run: pip install {name}" for name in self.missing]
        lines += [
            f"{name} is installed but cannot be imported ({why}), so there is no {OPTIONAL.get(name, name)}. "
            f"Run: pip install --force-reinstall {name.replace('_', '-')}"
            for name, why in self.broken.items()
        ]
        lines += [
            f"{c.package} {self.versions[c.package]} with {c.other} {self.versions[c.other]} "
            f"(needed {c.other} {c.needs}): {c.why}. Run: {c.remedy}"
            for c in self.conflicts
        ]
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the diagnosis for `--json`."""
        return {
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "problems": list(self.problems),
            "abilities": [asdict(a) for a in self.abilities],
        }

    def text(self) -> str:
        """Return the diagnosis for a terminal: problems last, where the eye rests."""
        lines = ["Machine", *(f"  {k:20} {v}" for k, v in self.machine.items()), "", "Versions"]
        lines += [f"  {k:20} {v or 'not installed'}" for k, v in self.versions.items()]
        lines += ["", "What can run here"]
        lines += [f"  {'yes' if a.available else 'no ':4} {a.name:32} {a.why}" for a in self.abilities]
        lines += ["", f"{len(self.problems)} problem(s)" if self.problems else "No known conflicts."]
        return "\n".join([*lines, *(f"  {p}" for p in self.problems)])


def installed_versions() -> dict[str, str | None]:
    """Return the version of every package that matters, None where it is not installed. Imports none of them."""
    return package_versions(PACKAGES)


def conflicts_in(versions: Mapping[str, str | None]) -> tuple[Conflict, ...]:
    """Return the rows of the table that these versions fall under. Local parts such as +cpu do not count."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    def within(name: str, wanted: str) -> bool | None:
        version = versions.get(name)
        if version is None:
            return None
        try:
            return SpecifierSet(wanted, prereleases=True).contains(Version(version).public)
        except InvalidVersion:
            return None

    return tuple(c for c in CONFLICTS if within(c.package, c.when) and within(c.other, c.needs) is False)


def examine(*, tries_imports: bool = True) -> Diagnosis:
    """Return what is installed, broken, in conflict and possible on this machine; trying imports takes seconds."""
    versions = installed_versions()
    missing = tuple(name for name in _REQUIRED if versions[name] is None)
    return Diagnosis(
        versions, _machine(), conflicts_in(versions), _abilities(versions, sys.platform == "darwin"), missing,
        broken_packages() if tries_imports else {},
    )  # fmt: skip


def _machine() -> dict[str, Any]:
    import psutil

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB",
    }


def _abilities(versions: Mapping[str, str | None], is_mac: bool) -> tuple[Ability, ...]:
    def extra(name: str, package: str, names_extra: str, can: str) -> Ability:
        there = versions[package] is not None
        why = f"{can} ({package} {versions[package]})" if there else f"Run: pip install 'dwindle[{names_extra}]'"
        return Ability(name, there, why)

    core_ml = versions["coremltools"] is not None
    return (
        extra("export to ONNX", "onnx", "onnx", "writes model.onnx"),
        extra("run ONNX artifacts", "onnxruntime", "onnx", "parity and measurements on this machine"),
        extra("export to Core ML", "coremltools", "coreml", "writes an iOS 18 package, on any system"),
        Ability("check Core ML numbers", core_ml, "dwindle evaluates the saved package itself, in float32" if core_ml
                else "Run: pip install 'dwindle[coreml]'"),
        Ability("run Core ML packages", is_mac and core_ml, "through the Core ML runtime" if is_mac and core_ml
                else "only macOS has the Core ML runtime; speed on a phone is estimated"),
        extra("run Core AI assets", "coreai-core", "coreai", "Apple's interpreter on the CPU"),
        _cuda(versions["torch"]),
    )  # fmt: skip


def _cuda(torch_version: str | None) -> Ability:
    driver = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    cpu_build = torch_version is not None and "+cpu" in torch_version
    if not driver:
        return Ability("train on a CUDA GPU", False, "no NVIDIA driver here; training runs on the CPU")
    if torch_version is None or cpu_build:
        return Ability(
            "train on a CUDA GPU",
            False,
            "there is a GPU, but torch is missing or a CPU build: pip install torch from PyTorch's CUDA index",
        )
    return Ability("train on a CUDA GPU", True, f"torch {torch_version} with an NVIDIA driver; add --torch-device cuda")
