"""What a run ran on: versions, machine, threads. Stands in the report so that a number can be reproduced."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

__all__ = ["PACKAGES", "environment", "package_versions"]

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
    }
