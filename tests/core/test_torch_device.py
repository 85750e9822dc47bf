"""A device that is not there is refused before anything is loaded, and what is there is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.torch_device import usable_device


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device("cuda") == torch.device("cuda")
    assert usable_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(RecipeError, match=r"cuda:2: this torch .* sees 2 GPUs. Take cpu or cuda:0 or cuda:1"):
        usable_device("cuda:2")


def test_devices_that_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"--torch-device cuda: this torch .* sees no GPU\. Take cpu\."):
        ModelBundle.load(tmp_path, torch_device="cuda")
    with pytest.raises(RecipeError, match=r"--torch-device mps: no Apple GPU here"):
        usable_device("mps")
    with pytest.raises(RecipeError, match=r"--torch-device gpu: torch knows no such device. Take cpu"):
        usable_device("gpu")
