"""What a run ran on: versions, machine, threads. Stands in the report so that a number can be reproduced."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "environment", "git_commit", "package_versions"]

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "onnx", "onnxruntime", "coremltools")
"""Packages whose version can change a result."""


def package_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return the installed version of each package, None where it is not installed. Imports none of them."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def environment(torch_device: str = "cpu") -> dict[str, Any]:
    """Return versions, system, processor count, torch threads and the device of this process."""
    import torch

    import dwindle

    accelerator = torch.cuda.get_device_name(torch_device) if torch_device.startswith("cuda") else None
    return {
        "dwindle": dwindle.__version__,
        "python": platform.python_version(),
        "packages": package_versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_device": torch_device,
        "accelerator": accelerator,
        "processor": _processor(),
        "memory_bytes": _memory_bytes(),
        "code_sha256": _code_sha256(),
        "git_commit": git_commit(Path.cwd()),
    }


def _processor() -> str:
    """Return the processor's name as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _code_sha256() -> str:
    """Return a hash over all of dwindle's own sources: what a version number does not tell of a working copy."""
    from dwindle.pipeline.step_keys import code_sha256

    return code_sha256("data", "prune", "distill", "adapters", "quantize", "export", "devices", "pipeline")


def git_commit(folder: Path) -> str | None:
    """Return the commit of the repository that `folder` lies in, with `+` behind it if files differ; None without one.

    The repository's own settings are not trusted to name programs: hooks and file monitors stay off.
    """

    def ask(*words: str) -> str:
        command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
        return done.stdout.strip()

    try:
        return ask("rev-parse", "HEAD") + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
