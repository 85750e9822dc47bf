"""dwindle distill --cache: the cache is written once and serves students without the teacher; mix-ups are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dwindle.bundle import ModelBundle
from dwindle.pipeline.cli import main


def invoke(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(end.value.code or 0), captured.err


def test_one_cache_serves_students_without_the_teacher(
    capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path
) -> None:
    train, teacher, cache = workshop / "train.txt", workshop / "teacher", tmp_path / "cache"
    word = ("-d", train, "--cache", cache, "--tokens", "1k", "--batch-size", "4", "--json")
    code, told = invoke(capsys, "distill", "-m", teacher, "-o", tmp_path / "a", *word)
    assert code == 2
    assert f"the logit cache {cache} lacks windows" in told
    assert not cache.exists()
    assert invoke(capsys, "distill", "-t", teacher, "-m", teacher, "-o", tmp_path / "a", *word)[0] == 0
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["teacher"] == ModelBundle.load(teacher).content_sha256
    for name, given in (("b", ()), ("c", ("-t", teacher))):
        code, told = invoke(capsys, "distill", *given, "-m", teacher, "-o", tmp_path / name, *word)
        assert code == 0
        assert told.count("loading") == 1, "the student alone"
    hashes = {ModelBundle.load(tmp_path / name).content_sha256 for name in "abc"}
    assert len(hashes) == 1
    shutil.copytree(tmp_path / "b", tmp_path / "other")
    before = (cache / "manifest.json").read_bytes()
    code, told = invoke(capsys, "distill", "-t", tmp_path / "other", "-m", teacher, "-o", tmp_path / "d", *word)
    assert code == 2
    assert "holds the predictions of something else: teacher: found" in told
    assert (cache / "manifest.json").read_bytes() == before
    assert not (tmp_path / "d").exists()
    (tmp_path / "text.txt").write_text("Some other text, long enough for a window or two. " * 30)
    code, told = invoke(capsys, "distill", "-m", teacher, "-o", tmp_path / "d", "-d", tmp_path / "text.txt", *word[2:])
    assert code == 2
    assert "no teacher is given" in told
    assert "are not in this logit cache (it holds" in told


def test_without_teacher_or_cache_the_command_asks_for_one(
    capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path
) -> None:
    code, told = invoke(
        capsys, "distill", "-m", workshop / "teacher", "-d", workshop / "train.txt", "-o", tmp_path / "a"
    )
    assert code == 2
    assert "missing -t TEACHER (or --cache FOLDER" in told
