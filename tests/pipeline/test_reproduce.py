"""A run made again: the same to the bit, and what is said when it is not."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwindle.pipeline.cli import main
from dwindle.pipeline.environment import environment, git_commit
from dwindle.pipeline.runner import run

STEPS: list[Any] = [
    {"prune": {"ffn_keep": 0.5}},
    {"distill": {"losses": [{"name": "forward_kl"}], "tokens": 1024, "batch_size": 4}},
    {"quantize": {"scheme": "integer"}},
]


@pytest.fixture(scope="module")
def finished(recipe_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce") / "run"
    run(recipe_of(steps=STEPS), folder)
    return folder


def again(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", *map(str, words), "--json"])
    out = capsys.readouterr()
    return int(ended.value.code or 0), json.loads(out.out) if out.out else out.err


def test_a_run_repeats_to_the_bit(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = again(capsys, finished, "-o", tmp_path / "second")
    assert code == 0, told
    assert told["equal"]
    assert told["compared"] > 50
    assert told["differing"] == []
    code, told = again(capsys, finished, "-o", tmp_path / "second")
    assert code == 2
    assert "is not empty. Name a fresh folder" in told


def test_what_differs_is_listed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(finished, changed)
    report = json.loads((changed / "report.json").read_text())
    report["steps"][1]["after"]["nats_per_token"] += 0.01
    report["inputs"]["data"]["train"]["sha256"] = "0" * 64
    report["environment"]["packages"]["torch"] = "1.0"
    (changed / "report.json").write_text(json.dumps(report))
    weights = changed / "steps" / "01-prune" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, told = again(capsys, changed)
    assert code == 1
    assert (tmp_path / "changed-reproduced" / "report.json").exists()
    lines = told["differing"]
    assert [line.split()[1] for line in lines] == ["data.train.sha256", "01-prune/model", "1.after.nats_per_token"]
    assert "was 000000000000" in lines[0]
    assert [line for line in told["surroundings"] if line.startswith("packages.torch was 1.0, is ")]


def test_no_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = again(capsys, tmp_path)
    assert code == 2
    assert "no finished run" in told


def test_a_report_without_its_recipe_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").unlink()
    code, told = again(capsys, tmp_path / "run")
    assert code == 2
    assert "holds no recipe.yaml" in told
    assert not (tmp_path / "run-reproduced").exists()


def test_the_report_says_what_it_was_made_on(tmp_path: Path) -> None:
    found = environment()
    assert found["memory_bytes"] > 1e8
    assert found["processor"]
    assert len(found["code_sha256"]) == 64
    assert git_commit(tmp_path) is None
    ask = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*ask, "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*ask, "add", "a"], check=True)
    subprocess.run([*ask, "commit", "-qm", "a"], check=True)
    clean = git_commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{clean}+"


def test_a_file_is_no_place_for_the_second_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    code, told = again(capsys, finished, "-o", tmp_path / "taken")
    assert (code, "is not empty" in told) == (2, True)
