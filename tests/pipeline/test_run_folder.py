"""The run folder: identity, lock, keys."""

from __future__ import annotations

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


def test_the_code_version_depends_on_the_rooms() -> None:
    assert code_sha256("data", "prune") != code_sha256("data", "distill")
    assert code_sha256("data", "prune") == code_sha256("data", "prune")
