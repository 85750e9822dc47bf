"""The run folder: where everything of one run lives, who may write to it, and what can be taken over from before.

    OUT/recipe.yaml  report.json  report.html  run.jsonl  README.md
    OUT/steps/NN-name[-variant]/   record.json (with its key) and model/ (a Hugging Face folder)
    OUT/export/FORMAT/             artifacts
    OUT/.work/                     checkpoints of a training that is under way; gone when its step is done

A step's key hashes its name, its options, the content of everything it reads and the code it runs; an entry whose
key is equal is taken over, once its files have the hash they were stored with: a damaged entry is named and made again.
Two runs cannot write to one folder: an advisory lock is held while a run lasts, and the operating system drops it when
the process ends, so no stale lock can block. A run folder holds no links: through one, a run would write elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dwindle.errors import OutputError, offenders
from dwindle.storage import append_text, atomic_folder, explained, hash_folder, hash_json, lock, read_json, write_json

__all__ = ["RunFolder"]

_LOG = logging.getLogger("dwindle")
_IDENTITY = ".run.json"
_RECORD = "record.json"
_BEFORE_IDENTITY = {".lock", "data", f".{_IDENTITY}.partial"}
"""What a run may have made before its identity was written: a kill can leave just these."""
_LINKLESS = ("*", "steps/*", "export/*", ".work/*")


class RunFolder:
    """One run's folder. Use as a context manager: it is locked inside the block."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self, identity: Mapping[str, Any]) -> Iterator[RunFolder]:
        """Hold the folder for one process; refuse one that holds something else or is in use.

        `identity` is what makes two runs the same run (teacher); other options may change between runs.
        """
        self.require_own(identity)
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, self.path)
            self.require_own(identity)  # again: another run may have come and gone since
            write_json(self.path / _IDENTITY, dict(identity))
            yield self
        finally:
            os.close(handle)

    def require_own(self, identity: Mapping[str, Any]) -> None:
        """Raise OutputError unless the folder is absent, empty, or holds this very run."""
        if self.path.is_file():
            raise OutputError(f"{self.path} is a file; an output folder is needed.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        links = sorted(p.relative_to(self.path).as_posix() for one in _LINKLESS for p in self.path.glob(one)
                       if p.is_symlink())  # fmt: skip
        if links:
            raise OutputError(f"{self.path} holds links ({offenders(links)}), through which a run would write "
                              "elsewhere. Replace them by folders, or choose another output folder.")  # fmt: skip
        if not (self.path / _IDENTITY).exists():
            if {p.name for p in self.path.iterdir()} <= _BEFORE_IDENTITY:
                return
            raise OutputError(f"{self.path} is not empty and holds no dwindle run. Choose another output folder.")
        try:
            found = dict(read_json(self.path / _IDENTITY))
        except (OSError, ValueError, TypeError) as error:
            raise OutputError(
                f"{self.path / _IDENTITY} cannot be read ({error}). It says which run the folder belongs to: delete it "
                "if the folder is yours to write to, or choose another output folder."
            ) from error
        differing = [f"{k}: found {found.get(k)}, needed {v}" for k, v in identity.items() if found.get(k) != v]
        if differing:
            raise OutputError(f"{self.path} holds another run ({'; '.join(differing)}). Choose another output folder.")

    def step_folder(self, index: int, name: str, variant: str | None) -> Path:
        """Return steps/NN-name[-variant]."""
        return self.path / "steps" / (f"{index:02d}-{name}" + (f"-{variant}" if variant else ""))

    def work_folder(self, key: str) -> Path:
        """Return the place for checkpoints of the step with this key."""
        return self.path / ".work" / key[:16]

    def cached(self, folder: Path, key: str) -> dict[str, Any] | None:
        """Return the stored entry of a step if it was made under the same key and is undamaged, else None."""
        if not (folder / _RECORD).exists():
            return None
        try:
            entry: dict[str, Any] = dict(read_json(folder / _RECORD))
            written = entry.pop("entry_sha256", None)
            if written == hash_json(entry) and entry["key"] != key:
                return None
            whole = written == hash_json(entry) and entry.pop("files") == hash_folder(folder, without=_RECORD)
        except (OSError, ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            _LOG.warning("%s: this result is damaged and is made again.", folder)
            return None
        return entry

    def store(self, folder: Path, key: str, fill: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """Let `fill` write into a folder beside `folder`, add record.json with the key, put it in place; return it."""
        with atomic_folder(folder) as partial:
            entry: dict[str, Any] = json.loads(json.dumps({"key": key, **fill(partial)}, allow_nan=False))
            whole = {**entry, "files": hash_folder(partial, without=_RECORD)}
            write_json(partial / _RECORD, {**whole, "entry_sha256": hash_json(whole)})
        return entry

    def forget_work(self) -> None:
        """Remove what finished steps left of their checkpoints: a kill can come before they are gone."""
        shutil.rmtree(self.path / ".work", ignore_errors=True)

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to run.jsonl: what happened, when (seconds since the epoch), with what."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, allow_nan=False)
        append_text(self.path / "run.jsonl", line + "\n")


def _lock(handle: int, path: Path) -> None:
    if sys.platform == "win32":  # no advisory locks of this kind; say so rather than pretend
        _LOG.warning("%s is not locked on this system; do not start two runs on it", path)
    if not lock(handle):
        raise OutputError(f"{path} is in use by another dwindle run. Wait for it or choose another output.")
