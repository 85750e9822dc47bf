"""SIGKILL at every single file operation of what all steps are stored by: outputs, run folders, training checkpoints.

The whole pipeline is killed at random (`crash.py`); here nothing is left to chance. Each point is a forked process that
dies at its n-th file operation, for n = 1, 2, ... until it gets through; then what is on the disk must be old or new, and
going on must end as if nothing had happened.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dwindle.pipeline.run_folder import RunFolder
from dwindle.storage import atomic_folder, write_json
from dwindle.train import train

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
sys.path.insert(0, str(Path(__file__).parent))
import tiny_training as tiny
from crash import Ending

OPTIONS = replace(tiny.OPTIONS, steps=6, checkpoint_every=2, log_every=2)


def dies(act: Callable[[], object], at: int, folder: Path) -> bool:
    """Run `act` in a forked process that is killed at its file operation number `at`; return whether it was."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Ending("kill", at, folder).install()
            with redirect_stderr(io.StringIO()):
                act()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def test_an_output_is_old_or_new_at_every_point(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "sub").mkdir()
            for name in ("a", "sub/b"):
                (partial / name).write_text(text)

    found = []
    write("old")
    for at in range(1, 100):
        if not dies(lambda: write("new"), at, tmp_path):
            break
        places = [tmp_path / "out"] if (tmp_path / "out").exists() else [tmp_path / ".out.old"]
        texts = {(place / name).read_text() for place in places for name in ("a", "sub/b")}
        assert len(texts) == 1, f"half old, half new after operation {at}"
        found += texts
        write("old")  # the next writer mends whatever was left
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert at > 10
    assert {"old", "new"} == set(found)


def test_a_run_folder_opens_at_every_point(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work() -> None:
        with RunFolder(folder).locked({"teacher": "a"}) as run:
            run.log("start")
            for number in (1, 2):
                place = run.step_folder(number, "prune", None)
                if run.cached(place, "k") is None:
                    run.store(place, "k", lambda partial: {"n": (partial / "weights").write_text("whole")})
            run.forget_work()
            write_json(folder / "report.json", {"done": True})

    for at in range(1, 300):
        shutil.rmtree(folder, ignore_errors=True)
        if not dies(work, at, tmp_path):
            break
        before = {p: p.stat().st_mtime_ns for p in folder.glob("steps/[!.]*/record.json")}
        work()
        assert {p: p.stat().st_mtime_ns for p in before} == before, f"a finished step was done again after {at}"
        assert json.loads((folder / "report.json").read_text()) == {"done": True}
        left = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert left == {".lock", ".run.json", "run.jsonl", "report.json", "steps/01-prune/record.json",
                        "steps/01-prune/weights", "steps/02-prune/record.json", "steps/02-prune/weights"}  # fmt: skip
    assert at > 20


@pytest.mark.parametrize(
    "every", [pytest.param(9, id="some points"), pytest.param(1, id="all points", marks=pytest.mark.slow)]
)
def test_training_ends_with_the_same_bits_at_every_point(every: int, tmp_path: Path) -> None:
    """Each point is reached in a training of its own: killed there, and gone on with."""

    def work(folder: Path) -> list[torch.Tensor]:
        model = tiny.TinyModel(dropout=0.2)
        with redirect_stderr(io.StringIO()):
            train(model, tiny.TinyLoss(), tiny.tiny_tokens(), OPTIONS, folder=folder)
        return [p.detach().clone() for p in model.parameters()]

    expected = work(tmp_path / "undisturbed")
    log = (tmp_path / "undisturbed" / "run.jsonl").read_text().splitlines()
    for at in range(1, 500, every):
        folder = tmp_path / str(at)
        if not dies(lambda folder=folder: work(folder), at, tmp_path):
            break
        for a, b in zip(work(folder), expected, strict=True):
            assert torch.equal(a, b), f"other weights after a kill at operation {at}"
        lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
        assert [(line["step"], line["loss"]) for line in lines] == [
            (line["step"], line["loss"]) for line in map(json.loads, log)
        ]
        assert not list((folder / "checkpoints").glob(".*")), f"something was left over after {at}"
        shutil.rmtree(folder)
    assert at > 30
