"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import dwindle

MODULES = sorted(m.name for m in pkgutil.walk_packages(dwindle.__path__, "dwindle.") if not m.name.endswith("__main__"))
ROOMS = ("data", "prune", "distill", "adapters", "quantize", "export", "devices", "pipeline", "starter")


def modules() -> list[str]:
    found = list(MODULES)
    for room in ROOMS:
        package = importlib.import_module(f"dwindle.{room}")
        found += [m.name for m in pkgutil.walk_packages(package.__path__, f"dwindle.{room}.")]
    return sorted(set(found))


@pytest.mark.parametrize("name", modules())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_every_room_is_walked() -> None:
    assert {f"dwindle.{room}" for room in ROOMS} <= {name.rpartition(".")[0] for name in modules()}
