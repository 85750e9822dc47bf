"""Files that are either old or new, never half: atomic writes, hashes and disk-space checks. Torch-free.

Every output is written beside its place under a name that starts with `.` and ends with `.partial`, flushed to
disk, then renamed. A kill at any moment leaves the old state or the new one; a left-over `.partial` is removed by
the next writer of the same place. A folder under construction is locked: a second writer of the same place is refused,
and the operating system drops the lock when a writer dies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dwindle.errors import OutputError, offenders

__all__ = [
    "append_text",
    "atomic_file",
    "atomic_folder",
    "beside",
    "disk_is_full",
    "explained",
    "folder_bytes",
    "hash_file",
    "hash_folder",
    "hash_json",
    "lock",
    "read_json",
    "require_place",
    "require_space",
    "write_json",
    "write_text",
]

_CHUNK_BYTES = 1 << 20
_LARGEST_JSON_BYTES = 200_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def beside(place: Path, ending: str) -> Path:
    """Return the hidden path beside a place at which something is prepared for it.

    Raises OutputError for a place that has no name of its own: `.`, `..` or a root.

    >>> beside(Path("runs/small"), "work").as_posix()
    'runs/.small.work'
    """
    if place.name in ("", ".."):
        raise OutputError(f"{place} is no name for an output, which is prepared beside its place. Choose a new folder, "
                          f"such as {place / 'out'}.")  # fmt: skip
    return place.with_name(f".{place.name}.{ending}")


def require_place(place: Path, mark: str | None, what: str, files: Collection[str] | None = None) -> None:
    """Raise OutputError unless `place`, which is to be replaced whole, is free, empty or an earlier `what`.

    An earlier one holds the file `mark` and nothing but files that match the patterns `files`, where these are given.
    """
    beside(place, "partial")
    if place.exists() and not place.is_dir():
        raise OutputError(f"{place} is a file. Choose another output folder; nothing was written.")
    held = sorted(place.iterdir()) if place.exists() else []
    foreign = [path for path in held if files is not None and (path.is_dir() or not any(map(path.match, files)))]
    if foreign or (held and mark is not None and not (place / mark).is_file()):
        shown = offenders([path.name for path in foreign or held], limit=5)
        raise OutputError(f"{place} holds something else than {what} ({shown}). Choose another output, or empty it.")


def _partial(place: Path) -> Path:
    return beside(place, "partial")


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


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error, or what it was raised from, says that nothing more can be written.

    Libraries that write from C++ or Rust raise errors of their own, which only name the system's in their text.

    >>> disk_is_full(RuntimeError("PytorchStreamWriter failed: No space left on device"))
    True
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        text = str(error)
        if any(os.strerror(code) in text for code in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn the operating system's refusals into an OutputError that names the place and the remedy."""
    try:
        yield
    except Exception as error:
        if disk_is_full(error):
            free = shutil.disk_usage(_existing_parent(place)).free
            raise OutputError(
                f"{place}: no space left on the device ({free:,} bytes free), or a file grew past the size allowed "
                "here. Free some space or choose another output; nothing was changed."
            ) from error
        if isinstance(error, OSError) and error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.EEXIST,
            errno.ENAMETOOLONG,
        ):
            raise OutputError(f"{place}: cannot be written ({error.strerror}). Choose another output.") from error
        raise


@contextlib.contextmanager
def atomic_file(place: Path) -> Iterator[Path]:
    """Yield a path beside `place` to write to; on success it replaces `place`, on any error it is removed."""
    partial = _partial(place)
    with explained(place):
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

    An older folder at `place` is moved aside first and removed last, so a kill leaves one of the two whole. Raises
    OutputError if another process is writing the same place.
    """
    partial, old = _partial(place), beside(place, "old")
    with contextlib.ExitStack() as held, explained(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        if partial.is_dir() and not partial.is_symlink():
            with _locked_folder(partial, place):
                _remove(partial)
        _remove(partial)
        if old.exists() and not place.exists():
            os.replace(old, place)
        partial.mkdir()
        held.enter_context(_locked_folder(partial, place))
        try:
            yield partial
            _fsync_tree(partial)
            _remove(old)
            if place.exists() or place.is_symlink():
                os.replace(place, old)
            os.replace(partial, place)
            _fsync(place.parent)
            _remove(old)
        except BaseException:
            _remove(partial)
            raise


def _fsync_tree(folder: Path) -> None:
    """Flush all files of a folder, then the folders that name them, then the folder itself."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not os.path.islink(path := os.path.join(root, name)):
                _fsync(Path(path))
        _fsync(Path(root))


def lock(handle: int) -> bool:
    """Take an advisory lock on an open file or folder; False if another process holds it.

    The operating system drops it when `handle` is closed or the process ends, so a dead process blocks nobody. Where
    there are no such locks (Windows, some network file systems), True comes back: nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


@contextlib.contextmanager
def _locked_folder(partial: Path, place: Path) -> Iterator[None]:
    handle = os.open(partial, os.O_RDONLY)
    try:
        if not lock(handle):
            raise OutputError(f"{place} is being written by another process. Wait for it or choose another output.")
        yield
    finally:
        os.close(handle)


def write_text(place: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(place) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(place: Path, data: Any) -> None:
    """Write JSON atomically: indented, no NaN."""
    write_text(place, json.dumps(data, indent=2, allow_nan=False) + "\n")


def append_text(path: Path, text: str) -> None:
    """Add lines to a log. A line that a kill cut off before is ended first, so that it spoils no other."""
    with explained(path), path.open("a+b") as handle:
        if handle.tell() > 0:
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":
                text = f"\n{text}"
        handle.write(text.encode("utf-8"))


def read_json(path: Path, largest_bytes: int = _LARGEST_JSON_BYTES) -> Any:
    """Return what a JSON file holds. Raises OSError, or ValueError with the reason, whatever the file contains."""
    size = path.stat().st_size
    if size > largest_bytes:
        raise ValueError(f"{size:,} bytes where at most {largest_bytes:,} make sense")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_folder(folder: Path, without: str | None = None) -> str:
    """Return one sha256 over the relative names and contents of all files of a folder, in sorted order.

    `without` names one file directly in the folder to leave out.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if without is not None and path == folder / without:
            continue
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
