"""Stopped runs end with the same bits as undisturbed ones, whatever stopped them."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwindle import checkpoint as checkpoint_module
from dwindle.errors import OutputError, RecipeError, UnsupportedModel
from dwindle.storage import hash_file, hash_json
from dwindle.train import TrainOptions, TrainResult, train

sys.path.insert(0, str(Path(__file__).parent))
import tiny_training as tiny

OPTIONS = replace(tiny.OPTIONS, steps=20, log_every=3)


def run(folder: Path | None, stop: int | None = None, options: TrainOptions = OPTIONS) -> tuple[TrainResult, nn.Module]:
    model = tiny.TinyModel(dropout=0.2)
    listen = None if stop is None else tiny.interrupt_at(stop)
    return train(model, tiny.TinyLoss(), tiny.tiny_tokens(), options, folder=folder, on_step=listen), model


def stopped(folder: Path, stop: int, options: TrainOptions = OPTIONS) -> None:
    with pytest.raises(tiny.Interrupted):
        run(folder, stop, options)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed() -> tuple[TrainResult, nn.Module]:
    return run(None)


def assert_same(found: tuple[TrainResult, nn.Module], expected: tuple[TrainResult, nn.Module]) -> None:
    for (name, a), (_, b) in zip(found[1].state_dict().items(), expected[1].state_dict().items(), strict=True):
        assert torch.equal(a, b), name

    def bare(result: TrainResult) -> TrainResult:
        history = tuple(replace(line, seconds=0.0, tokens_per_second=0.0) for line in result.history)
        return replace(result, seconds=0.0, history=history)

    assert bare(found[0]) == bare(expected[0])


def test_a_run_stopped_three_times_ends_with_the_same_bits(
    tmp_path: Path, undisturbed: tuple[TrainResult, nn.Module]
) -> None:
    for stop in (4, 7, 19):
        stopped(tmp_path, stop)
    assert_same(run(tmp_path), undisturbed)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 9, 12, 15, 18, 20]


def test_a_finished_run_only_loads_its_weights(tmp_path: Path, undisturbed: tuple[TrainResult, nn.Module]) -> None:
    run(tmp_path)
    before = (tmp_path / "run.jsonl").read_text()
    assert_same(run(tmp_path, stop=20), undisturbed)
    assert (tmp_path / "run.jsonl").read_text() == before


def test_a_killed_process_goes_on_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-P", str(Path(tiny.__file__)), str(tmp_path), "kill"], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(tmp_path) == [".step-00000010.partial", "step-00000005"]
    assert tiny.outcome(tmp_path) == tiny.outcome(None)
    assert names(tmp_path) == ["step-00000010", "step-00000012"]


def test_an_interrupted_checkpoint_leaves_no_trace(
    tmp_path: Path, undisturbed: tuple[TrainResult, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, 6)

    def interrupted(place: Path, data: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert names(tmp_path) == ["step-00000005"]
    assert_same(run(tmp_path), undisturbed)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "index", "not an object", "progress"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    damage: str, tmp_path: Path, undisturbed: tuple[TrainResult, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    options = replace(OPTIONS, checkpoints_kept=1, checkpoint_every=4)
    stopped(tmp_path, 6, options)
    shutil.copytree(tmp_path / "checkpoints" / "step-00000004", tmp_path / "kept")
    stopped(tmp_path, 10, options)
    shutil.move(tmp_path / "kept", tmp_path / "checkpoints" / "step-00000004")
    newest = tmp_path / "checkpoints" / "step-00000008"
    shards, index = newest / "__0_0.distcp", newest / "checkpoint.json"
    content = shards.read_bytes()
    if damage == "flip":
        shards.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        shards.write_bytes(content[:100])
    elif damage == "missing":
        shards.unlink()
    elif damage == "progress":
        index.write_text(index.read_text().replace('"step": 8', '"step": 9', 1))
    else:
        index.write_text("[]" if damage == "not an object" else index.read_text()[:50])
    with caplog.at_level(logging.WARNING, logger="dwindle"):
        assert_same(run(tmp_path, options=options), undisturbed)
    file = "checkpoint.json" if damage in ("index", "not an object", "progress") else "__0_0.distcp"
    assert [m for m in caplog.messages if "step-00000008: this checkpoint is damaged" in m and file in m]
    assert names(tmp_path) == ["step-00000020"]


class Intruder:
    """What a pickle may do when it is opened: here, make a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.place,))


