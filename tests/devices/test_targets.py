from __future__ import annotations

from pathlib import Path

import pytest

from dwindle.devices import BenchOptions, measure, parse_target
from dwindle.devices.ssh_board import Board
from dwindle.errors import RecipeError, UnsupportedModel

from .conftest import write_decoder


@pytest.mark.parametrize(
    ("text", "board"),
    [
        ("ssh://board", Board("board")),
        ("ssh://pi@raspberrypi.local:22", Board("raspberrypi.local", "pi", 22)),
        ("ssh://pi@[fe80::1]:2222", Board("fe80::1", "pi", 2222)),
    ],
)
def test_boards(text: str, board: Board) -> None:
    assert parse_target(text).board == board
    assert board.name == text


@pytest.mark.parametrize(
    "text",
    ["ssh://-oProxyCommand=x", "ssh://pi@-x", "ssh://-x@board", "ssh://board;touch x", "ssh://pi@board:0",
     "ssh://pi@board:70000", "ssh://pi@board:22; touch x", "ssh://a b@board", "ssh:board", "ssh://$(touch x)@board",
     "ssh://board\n"],
)  # fmt: skip
def test_names_that_are_no_board(text: str) -> None:
    with pytest.raises(RecipeError, match=r"needed ssh://user@board"):
        parse_target(text)


@pytest.mark.parametrize(("text", "said"), [("shh://board", "did you mean 'ssh'"), ("hosts", "did you mean 'host'")])
def test_unknown_kinds(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_target(text)


def test_runtimes_that_cannot_run_a_format(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="onnx is onnx, which onnxruntime, genai can run"):
        measure(write_decoder(tmp_path / "onnx"), options=BenchOptions(runtime="coreai"))
    package = tmp_path / "coreml"
    (package / "model.mlpackage").mkdir(parents=True)
    (package / "config.json").write_text('{"vocab_size": 9, "max_position_embeddings": 8}')
    with pytest.raises(UnsupportedModel, match="From a Mac"):
        measure(package)


@pytest.mark.parametrize("name", ["prompt_tokens", "decode_tokens", "repeats", "threads", "context", "timeout_seconds"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}=0"):
        BenchOptions(**{name: 0})


def test_all_mistakes_of_options_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        BenchOptions(warm_up=-1, runtime="onnxruntim", identity=tmp_path / "none", python="-c")  # type: ignore[arg-type]
    for said in ("warm_up=-1", "did you mean 'onnxruntime'", "no such file", "python='-c'"):
        assert said in str(caught.value)
