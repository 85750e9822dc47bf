"""Atomic writes: old or new, never half."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dwindle import storage
from dwindle.errors import OutputError
from dwindle.storage import (
    append_text,
    atomic_file,
    atomic_folder,
    beside,
    disk_is_full,
    folder_bytes,
    hash_file,
    hash_folder,
    hash_json,
    read_json,
    require_place,
    require_space,
    write_json,
    write_text,
)


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    write_json(tmp_path / "a", {"x": 1})
    assert (tmp_path / "a").read_text() == '{\n  "x": 1\n}\n'
    assert left(tmp_path) == ["a"]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"
    assert left(tmp_path) == ["a"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "d") as partial:
        (partial / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "d") as partial:
        (partial / "x").write_text("new")
        raise RuntimeError
    assert (tmp_path / "d" / "x").read_text() == "old"
    with atomic_folder(tmp_path / "d") as partial:
        (partial / "y").write_text("new")
    assert left(tmp_path / "d") == ["y"]
    assert left(tmp_path) == ["d"]


def test_a_kill_between_the_renames_leaves_the_old_folder_for_the_next_writer(tmp_path: Path) -> None:
    (tmp_path / ".d.old").mkdir()
    (tmp_path / ".d.old" / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "d"):
        raise RuntimeError
    assert (tmp_path / "d" / "x").read_text() == "old"


def test_no_space_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no space left.*nothing was changed"), atomic_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert left(tmp_path) == []
    with pytest.raises(OutputError, match="are needed"):
        require_space(tmp_path / "not" / "there", 1 << 62)


def test_a_full_disk_is_known_by_what_libraries_say_of_it(tmp_path: Path) -> None:
    assert disk_is_full(OSError(errno.EFBIG, "x"))
    assert not disk_is_full(OSError(errno.EIO, "x"))
    outer = ValueError("could not write")
    outer.__cause__ = RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")
    assert disk_is_full(outer)
    with pytest.raises(OutputError, match="no space left"), atomic_folder(tmp_path / "d"):
        raise outer
    assert left(tmp_path) == []


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the folders that name them, then the rename, then the folder that names the result."""
    told: list[str] = []
    sync, replace = os.fsync, os.replace

    def name(handle: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)

    monkeypatch.setattr(os, "fsync", lambda handle: told.append(name(handle)) or sync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: told.append("rename") or replace(a, b))
    with atomic_folder(tmp_path / "d") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("1")
    assert told == [".d.partial/sub/x", ".d.partial/sub", ".d.partial", "rename", "."]


def test_two_writers_of_one_place_do_not_meet(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from dwindle.storage import atomic_folder
with atomic_folder(Path({str(tmp_path / "d")!r})) as partial:
    (partial / "x").write_text("first")
    print("writing", flush=True)
    time.sleep(60)
"""
    first = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "writing\n"
        with pytest.raises(OutputError, match="d is being written by another process"), atomic_folder(tmp_path / "d"):
            pass
        assert (tmp_path / ".d.partial" / "x").read_text() == "first"
    finally:
        first.kill()
        first.communicate()
    with atomic_folder(tmp_path / "d") as partial:
        (partial / "x").write_text("second")
    assert (tmp_path / "d" / "x").read_text() == "second"


def test_a_log_line_cut_off_by_a_kill_is_ended(tmp_path: Path) -> None:
    append_text(tmp_path / "log", "a\n")
    with (tmp_path / "log").open("a") as handle:
        handle.write("hal")
    append_text(tmp_path / "log", "b\n")
    assert (tmp_path / "log").read_text() == "a\nhal\nb\n"


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "9" * 5000, "\xff"])
def test_json_that_cannot_be_read_is_a_value_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="at most 0 make sense"):
        read_json(tmp_path / "x.json", largest_bytes=0)


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / "f" / "x", "y")


@pytest.mark.parametrize("place", [".", "..", "a/..", "/"])
def test_a_place_without_a_name_is_refused(place: str) -> None:
    with pytest.raises(OutputError, match="no name for an output"), atomic_folder(Path(place)):
        raise AssertionError
    with pytest.raises(OutputError, match="no name for an output"):
        beside(Path(place), "work")


def test_only_an_earlier_one_is_replaced(tmp_path: Path) -> None:
    require_place(tmp_path / "new", "mark.json", "a thing")
    (tmp_path / "empty").mkdir()
    require_place(tmp_path / "empty", "mark.json", "a thing")
    write_text(tmp_path / "full" / "letter.txt", "dear")
    with pytest.raises(OutputError, match=r"full holds something else than a thing \(letter\.txt\)"):
        require_place(tmp_path / "full", "mark.json", "a thing")
    with pytest.raises(OutputError, match="is a file"):
        require_place(tmp_path / "full" / "letter.txt", "mark.json", "a thing")
    write_text(tmp_path / "full" / "mark.json", "{}")
    require_place(tmp_path / "full", "mark.json", "a thing")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="other"), atomic_file(tmp_path / "a"):
        raise OSError(errno.EIO, "other")


def test_hashes_see_names_and_contents(tmp_path: Path) -> None:
    for folder, name, text in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        write_text(tmp_path / folder / name, text)
    hashes = {f: hash_folder(tmp_path / f) for f in "abcd"}
    assert hashes["a"] == hashes["b"]
    assert len(set(hashes.values())) == 3
    assert hash_file(tmp_path / "a" / "x") == hash_file(tmp_path / "b" / "x")
    assert hash_json({"a": 1}) != hash_json({"a": 2})
    assert folder_bytes(tmp_path) == 4
    assert folder_bytes(tmp_path / "a" / "x") == 1


def test_storage_exports_what_it_promises() -> None:
    assert all(hasattr(storage, name) for name in storage.__all__)


def test_a_folder_in_a_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / "kept", "x")
    with pytest.raises(OutputError, match="no name for an output"):
        write_text(Path("."), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