def test_a_checkpoint_index_runs_no_code(tmp_path: Path) -> None:
    """Hashes do not help against someone who writes them too."""
    stopped(tmp_path, 6)
    folder = tmp_path / "checkpoints" / "step-00000005"
    (folder / ".metadata").write_bytes(pickle.dumps(Intruder(tmp_path / "intruded")))
    content = json.loads((folder / "checkpoint.json").read_text())
    content["files"][".metadata"] = hash_file(folder / ".metadata")
    del content["sha256"]
    (folder / "checkpoint.json").write_text(json.dumps({**content, "sha256": hash_json(content)}))
    with pytest.raises(UnsupportedModel, match=r"cannot be trusted \(it names pathlib"):
        run(tmp_path)
    assert not (tmp_path / "intruded").exists()


def test_with_no_whole_checkpoint_it_starts_anew_and_says_so(
    tmp_path: Path, undisturbed: tuple[TrainResult, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    stopped(tmp_path, 6)
    (tmp_path / "checkpoints" / "step-00000005" / ".metadata").unlink()
    with caplog.at_level(logging.WARNING, logger="dwindle"):
        assert_same(run(tmp_path), undisturbed)
    assert any("no checkpoint is whole; training starts at step 1" in message for message in caplog.messages)


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    options = replace(OPTIONS, checkpoint_every=5, checkpoints_kept=1)
    stopped(tmp_path, 6, options)
    later = tmp_path / "checkpoints" / "step-00000015"
    later.mkdir()
    stopped(tmp_path, 11, options)
    assert names(tmp_path) == ["step-00000010"]


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, options=replace(OPTIONS, checkpoint_every=4, checkpoints_kept=3))
    assert names(tmp_path) == ["step-00000012", "step-00000016", "step-00000020"]


def test_another_runs_checkpoint_is_refused_by_naming_what_differs(tmp_path: Path) -> None:
    stopped(tmp_path, 6)
    other = replace(OPTIONS, learning_rate=5e-3, seed=1)
    with pytest.raises(RecipeError) as caught:
        train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(sha256="f" * 64), other, folder=tmp_path)
    for part in ("learning_rate (checkpoint 0.01, now 0.005)", "seed (checkpoint 0, now 1)", "token_set", "another"):
        assert part in str(caught.value)
    assert "batch_size" not in str(caught.value)


def test_another_model_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path, 6)
    model = tiny.TinyModel()
    model.norm.requires_grad_(False)
    with pytest.raises(RecipeError, match="was written by another run: model"):
        train(model, tiny.TinyLoss(), tiny.tiny_tokens(), OPTIONS, folder=tmp_path)


def test_other_starting_weights_are_refused(tmp_path: Path) -> None:
    stopped(tmp_path, 6)
    model = tiny.TinyModel()
    with torch.no_grad():
        model.layers[1].mix.bias[3] += 1e-6
    with pytest.raises(RecipeError, match="was written by another run: start_weights"):
        train(model, tiny.TinyLoss(), tiny.tiny_tokens(), OPTIONS, folder=tmp_path)


def test_another_identity_is_refused(tmp_path: Path) -> None:
    given = (tiny.TinyLoss(), tiny.tiny_tokens(), OPTIONS)
    with pytest.raises(tiny.Interrupted):
        train(tiny.TinyModel(), *given, folder=tmp_path, on_step=tiny.interrupt_at(6), identity={"teacher": "a"})
    with pytest.raises(RecipeError, match=r"another run: teacher \(checkpoint 'a', now 'b'\)"):
        train(tiny.TinyModel(), *given, folder=tmp_path, identity={"teacher": "b"})
    assert train(tiny.TinyModel(), *given, folder=tmp_path, identity={"teacher": "a"}).steps == 20


def test_what_another_version_did_not_record_is_not_compared(
    tmp_path: Path, undisturbed: tuple[TrainResult, nn.Module]
) -> None:
    stopped(tmp_path, 6)
    index = tmp_path / "checkpoints" / "step-00000005" / "checkpoint.json"
    content = json.loads(index.read_text())
    del content["fingerprint"]["start_weights"], content["sha256"]
    index.write_text(json.dumps({**content, "sha256": hash_json(content)}))
    assert_same(run(tmp_path), undisturbed)


def test_how_often_to_log_or_save_may_change(tmp_path: Path, undisturbed: tuple[TrainResult, nn.Module]) -> None:
    stopped(tmp_path, 6)
    other = replace(OPTIONS, log_every=7, checkpoint_every=9, checkpoints_kept=1)
    found = run(tmp_path, options=other)
    for a, b in zip(found[1].parameters(), undisturbed[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert names(tmp_path) == ["step-00000020"]


def test_too_little_disk_is_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(OutputError, match="bytes are needed, 100 are free"):
        run(tmp_path, stop=1)
