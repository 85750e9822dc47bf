"""Files that are either old or new, never half: atomic writes, hashes and disk-space checks. Torch-free.

Every output is written beside its place under a name that starts with `.` and ends with `.partial`, flushed to
disk, then renamed. A kill at any moment leaves the old state or the new one; a left-over `.partial` is removed by
the next writer of the same place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dwindle.errors import OutputError

__all__ = [
    "atomic_file",
    "atomic_folder",
    "folder_bytes",
    "hash_file",
    "hash_folder",
    "hash_json",
    "require_space",
    "write_json",
    "write_text",
]

_CHUNK_BYTES = 1 << 20


def _partial(place: Path) -> Path:
    return place.with_name(f".{place.name}.partial")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(place: Path) -> Iterator[None]:
    """Turn the operating system's refusals into an OutputError that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing_parent(place)).free
            raise OutputError(
                f"{place}: no space left on the device ({free:,} bytes free). "
                "Free some space or choose another output; nothing was changed."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise OutputError(f"{place}: cannot be written ({error.strerror}). Choose another output.") from error
        raise


@contextlib.contextmanager
def atomic_file(place: Path) -> Iterator[Path]:
    """Yield a path beside `place` to write to; on success it replaces `place`, on any error it is removed."""
    partial = _partial(place)
    with _explained(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        try:
            yield partial
            _fsync(partial)
            os.replace(partial, place)
            _fsync(place.parent)
        except BaseException:
            _remove(partial)
            raise


@contextlib.contextmanager
def atomic_folder(place: Path) -> Iterator[Path]:
    """Yield an empty folder beside `place`; on success it takes the place of `place`, on any error it is removed.

    An older folder at `place` is moved aside first and removed last, so a kill leaves one of the two whole.
    """
    partial, old = _partial(place), place.with_name(f".{place.name}.old")
    with _explained(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        if old.exists() and not place.exists():
            os.replace(old, place)
        partial.mkdir()
        try:
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    _fsync(path)
            _remove(old)
            if place.exists():
                os.replace(place, old)
            os.replace(partial, place)
            _fsync(place.parent)
            _remove(old)
        except BaseException:
            _remove(partial)
            raise


def write_text(place: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(place) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(place: Path, data: Any) -> None:
    """Write JSON atomically: indented, no NaN."""
    write_text(place, json.dumps(data, indent=2, allow_nan=False) + "\n")


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_folder(folder: Path) -> str:
    """Return one sha256 over the relative names and contents of all files of a folder, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_json(data: Mapping[str, Any] | list[Any]) -> str:
    """Return the sha256 of the canonical JSON (sorted keys, no spaces) of `data`.

    >>> hash_json({"b": 1, "a": 2}) == hash_json({"a": 2, "b": 1})
    True
    """
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_bytes(folder: Path) -> int:
    """Return the sum of the sizes of all files under a folder (or of the file itself), in bytes."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _existing_parent(place: Path) -> Path:
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place


def require_space(place: Path, needed_bytes: int) -> None:
    """Raise OutputError if the file system that holds `place` has fewer than `needed_bytes` free."""
    free = shutil.disk_usage(_existing_parent(place)).free
    if free < needed_bytes:
        raise OutputError(
            f"{place}: about {needed_bytes:,} bytes are needed, {free:,} are free. "
            "Free some space or choose another output; nothing was written."
        )
