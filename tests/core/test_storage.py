"""Atomic writes: old or new, never half."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dwindle import storage
from dwindle.errors import OutputError
from dwindle.storage import (
    atomic_file,
    atomic_folder,
    folder_bytes,
    hash_file,
    hash_folder,
    hash_json,
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


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / "f" / "x", "y")


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
