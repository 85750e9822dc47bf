"""What is installed is pinned and hashed: the lock files hold every pin, the files of each, and nothing else."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
UNLOCKED = {"torch", "dwindle"}
"""torch has other files of the same version on other indexes; dwindle is what is installed."""


def pins(*names: str) -> set[str]:
    lines = [line for name in names for line in (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines()]
    return {_plain(line) for line in lines if line.strip() and not line.startswith("#")}


def _plain(requirement: str) -> str:
    name, _, version = requirement.strip().partition("==")
    assert version, f"{requirement!r} is not pinned"
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


def locked(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines():
        if "==" in line:
            hashes = found.setdefault(_plain(line.rstrip(" \\")), [])
        else:
            hashes += re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})(?: \\)?", line).groups()  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(
    ("lock", "sources"),
    [("lock.txt", ("full.txt", "models.txt")), ("transformers5-lock.txt", ("transformers5.txt",))],
)
def test_every_pin_is_locked_by_the_hashes_of_its_files(lock: str, sources: tuple[str, ...]) -> None:
    found = locked(lock)
    assert found.keys() == pins(*sources), "the lock is older than the pins: make lock"
    assert all(found.values())


def test_nothing_that_is_needed_is_left_out() -> None:
    """Every requirement of dwindle and, in turn, of what it requires is locked: `--no-deps` leaves nothing to a resolver."""
    from packaging.requirements import Requirement

    known = {pin.partition("==")[0] for pin in locked("lock.txt")} | UNLOCKED
    missing, seen, waiting = set[str](), set[str](), ["dwindle", "torch"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            plain = re.sub(r"[-_.]+", "-", needed.name).lower()
            if plain not in known:
                missing.add(f"{plain} (for {name})")
            elif plain not in seen:
                waiting.append(plain)
    assert not missing


def test_setup_installs_by_the_hashes() -> None:
    made = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "LOCKED  ?= --require-hashes -r requirements/lock.txt" in made
    assert "--no-deps $(LOCKED)" in made
