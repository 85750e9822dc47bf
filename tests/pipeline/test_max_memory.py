"""`--max-memory` on the command line: kept by every long command, told with its sum, and nothing that was finished is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from dwindle import memory_limit
from dwindle.pipeline.cli import COMMANDS, cli, main
from dwindle.resources import memory_limit_bytes

LONG = ["run", "demo", "reproduce", "prune", "distill", "quantize", "recover", "adapt", "export", "evaluate",
        "data build", "data synthesize", "adapters merge", "adapters traces"]  # fmt: skip


def invoke(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return int(end.value.code or 0), told


@pytest.mark.parametrize("name", LONG)
def test_every_long_command_takes_it(name: str) -> None:
    context = click.Context(cli)
    command: Any = cli
    for word in name.split():
        command = command.get_command(context, word)
    assert "--max-memory" in {option for parameter in command.params for option in parameter.opts}
    assert name.split()[0] in COMMANDS


@pytest.mark.parametrize("size", ["much", "0", "-1GB", "1e400"])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, told = invoke(capsys, "run", tmp_path / "none.yaml", "-o", tmp_path / "out", f"--max-memory={size}")
    assert code == 2
    assert "--max-memory" in told
    assert size in told
    assert memory_limit_bytes() is None


def test_a_training_that_cannot_fit_is_refused_before_it_begins(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_limit, "held_bytes", lambda process: 0)
    train, teacher = workshop / "train.txt", workshop / "teacher"
    code, told = invoke(capsys, "distill", "-t", teacher, "-m", teacher, "-d", train, "-o", tmp_path / "out", "--tokens",
                        "2k", "--max-memory", "1MB")  # fmt: skip
    assert code == 2
    assert "(gradients 0.00 GB + moments 0.00 GB), 0.00 GB are left under --max-memory 0.00 GB." in told
    assert not (tmp_path / "out").exists()


# The end may come between the opening of a file and its `with`, as Ctrl-C may: the collector closes it then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_run_over_it_ends_and_goes_on(
    recipe_of: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(recipe_of(steps=[
        {"prune": {"ffn_keep": 0.5}},
        {"distill": {"losses": [{"name": "forward_kl"}], "tokens": 4096, "batch_size": 4}},
    ]).to_yaml())  # fmt: skip
    pruned = run / "steps" / "01-prune" / "record.json"
    monkeypatch.setattr(memory_limit, "_started_by_this", list)  # other tests may have left a helper running
    monkeypatch.setattr(memory_limit, "held_bytes", lambda process: 9 * 10**9 if pruned.exists() else 0)
    code, told = invoke(capsys, "run", recipe, "-o", run, "--max-memory", "8GB")
    assert code == 2
    # alone, or after "train: memory ran out with 1 windows ...", as the watch meets it in a save or in a step
    assert "memory: 9.00 GB are held (9.00 GB by this process), and --max-memory allows 8.00 GB." in told, told
    assert memory_limit_bytes() is None
    assert not (run / "report.json").exists()
    before = pruned.stat().st_mtime_ns
    monkeypatch.undo()
    code, _ = invoke(capsys, "run", recipe, "-o", run, "--max-memory", "100GB")
    assert code == 0
    assert pruned.stat().st_mtime_ns == before, "the finished step was done again"
    assert [step["name"] for step in json.loads((run / "report.json").read_text())["steps"]] == ["prune", "distill"]
