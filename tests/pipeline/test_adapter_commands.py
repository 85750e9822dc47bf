"""`dwindle recover` and `dwindle adapters` on a tiny model, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dwindle.pipeline.cli import cli
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized

pytest.importorskip("peft")
WORDS = "The cat sat on the mat. A dog ran to the tree, and the bird sang over it all day long.\n\n"


@pytest.fixture
def line(tiny_bundle: Callable[..., Any], tmp_path: Path) -> Path:
    teacher = tiny_bundle("llama", initializer_range=0.2)
    teacher.save(tmp_path / "teacher")
    quantized(teacher, QuantizeOptions(scheme="palettize", bits=2))[0].save(tmp_path / "packed")
    (tmp_path / "train.txt").write_text(WORDS * 60)
    (tmp_path / "test.txt").write_text("The bird sat on the tree and ran over the cat all day. " * 8)
    return tmp_path


def dwindle(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


def test_recover_writes_an_adapter_that_the_catalogue_shows(line: Path) -> None:
    done = dwindle("recover", "-t", line / "teacher", "-m", line / "packed", "-d", line / "train.txt", "-o",
                   line / "all" / "recovery", "--rank", 4, "--tokens", "4K", "--batch-size", 2, "--learning-rate",
                   "0.01", "--text", line / "test.txt", "--json")  # fmt: skip
    record = json.loads(done.stdout)
    assert record["name"] == "recover"
    assert record["after"]["kl_nats_per_token"] < record["before"]["kl_nats_per_token"]
    assert not list(line.glob("all/.*"))
    listed = json.loads(dwindle("adapters", "list", line / "all", "-m", line / "packed", "--json").stdout)["adapters"]
    assert [(one["name"], one["task"], one["rank"], one["fits"]) for one in listed] == [
        ("recovery", "recovery", 4, True)
    ]
    assert listed[0]["metrics"]["kl_closed"] > 0
    shown = dwindle("adapters", "show", line / "all" / "recovery").stdout
    assert "recovery" in shown
    assert listed[0]["base_sha256"] in shown


def test_nonsense_is_refused(line: Path) -> None:
    from dwindle.errors import RecipeError

    words = ["recover", "-t", line / "teacher", "-d", line / "train.txt", "-o", line / "a"]
    with pytest.raises(RecipeError, match="the model is not quantized"):
        dwindle(*words, "-m", line / "teacher")
    with pytest.raises(RecipeError, match=r"upp \(nearest: up"):
        dwindle(*words, "-m", line / "packed", "--target", "upp")
    with pytest.raises(RecipeError, match="rank"):
        dwindle(*words, "-m", line / "packed", "--rank", "many")
    assert not (line / "a").exists()
