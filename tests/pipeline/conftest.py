"""A tiny teacher on disk, a small text, and one whole run that many tests read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dwindle.pipeline.recipe import Recipe

WORDS = [
    "the",
    "small",
    "red",
    "fox",
    "ran",
    "over",
    "a",
    "green",
    "hill",
    "and",
    "saw",
    "one",
    "blue",
    "bird",
    "near",
    "the",
    "old",
    "warm",
    "house",
    "today",
]


def text(paragraphs: int, seed: int) -> str:
    import random

    rng = random.Random(seed)
    return "\n\n".join(" ".join(rng.choices(WORDS, k=40)).capitalize() + "." for _ in range(paragraphs)) + "\n"


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Callable[..., Any]) -> Path:
    """A folder with teacher/ (tiny random Llama), train.txt and valid.txt."""
    folder = tmp_path_factory.mktemp("workshop")
    tiny_bundle("llama", intermediate_size=128).save(folder / "teacher")
    (folder / "train.txt").write_text(text(80, 1))
    (folder / "valid.txt").write_text(text(6, 2))
    return folder


@pytest.fixture(scope="session")
def recipe_of(workshop: Path) -> Callable[..., Recipe]:
    """Factory of the small recipe; keyword `steps` replaces its steps, positional strings are overrides."""

    def make(*overrides: str, steps: list[Any] | None = None) -> Recipe:
        return Recipe.parse(
            {
                "version": 1,
                "name": "small",
                "teacher": {"model": str(workshop / "teacher")},
                "data": {"train": [str(workshop / "train.txt")], "evaluation": str(workshop / "valid.txt"),
                         "calibration_windows": 8},
                "steps": steps or [
                    {"prune": {"ffn_keep": 0.5}},
                    {"distill": {"losses": [{"name": "forward_kl"}], "tokens": 4096, "batch_size": 4}},
                    {"quantize": {"apple": {"scheme": "palettize"}, "onnx": {"scheme": "integer"}}},
                    {"export": {"formats": ["onnx", "coreml"], "float_formats": ["onnx"], "prompts": 1}},
                    {"validate": {"targets": ["iphone-15-pro", "raspberry-pi-5", "host"], "repeats": 1,
                                  "budgets": {"tokens_per_second": ">= 1"}}},
                ],
            },
            overrides,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def small_run(recipe_of: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of one finished run of the small recipe. Read it, do not change it: that is checked at the end."""
    from dwindle.pipeline.runner import run
    from dwindle.storage import hash_folder

    folder = tmp_path_factory.mktemp("run") / "out"
    report = run(recipe_of(), folder)
    assert report.exit_code == 0, report.failures
    before = hash_folder(folder)
    yield folder
    assert hash_folder(folder) == before, "a test changed the run that others read"
