from __future__ import annotations

import io
import itertools
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dwindle.errors import MissingExtra, RecipeError
from dwindle.progress import progress_bar
from dwindle.train import train
from dwindle.train_log import RunProgress, TrainLine, cut_log

sys.path.insert(0, str(Path(__file__).parent))
import tiny_training as tiny


def test_history_is_bounded_and_evenly_thinned() -> None:
    progress = RunProgress(step_tokens=10)
    for _ in range(5000):
        progress.close_line(progress.add(1.0, {"a": 2.0}, 1e-3, 0.5, 0.1))
    steps = [line.step for line in progress.result().history]
    assert 256 <= len(steps) <= 513
    assert (steps[0], steps[-1]) == (1, 5000)
    assert {b - a for a, b in itertools.pairwise(steps[:-1])} == {16}
    again = RunProgress.from_json(json.loads(json.dumps(progress.to_json())))
    assert again == progress


def test_progress_of_an_unfinished_line_survives_json() -> None:
    progress = RunProgress(step_tokens=10)
    progress.add(3.0, {"a": 1.0}, 1e-3, 0.5, 0.1)
    again = RunProgress.from_json(json.loads(json.dumps(progress.to_json())))
    line = again.close_line(again.add(1.0, {"a": 2.0}, 1e-3, 0.5, 0.1))
    assert (line.loss, line.parts, line.tokens, line.tokens_per_second) == (2.0, {"a": 1.5}, 20, 100.0)


def test_a_run_without_lines_has_no_result() -> None:
    with pytest.raises(RuntimeError, match="without a closed line"):
        RunProgress(step_tokens=1).result()


def test_cutting_a_log_drops_later_and_torn_lines(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_log(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_log(log, 0)
    assert log.read_text() == ""


def fake_service(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    module = types.ModuleType(name)
    module.init = lambda **given: calls.append(("init", given["project"], given["config"]["steps"]))  # type: ignore[attr-defined]
    module.log = lambda values, step: calls.append(("log", step, sorted(values)))  # type: ignore[attr-defined]
    module.finish = lambda: calls.append(("finish",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_each_log_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_service(monkeypatch, name)
    train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), replace(tiny.OPTIONS, log_every=6, trackers=(name,)))
    keys = ["grad_norm", "learning_rate", "loss", "parts/twice", "tokens", "tokens_per_second"]
    assert calls == [("init", "dwindle", 12), ("log", 6, keys), ("log", 12, keys), ("finish",)]


def test_a_tracker_is_closed_when_the_run_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_service(monkeypatch, "wandb")
    options = replace(tiny.OPTIONS, trackers=("wandb",))
    with pytest.raises(tiny.Interrupted):
        train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), options, on_step=tiny.interrupt_at(2))
    assert calls[-1] == ("finish",)


def fake_tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            calls.append((Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, step))

        def close(self) -> None:
            calls.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return calls


def test_tensorboard_goes_on_where_the_run_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_tensorboard(monkeypatch)
    options = replace(tiny.OPTIONS, log_every=6, trackers=("tensorboard",))
    arguments = (tiny.TinyLoss(), tiny.tiny_tokens(), options)
    with pytest.raises(tiny.Interrupted):
        train(tiny.TinyModel(), *arguments, folder=tmp_path, on_step=tiny.interrupt_at(8))
    assert calls[0] == ("tensorboard", None)
    assert ("loss", 6) in calls
    calls.clear()
    train(tiny.TinyModel(), *arguments, folder=tmp_path)
    assert calls[0] == ("tensorboard", 6)
    assert calls[-1] == ("close",)
    calls.clear()
    train(tiny.TinyModel(), *arguments, folder=tmp_path)
    assert calls == []


def test_tensorboard_needs_a_folder() -> None:
    with pytest.raises(RecipeError, match=r"'tensorboard' writes files\. Give the run a folder"):
        train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), replace(tiny.OPTIONS, trackers=("tensorboard",)))


def test_a_missing_tracker_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_service(monkeypatch, "trackio")
    monkeypatch.setitem(sys.modules, "wandb", None)
    options = replace(tiny.OPTIONS, trackers=("trackio", "wandb"))
    with pytest.raises(MissingExtra, match=r"the tracker 'wandb' needs an extra.*pip install 'dwindle\[wandb\]'"):
        train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), options, on_step=tiny.interrupt_at(1))
    assert calls[-1] == ("finish",)


def test_a_broken_tracker_is_told_from_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(RecipeError, match=r"'wandb' is installed but cannot be imported \(No module named 'a_module"):
        train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), replace(tiny.OPTIONS, trackers=("wandb",)))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    line = TrainLine(3, 300, 2.345, {}, 1e-3, 1.0, 1234.5, 0.1)
    for stream, shown, drawn in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(0, 12, shown) as update:
            update(line)
        assert ("3/12" in stream.getvalue()) == drawn
        assert ("loss 2.345" in stream.getvalue()) == drawn
        assert ("1,234 tokens/s" in stream.getvalue()) == drawn
