"""The run folder: identity, lock, keys."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dwindle.errors import OutputError
from dwindle.pipeline.run_folder import RunFolder
from dwindle.pipeline.step_keys import code_sha256

IDENTITY = {"teacher": "a"}


def test_an_empty_or_own_folder_is_taken(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder(tmp_path / "run").locked(IDENTITY):
            pass


def test_a_full_disk_is_told_with_its_remedy_before_there_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with (
        pytest.raises(OutputError, match=r"no space left.* Free some space"),
        RunFolder(tmp_path / "r").locked(IDENTITY),
    ):
        pass


def test_another_run_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked(IDENTITY):
        pass
    with (
        pytest.raises(OutputError, match=r"holds another run.*found a, needed b"),
        RunFolder(tmp_path).locked({"teacher": "b"}),
    ):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"), RunFolder(tmp_path).locked(IDENTITY):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match="is a file"), RunFolder(tmp_path / "x").locked(IDENTITY):
        pass


def test_two_runs_do_not_share_a_folder_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        from dwindle.pipeline.run_folder import RunFolder
        with RunFolder(Path({str(tmp_path / "run")!r})).locked({IDENTITY!r}):
            print("held", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-P", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="in use by another"), RunFolder(tmp_path / "run").locked(IDENTITY):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with RunFolder(tmp_path / "run").locked(IDENTITY):
        pass


def test_an_entry_is_taken_over_only_under_its_key(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    place = folder.step_folder(1, "prune", "apple")
    assert place.name == "01-prune-apple"
    folder.store(place, "k1", lambda partial: {"told": (partial / "x").write_text("1")})
    assert folder.cached(place, "k1") == {"key": "k1", "told": 1}
    assert folder.cached(place, "k2") is None
    (place / "record.json").write_text("{ damaged")
    assert folder.cached(place, "k1") is None


@pytest.mark.parametrize("damage", ["file", "record", "gone"])
def test_a_damaged_entry_is_named_and_not_taken_over(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    place = folder.step_folder(1, "prune", None)
    folder.store(place, "k1", lambda partial: {"counts": {10: 1, 9: 2}, "n": (partial / "x").write_text("weights")})
    assert folder.cached(place, "k1") == {"key": "k1", "counts": {"10": 1, "9": 2}, "n": 7}
    assert folder.cached(place, "other") is None
    assert not caplog.records
    if damage == "file":
        (place / "x").write_text("Weights")
    elif damage == "record":
        (place / "record.json").write_text((place / "record.json").read_text().replace('"n": 7', '"n": 8'))
    else:
        (place / "x").unlink()
    assert folder.cached(place, "k1") is None
    assert "01-prune: this result is damaged" in caplog.text


def test_a_kill_before_the_identity_was_written_leaves_a_folder_that_opens(tmp_path: Path) -> None:
    for name in (".lock", "..run.json.partial"):
        (tmp_path / name).write_text('{"teach')
    with RunFolder(tmp_path).locked(IDENTITY):
        pass


def test_a_damaged_identity_is_named(tmp_path: Path) -> None:
    (tmp_path / ".run.json").write_text("[1")
    with pytest.raises(OutputError, match=r"\.run\.json cannot be read"), RunFolder(tmp_path).locked(IDENTITY):
        pass


@pytest.mark.parametrize("link", ["steps", "run.jsonl", ".lock", "steps/01-prune", ".work/abc"])
def test_nothing_is_written_through_a_link(link: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    run = tmp_path / "run"
    with RunFolder(run).locked(IDENTITY):
        pass
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).unlink(missing_ok=True)
    (run / link).symlink_to(outside)
    with pytest.raises(OutputError, match="holds links"), RunFolder(run).locked(IDENTITY):
        pass
    assert not list(outside.iterdir())


def test_a_log_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text('{"event": "whole"}\n{"event": "cu')
    RunFolder(tmp_path).log("next")
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in (lines[0], lines[2])] == ["whole", "next"]


def test_the_code_version_depends_on_the_rooms() -> None:
    assert code_sha256("data", "prune") != code_sha256("data", "distill")
    assert code_sha256("data", "prune") == code_sha256("data", "prune")
