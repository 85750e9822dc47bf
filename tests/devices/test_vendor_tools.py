"""Apple's tools and AI Hub cannot run here; what can be checked is how they refuse, and shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dwindle.devices import BenchOptions, measure
from dwindle.errors import TargetError

from .conftest import write_decoder


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
@pytest.mark.parametrize("on", ["apple:mac", "apple:Anna's iPhone; touch x"])
def test_apple_only_from_a_mac(tmp_path: Path, on: str) -> None:
    with pytest.raises(TargetError, match="from a Mac only"):
        measure(write_decoder(tmp_path / "onnx"), on, BenchOptions())
